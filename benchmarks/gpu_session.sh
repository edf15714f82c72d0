#!/usr/bin/env bash
# On a machine with one GPU, at most 8 minutes: is it right, how fast are the kernels, how fast is a step beside the others.
# CSVs and logs go to $OUT. $WHEELS: a folder of wheels that the machine lacks (bitsandbytes, gguf, datasets, ...), if any.
#     OUT=/tmp/gpu WHEELS=wheels PARTS="test kernels train" benchmarks/gpu_session.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-/tmp/gpu}; PARTS=${PARTS:-test kernels train}; mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton} PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "${WHEELS:-none}/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:/tmp/site
fi
step() { local most=$1; shift; echo "== $* (at $SECONDS s)"; timeout "$most" "$@" || echo "!! exit $?"; }
train() { local most=$1; shift; step "$most" python3 benchmarks/gpu_train.py "$@" --out "$OUT" --seconds $((most - 15)); }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for part in $PARTS; do case $part in
  test)    step 150 python3 -m pytest tests/test_cuda.py -m cuda -q -n 8 -p no:cacheprovider ;;
  kernels) step 90 python3 benchmarks/gpu_kernels.py --out "$OUT" --seconds 70 ;;
  train)   train 70 qgraft 7b --checkpointing --profile
           train 60 qgraft 7b
           train 70 peft-nf4 7b --checkpointing
           train 50 peft-bf16 7b --checkpointing
           train 45 qgraft 0.6b --profile
           train 45 qgraft 0.6b --graphs
           train 45 peft-nf4 0.6b
           train 45 peft-bf16 0.6b ;;
esac; done
test -f "$OUT/gpu_train.csv" && cat "$OUT/gpu_train.csv"
echo "total $SECONDS s"
