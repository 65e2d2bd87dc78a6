#!/usr/bin/env bash
# Predicted and measured memory, time and bytes of each method: benchmarks/preflight.py with sizes that take minutes.
#   bash benchmarks/preflight.sh MODEL [METHOD...]       on an idle machine
# SAMPLES (128): calibration sequences.  WORK (bench-work/preflight): where the outputs go before they are removed.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${1:?usage: preflight.sh MODEL [METHOD...]}
shift
METHODS=${*:-rtn:scheme.group_size=64 gptq:scheme.group_size=64 awq:scheme.group_size=64 q4_k_m nf4 fp8}
# shellcheck disable=SC2086 - words are wanted
exec .venv/bin/python benchmarks/preflight.py "$MODEL" "${WORK:-bench-work/preflight}" $METHODS \
  --options "--samples ${SAMPLES:-128}"
