#!/usr/bin/env bash
# The table of docs/choosing.md: several ways to quantize one model, measured side by side by `qtool eval`.
#   bash benchmarks/choosing.sh DATA MODEL [OPTION...]      further options of qtool eval, such as --tasks arc_easy
# DATA holds wikitext2-valid.txt (calibration) and wikitext2-test.txt (evaluation); MODEL is a safetensors directory whose
# rows are multiples of 64. NAMES (all), SAMPLES and WINDOWS (environment) make a shorter run. What lies in WORK stays.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?usage: choosing.sh DATA MODEL [OPTION...]}
MODEL=${2:?usage: choosing.sh DATA MODEL [OPTION...]}
shift 2
NAMES=${NAMES:-fp8 smoothquant llm-int8 gptq-int8 q5_k_m gptq-int4 awq-int4 rtn-int4 nf4 nvfp4 mixed-4.25 mixed-3.25 gptq-int3}
SAMPLES=${SAMPLES:-128}
WINDOWS=${WINDOWS:-60}
WORK=${WORK:-bench-work/choosing}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$WORK"
TEXT=(--calibration "$DATA/wikitext2-valid.txt" --samples "$SAMPLES" --sequence-length 512)

quantize() {  # name, options of qtool quantize
  local name=$1
  shift
  [ -e "$WORK/$name" ] || "$PYTHON" -m qtool quantize "$MODEL" --out "$WORK/$name" --quiet "$@"
}
PATHS=()
for name in $NAMES; do
  case $name in
    fp8 | llm-int8 | nf4) quantize "$name" --method "$name" ;;
    smoothquant | q5_k_m | q4_k_m | nvfp4 | mxfp4) quantize "$name" --method "$name" "${TEXT[@]}" ;;
    rtn-int4) quantize "$name" --method rtn --bits 4 --group-size 64 ;;
    awq-int4) quantize "$name" --method awq --bits 4 --group-size 64 "${TEXT[@]}" ;;
    gptq-int*) quantize "$name" --method gptq --bits "${name#gptq-int}" --group-size 64 "${TEXT[@]}" ;;
    mixed-*) quantize "$name" --bits "${name#mixed-}" "${TEXT[@]}" ;;
    *) echo "choosing.sh: unknown name $name" >&2; exit 2 ;;
  esac
  PATHS+=("$WORK/$name")
done
"$PYTHON" -m qtool eval "${PATHS[@]}" --against "$MODEL" --text "$DATA/wikitext2-test.txt" --windows "$WINDOWS" \
  --memory-context 8192 --speed --markdown "$@"
