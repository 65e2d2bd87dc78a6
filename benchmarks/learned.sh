#!/usr/bin/env bash
# What learning adds at each width, on one model: the rows of benchmarks/results/learned.md.
#   bash benchmarks/learned.sh DATA MODEL [ROW...]
# rows: solver refine tune distill qat aqlm best (qtool's; best is the recipe 4bit-best, 3bit-best or 2bit-best), autoround hqq
# (in a venv of their own, .venv-autoround), llmcompressor (in .venv-bench), gptqmodel (in the venv of the loader tests).
# DATA and MODEL: see run.sh. BITS (4 3 2), SAMPLES, WINDOWS and ITERS (AutoRound's, 200) are read from the environment. What
# lies in WORK stays and is not made again. Groups of 64: symmetric at 4 bits, with zero points at 3 and 2, for all.
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmarks/environment.sh
DATA=${1:?usage: learned.sh DATA MODEL [ROW...]}
MODEL=${2:?usage: learned.sh DATA MODEL [ROW...]}
shift 2
ROWS=${*:-solver refine tune distill qat aqlm}
BITS=${BITS:-4 3 2}
SAMPLES=${SAMPLES:-128}
WINDOWS=${WINDOWS:-60}
ITERS=${ITERS:-200}
PEER=${PEER:-.venv-autoround/bin/python}
LLMC=${LLMC:-.venv-bench/bin/python}
GPTQMODEL=${GPTQMODEL:-.venv-loaders-gptqmodel/bin/python}
WORK=${WORK:-bench-work/learned}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$WORK"
case $ROWS in *autoround*|*hqq*) [ -e "$PEER" ] || environment .venv-autoround auto-round==0.16.1 hqq==0.2.8 ;; esac
case $ROWS in *llmcompressor*) [ -e "$LLMC" ] || environment .venv-bench llmcompressor==0.14.0.1 ;; esac
case $ROWS in *autoround*|*llmcompressor*|*gptqmodel*) [ -e "$WORK/ids.safetensors" ] || "$PYTHON" \
  benchmarks/calibration_ids.py "$MODEL" "$DATA/wikitext2-valid.txt" "$WORK/ids.safetensors" --samples "$SAMPLES" ;;
esac
LABELS=()

measure() {  # label, command...
  LABELS+=("$1")
  [ -e "$WORK/$1" ] || "$PYTHON" benchmarks/measure.py "$WORK" "$@"
}
TEXT=(--calibration "$DATA/wikitext2-valid.txt" --samples "$SAMPLES" --sequence-length 512)
quantize() {  # label, bits, steps as YAML
  local symmetric=true
  [ "$2" -ge 4 ] || symmetric=false
  measure "$1" "$PYTHON" -m qtool quantize "$MODEL" --json --out "$WORK/$1" --method gptq --bits "$2" --group-size 64 \
    --set "scheme.symmetric=$symmetric" --set "steps=$3" "${TEXT[@]}"
}
SOLVER='{asymmetric: {share: 0.125}}, gptq'
for bits in $BITS; do
  zero=
  [ "$bits" -ge 4 ] || zero=--asymmetric
  for row in $ROWS; do
    case $row in
      solver) quantize "solver-$bits" "$bits" "[$SOLVER]" ;;
      refine) quantize "refine-$bits" "$bits" "[$SOLVER, refine]" ;;
      tune) quantize "tune-$bits" "$bits" "[$SOLVER, refine, tune]" ;;
      distill) quantize "distill-$bits" "$bits" "[$SOLVER, refine, distill]" ;;
      qat) quantize "qat-$bits" "$bits" "[$SOLVER, refine, {tune: {rounding: weights, epochs: 1}}, {distill: {rounding: weights, epochs: 2}}]" ;;
      aqlm) if [ "$bits" -lt 4 ]; then
              measure "aqlm-$bits" "$PYTHON" -m qtool quantize "$MODEL" --json --out "$WORK/aqlm-$bits" --method aqlm \
                --set "scheme.grid=aqlm-${bits}x8" --set "scheme.bits=$bits" "${TEXT[@]}"
            fi ;;
      best) measure "best-$bits" "$PYTHON" -m qtool quantize "$MODEL" --json --out "$WORK/best-$bits" \
              --method "${bits}bit-best" "${TEXT[@]}" ;;
      autoround) measure "autoround-$bits" "$PEER" benchmarks/peer_autoround.py "$MODEL" "$WORK/autoround-$bits" \
                   "$WORK/ids.safetensors" --bits "$bits" --iters "$ITERS" $zero ;;
      llmcompressor) measure "llmcompressor-$bits" "$LLMC" benchmarks/peer_llmcompressor.py "$MODEL" \
                       "$WORK/llmcompressor-$bits" "$WORK/ids.safetensors" --bits "$bits" --dense $zero ;;
      gptqmodel) measure "gptqmodel-$bits" "$GPTQMODEL" benchmarks/peer_gptqmodel.py "$MODEL" "$WORK/gptqmodel-$bits" \
                   "$WORK/ids.safetensors" --method gptq --bits "$bits" $zero ;;
      hqq) measure "hqq-$bits" "$PEER" benchmarks/peer_hqq.py "$MODEL" "$WORK/hqq-$bits" --bits "$bits" ;;
      *) echo "learned.sh: unknown row $row" >&2; exit 2 ;;
    esac
  done
done
"$PYTHON" benchmarks/side_by_side.py "$MODEL" "$DATA/wikitext2-test.txt" "$WORK/quality.json" "${LABELS[@]/#/$WORK/}" --windows "$WINDOWS"
"$PYTHON" benchmarks/measure.py "$WORK" --table "${LABELS[@]}"
