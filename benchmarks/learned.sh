#!/usr/bin/env bash
# What learning adds at each width, on one model: the rows of benchmarks/results/learned.md.
#   bash benchmarks/learned.sh DATA MODEL [ROW...]     rows: solver refine tune distill qat aqlm (all)
# DATA and MODEL: see run.sh. BITS (4 3 2), SAMPLES and WINDOWS are read from the environment. What lies in WORK stays and
# is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?usage: learned.sh DATA MODEL [ROW...]}
MODEL=${2:?usage: learned.sh DATA MODEL [ROW...]}
shift 2
ROWS=${*:-solver refine tune distill qat aqlm}
BITS=${BITS:-4 3 2}
SAMPLES=${SAMPLES:-128}
WINDOWS=${WINDOWS:-60}
WORK=${WORK:-bench-work/learned}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$WORK"
LABELS=()

measure() {  # label, command...
  LABELS+=("$1")
  [ -e "$WORK/$1" ] || "$PYTHON" benchmarks/measure.py "$WORK" "$@"
}
quantize() {  # label, bits, steps as YAML
  measure "$1" "$PYTHON" -m qtool quantize "$MODEL" --json --out "$WORK/$1" --method gptq --bits "$2" --group-size 64 \
    --calibration "$DATA/wikitext2-valid.txt" --samples "$SAMPLES" --sequence-length 512 --set "steps=$3"
}
SOLVER='{asymmetric: {share: 0.125}}, gptq'
for bits in $BITS; do
  for row in $ROWS; do
    case $row in
      solver) quantize "solver-$bits" "$bits" "[$SOLVER]" ;;
      refine) quantize "refine-$bits" "$bits" "[$SOLVER, refine]" ;;
      tune) quantize "tune-$bits" "$bits" "[$SOLVER, refine, tune]" ;;
      distill) quantize "distill-$bits" "$bits" "[$SOLVER, refine, distill]" ;;
      qat) quantize "qat-$bits" "$bits" "[$SOLVER, refine, {tune: {rounding: weights, epochs: 1}}, {distill: {rounding: weights, epochs: 2}}]" ;;
      aqlm) if [ "$bits" -lt 4 ]; then
              measure "aqlm-$bits" "$PYTHON" -m qtool quantize "$MODEL" --json --out "$WORK/aqlm-$bits" --method aqlm \
                --set "scheme.grid=aqlm-${bits}x8" --set "scheme.bits=$bits" --calibration "$DATA/wikitext2-valid.txt" \
                --samples "$SAMPLES" --sequence-length 512
            fi ;;
      *) echo "learned.sh: unknown row $row" >&2; exit 2 ;;
    esac
  done
done
"$PYTHON" benchmarks/side_by_side.py "$MODEL" "$DATA/wikitext2-test.txt" "$WORK/quality.json" "${LABELS[@]/#/$WORK/}" --windows "$WINDOWS"
"$PYTHON" benchmarks/measure.py "$WORK" --table "${LABELS[@]}"
