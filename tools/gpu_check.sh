#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command:
#
#     tools/gpu_check.sh [OUT]        results in OUT, else $OUT, else build/gpu
#
# Builds; runs the ops' contract and the tests of tests/gpu on the device; runs them under compute-sanitizer; times
# every op against plain PyTorch, the same compiled, and public libraries that are installed. What a step needs
# and the machine lacks is named and the step left out. Writes gpu.json and gpu.md, a log for each step, and
# fails if a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-build/gpu}}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: > "$OUT/steps.tsv"
PYTHON=.venv/bin/python

# step NAME NEEDED... -- COMMAND...: runs a command whose needs are met.
step() {
  local name=$1 lacking="" status started=$SECONDS
  shift
  while [ "$1" != -- ]; do
    has "$1" || lacking="$lacking${lacking:+, }no $1"
    shift
  done
  shift
  if [ -n "$lacking" ]; then
    status="left out: $lacking"
    : > "$OUT/$name.log"
  elif "$@" > "$OUT/$name.log" 2>&1; then
    status=passed
  else
    status="failed ($?): see $name.log"
  fi
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - started)) >> "$OUT/steps.tsv"
  printf '%-24s %s (%s s)\n' "$name" "$status" $((SECONDS - started))
}

has() {
  case $1 in
    GPU) [ -n "${GPU_COUNT-}" ] || GPU_COUNT=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())" 2> /dev/null || echo 0)
         [ "$GPU_COUNT" -gt 0 ] ;;
    *) command -v "$1" > /dev/null ;;
  esac
}

CONTRACT=(tests/ops/test_contract.py --device cuda --isa baseline -p no:cacheprovider)
# Each kernel once, without what torch's own compilers would add.
QUICK=(-k "matches_reference and (float32 or random_sample)" -q)

step setup -- make setup
step build nvcc -- env AVATAR_OPS_CUDA=ON "$PYTHON" setup.py --quiet build_ext --inplace
step installed -- "$PYTHON" -m avatar_ops
step kernels nvcc -- "$PYTHON" tools/kernel_report.py --out "$OUT/kernels"
step contract GPU nvcc -- "$PYTHON" -m pytest "${CONTRACT[@]}"
step promises GPU nvcc -- "$PYTHON" -m pytest tests/gpu
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" GPU nvcc compute-sanitizer -- compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --target-processes all "$PYTHON" -m pytest "${CONTRACT[@]}" "${QUICK[@]}"
done
step benchmarks GPU nvcc -- "$PYTHON" -m pytest benchmarks/bench_gpu.py --benchmark-json="$OUT/benchmarks.json"
"$PYTHON" tools/gpu_table.py "$OUT"
! grep -q $'\tfailed' "$OUT/steps.tsv"
