#!/usr/bin/env bash
# On a machine with one GPU, in parts of at most 4 minutes: is it right, how fast are the kernels, a step of training and a token
# beside the others. CSVs and logs go to $OUT. $WHEELS: a folder of wheels that the machine lacks (bitsandbytes, gguf, ...), if any.
#     OUT=/tmp/gpu WHEELS=wheels PARTS="test kernels train decode" benchmarks/gpu_session.sh
# `new` are the tests of graphs, of decoding and of every way of training alone. The first import from a cold disk takes half a
# minute. DRY=1 says what would run; tests/test_devices.py does the same runs on a CPU, on a GPU that is pretended.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-/tmp/gpu}; PARTS=${PARTS:-test kernels train decode}; mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton} PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "${WHEELS:-none}/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:/tmp/site
fi
step() { local most=$1; shift; echo "== $* (at $SECONDS s, at most $most)"; test -n "${DRY:-}" || timeout -s INT "$most" "$@" || echo "!! exit $?"; }
train() { local most=$1; shift; step "$most" python3 benchmarks/gpu_train.py "$@" --out "$OUT" --seconds $((most - 20)); }
decode() { local most=$1; shift; step "$most" python3 benchmarks/gpu_decode.py "$@" --out "$OUT"; }
tests() {  # every result is in the log as soon as it is there
  local most=$1; shift
  OMP_NUM_THREADS=1 step "$most" python3 -m pytest tests/test_cuda.py -m cuda -v -n 8 -W ignore -p no:cacheprovider "$@" >"$OUT/tests.log"
  test -z "${DRY:-}" || { cat "$OUT/tests.log"; return; }
  grep -c PASSED "$OUT/tests.log"; grep -E "^FAILED|^E  |^=+ .* =+$" "$OUT/tests.log" | cut -c1-200
}
step 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step 60 python3 -c "import torch, transformers, triton, qgraft; print(torch.__version__, transformers.__version__, triton.__version__)"
for part in $PARTS; do case $part in
  new)     tests 200 -k "replayed or graphs or waits or decoded or float64 or packed or run or pairs or classifier or images or merge" ;;
  test)    tests 230 ;;
  kernels) step 90 python3 benchmarks/gpu_kernels.py --out "$OUT" --seconds 70 ;;
  train)   train 45 qgraft 7b --keep
           train 45 qgraft 7b --keep --graphs
           train 70 peft-nf4 7b
           train 45 qgraft 0.6b --graphs
           train 45 peft-nf4 0.6b
           train 45 peft-bf16 0.6b ;;
  small)   train 60 qgraft 7b --checkpointing
           train 70 peft-nf4 7b --checkpointing
           train 60 peft-bf16 7b --checkpointing ;;
  decode)  decode 60 qgraft 7b --rows 1 8 64
           decode 45 qgraft 7b --lora
           decode 90 transformers-nf4 7b --rows 1 8 --tokens 24 --repeats 2
           decode 60 transformers-bf16 7b --rows 1 8 64 --tokens 24 --repeats 2 ;;
esac; done
for file in "$OUT"/gpu_train.csv "$OUT"/gpu_decode.csv; do test -f "$file" && cat "$file"; done
echo "total $SECONDS s"
