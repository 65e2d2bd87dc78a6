#!/usr/bin/env bash
# qtool beside llm-compressor on one model and one set of calibration ids, in one run.
#   bash benchmarks/run.sh DATA MODEL
# DATA holds wikitext2-valid.txt (calibration) and wikitext2-test.txt (evaluation); MODEL is a safetensors directory.
# SAMPLES and WINDOWS (environment) make a shorter run; the peer gets a venv of its own, .venv-bench.
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmarks/environment.sh
DATA=${1:?usage: make bench DATA=folder MODEL=directory}
MODEL=${2:?usage: make bench DATA=folder MODEL=directory}
SAMPLES=${SAMPLES:-128}
WINDOWS=${WINDOWS:-60}
WORK=${WORK:-bench-work}
PEER=${PEER:-.venv-bench/bin/python}
[ -e "$PEER" ] || environment .venv-bench llmcompressor==0.14.0.1
mkdir -p "$WORK"
rm -rf "$WORK"/{rtn,gptq,gptq-fast,llm-compressor} "$WORK"/*.json
.venv/bin/python benchmarks/calibration_ids.py "$MODEL" "$DATA/wikitext2-valid.txt" "$WORK/ids.safetensors" --samples "$SAMPLES"

measure() {  # label, command...: what it prints to WORK/label.json; seconds and peak memory of the whole process
  .venv/bin/python benchmarks/measure.py "$WORK" "$@"
}

CALIBRATED=(--calibration "$DATA/wikitext2-valid.txt" --samples "$SAMPLES" --sequence-length 512)
quantize() {  # label, recipe, further options
  local label=$1 recipe=$2
  shift 2
  measure "$label" .venv/bin/qtool quantize "$MODEL" --recipe "$recipe" --bits 4 --group-size 64 --json --out "$WORK/$label" "$@"
}
quantize rtn rtn-int4
quantize gptq gptq-int4 "${CALIBRATED[@]}"
quantize gptq-fast gptq-int4-fast "${CALIBRATED[@]}"
measure llm-compressor "$PEER" benchmarks/peer_llmcompressor.py "$MODEL" "$WORK/llm-compressor" "$WORK/ids.safetensors"
.venv/bin/python benchmarks/side_by_side.py "$MODEL" "$DATA/wikitext2-test.txt" "$WORK/quality.json" \
  "$WORK"/{rtn,gptq,gptq-fast,llm-compressor} --windows "$WINDOWS"
.venv/bin/python benchmarks/measure.py "$WORK" --table rtn gptq gptq-fast llm-compressor
