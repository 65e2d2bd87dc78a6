#!/usr/bin/env bash
# The methods beside GPTQ, each next to the tools that have it too, on one model and one set of calibration ids.
#   bash benchmarks/methods.sh DATA MODEL [PAIR...]      pairs: nf4 fp8 w8a8 awq gptqmodel (all)
# DATA and MODEL: see run.sh. LLMC and GPTQMODEL name the Pythons of the peers' own environments; qtool's has bitsandbytes.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?usage: methods.sh DATA MODEL [PAIR...]}
MODEL=${2:?usage: methods.sh DATA MODEL [PAIR...]}
shift 2
PAIRS=${*:-nf4 fp8 w8a8 awq gptqmodel}
SAMPLES=${SAMPLES:-128}
WINDOWS=${WINDOWS:-60}
WORK=${WORK:-bench-work}
LLMC=${LLMC:-.venv-bench/bin/python}
GPTQMODEL=${GPTQMODEL:-.venv-loaders-gptqmodel/bin/python}
PYTHON=.venv/bin/python
mkdir -p "$WORK"
LABELS=()
"$PYTHON" benchmarks/calibration_ids.py "$MODEL" "$DATA/wikitext2-valid.txt" "$WORK/ids.safetensors" --samples "$SAMPLES"

measure() {  # label, command...
  rm -rf "${WORK:?}/$1"
  LABELS+=("$1")
  "$PYTHON" benchmarks/measure.py "$WORK" "$@"
}
quantize() {  # label, options of qtool
  local label=$1
  shift
  measure "$label" "$PYTHON" -m qtool quantize "$MODEL" --json --out "$WORK/$label" "$@"
}
TEXT=(--calibration "$DATA/wikitext2-valid.txt" --samples "$SAMPLES" --sequence-length 512)
llmcompressor() {  # label, method
  measure "$1" "$LLMC" benchmarks/peer_llmcompressor.py "$MODEL" "$WORK/$1" "$WORK/ids.safetensors" --method "$2"
}
for pair in $PAIRS; do
  case $pair in
    nf4) quantize nf4 --method nf4
         quantize nf4-dq --method nf4 --double-quant
         measure bitsandbytes-nf4 "$PYTHON" benchmarks/peer_bitsandbytes.py "$MODEL" "$WORK/bitsandbytes-nf4" ;;
    fp8) quantize fp8 --method fp8
         llmcompressor llm-compressor-fp8 fp8 ;;
    w8a8) quantize smoothquant --method smoothquant "${TEXT[@]}"
          quantize w8a8 --method w8a8 "${TEXT[@]}"
          llmcompressor llm-compressor-w8a8 w8a8 ;;
    awq) quantize awq --method awq --group-size 64 "${TEXT[@]}"
         llmcompressor llm-compressor-awq awq ;;
    gptqmodel) measure gptqmodel-awq "$GPTQMODEL" benchmarks/peer_gptqmodel.py "$MODEL" "$WORK/gptqmodel-awq" "$WORK/ids.safetensors" ;;
  esac
done
"$PYTHON" benchmarks/side_by_side.py "$MODEL" "$DATA/wikitext2-test.txt" "$WORK/quality.json" "${LABELS[@]/#/$WORK/}" --windows "$WINDOWS"
"$PYTHON" benchmarks/measure.py "$WORK" --table "${LABELS[@]}"
