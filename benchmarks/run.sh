#!/usr/bin/env bash
# qtool beside llm-compressor on one model and one set of calibration ids, in one run.
#   bash benchmarks/run.sh DATA MODEL
# DATA holds wikitext2-valid.txt (calibration) and wikitext2-test.txt (evaluation); MODEL is a safetensors directory.
# SAMPLES and WINDOWS (environment) make a shorter run; the peer gets a venv of its own, .venv-bench.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?usage: make bench DATA=folder MODEL=directory}
MODEL=${2:?usage: make bench DATA=folder MODEL=directory}
SAMPLES=${SAMPLES:-128}
WINDOWS=${WINDOWS:-60}
WORK=bench-work
PEER=.venv-bench/bin/python
if [ ! -e .venv-bench/.ready ]; then
  python3 -m venv .venv-bench
  $PEER -m pip install -q torch==2.13.0 numpy
  $PEER -m pip install -q torch==2.13.0 llmcompressor==0.14.0.1
  touch .venv-bench/.ready
fi
mkdir -p "$WORK"
rm -rf "$WORK"/{peer,gptq,rtn}
.venv/bin/python benchmarks/calibration_ids.py "$MODEL" "$DATA/wikitext2-valid.txt" "$WORK/ids.safetensors" --samples "$SAMPLES"

measure() {  # label, command...: seconds and peak memory of the whole process
  local label=$1
  shift
  .venv/bin/python - "$label" "$@" <<'PY'
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[2:], check=True, stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"run": sys.argv[1], "seconds": round(time.perf_counter() - start, 1), "peak_rss_mb": round(peak)}))
PY
}

QUANTIZE=(.venv/bin/qtool quantize "$MODEL" --bits 4 --group-size 64 --quiet)
measure rtn "${QUANTIZE[@]}" --method rtn --out "$WORK/rtn"
measure gptq "${QUANTIZE[@]}" --method gptq --out "$WORK/gptq" --calibration "$DATA/wikitext2-valid.txt" \
  --samples "$SAMPLES" --sequence-length 512
measure llm-compressor "$PEER" benchmarks/peer_llmcompressor.py "$MODEL" "$WORK/peer" "$WORK/ids.safetensors"
for out in rtn gptq peer; do
  echo "== $out against the original"
  .venv/bin/qtool eval "$WORK/$out" --against "$MODEL" --text "$DATA/wikitext2-test.txt" --windows "$WINDOWS" \
    --context 1024 --json
done
