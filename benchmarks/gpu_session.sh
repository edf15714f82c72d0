#!/usr/bin/env bash
# On a machine with one GPU, in 8 minutes: is a step of training as fast and small as it should be, is it right, a token of decoding, a
# small model, the kernels; what is wanted most comes first. CSVs and logs go to $OUT, each line as soon as it is measured.
#     OUT=/tmp/gpu WHEELS=wheels PARTS="train test decode small kernels" BUDGET=480 benchmarks/gpu_session.sh
# $WHEELS: a folder of wheels that the machine lacks (bitsandbytes, gguf, ...), if any. $BUDGET: seconds for all of it; what does not fit
# is cut or left out, and said. `new` are the tests of graphs, of decoding and of every way of training alone; `more` needs minutes of its
# own. DRY=1 says what would run; tests/test_devices.py does the same runs on a CPU, on a GPU that is pretended.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-/tmp/gpu}; PARTS=${PARTS:-train test decode small kernels}; BUDGET=${BUDGET:-480}; mkdir -p "$OUT"
LEAST=15  # seconds that a part needs: below them it is not begun
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton} PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "${WHEELS:-none}/*.whl" >/dev/null; then
  export PYTHONPATH=$PYTHONPATH:/tmp/site
  test -n "${DRY:-}" ||
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$WHEELS"/*.whl
fi
planned=0
step() {  # at most so many seconds, but no more than are left; INT lets Python write what it has, KILL comes 5 s later
  local most=$1 left=$((BUDGET - SECONDS)); shift
  planned=$((planned + most))
  if test -n "${DRY:-}"; then echo "== $* (at most $most s, $planned in all)"; return; fi
  if test "$left" -lt $LEAST; then echo "!! left out, $left s are left: $*"; return; fi
  test "$most" -le "$left" || most=$left
  echo "== $* (at $SECONDS s, at most $most)"
  timeout -s INT -k 5 "$most" "$@" || echo "!! exit $?"
}
train() { local most=$1; shift; step "$most" python3 benchmarks/gpu_train.py "$@" --out "$OUT" --seconds $((most - 15)); }
decode() { local most=$1; shift; step "$most" python3 benchmarks/gpu_decode.py "$@" --out "$OUT"; }
tests() {  # every result is in the log as soon as it is there
  local most=$1; shift
  OMP_NUM_THREADS=1 step "$most" python3 -m pytest tests/test_cuda.py -m cuda -v -n 8 -W ignore -p no:cacheprovider "$@" >"$OUT/tests.log"
  test -z "${DRY:-}" || { cat "$OUT/tests.log"; return; }
  grep -c PASSED "$OUT/tests.log"; grep -E "^!!|^FAILED|^ERROR|FAILED tests|^E  |^=+ .* =+$" "$OUT/tests.log" | cut -c1-200
}
step 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step 45 python3 -c "import torch, transformers, triton, qgraft; print(torch.__version__, transformers.__version__, triton.__version__)"
for part in $PARTS; do case $part in
  train)   train 45 qgraft 7b --keep --graphs
           train 60 peft-nf4 7b ;;
  test)    tests 120 ;;
  new)     tests 120 -k "replayed or graphs or waits or decoded or float64 or packed or run or pairs or classifier or images or merge" ;;
  decode)  decode 45 qgraft 7b --rows 1 8 --repeats 2
           decode 50 transformers-nf4 7b --tokens 24 --repeats 2 ;;
  small)   train 30 qgraft 0.6b --graphs
           train 35 peft-nf4 0.6b ;;
  kernels) step 40 python3 benchmarks/gpu_kernels.py --out "$OUT" --seconds 30 ;;
  more)    train 45 qgraft 7b --checkpointing
           train 70 peft-nf4 7b --checkpointing
           train 60 peft-bf16 7b --checkpointing
           train 45 peft-bf16 0.6b
           train 45 qgraft 7b --keep
           decode 45 qgraft 7b --lora
           decode 45 qgraft 7b --rows 64 --repeats 2
           decode 60 transformers-bf16 7b --rows 1 8 64 --tokens 24 --repeats 2 ;;
  *)       echo "!! no such part: $part" ;;
esac; done
for file in "$OUT"/gpu_train.csv "$OUT"/gpu_decode.csv; do test -f "$file" && cat "$file"; done
echo "total $SECONDS s"
