#!/usr/bin/env bash
# GGUF beside llama.cpp's quantizer, both with the same text: files, sizes, times, quality.
#   bash benchmarks/formats.sh DATA MODEL [TYPE...]      types: q2_k q3_k_m q4_k_m q5_k_m q4_0 iq4_xs (all)
# DATA: folder with the WikiText-2 files. MODEL: a directory whose rows are multiples of 256, so that K-quants apply.
# LLAMACPP names the Python that has llama-cpp-python. SAMPLES x 512 tokens calibrate both; WINDOWS evaluate.
# Plain conversion is measured from the same input both ways: from a BF16 GGUF file (plain-gguf and llama.cpp-plain), and,
# where CONVERT names llama.cpp's convert_hf_to_gguf.py, from safetensors (plain and llama.cpp-whole). PLAIN=1: that only.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?usage: formats.sh DATA MODEL [TYPE...]}
MODEL=${2:?usage: formats.sh DATA MODEL [TYPE...]}
shift 2
TYPES=${*:-q2_k q3_k_m q4_k_m q5_k_m q4_0 iq4_xs}
SAMPLES=${SAMPLES:-128}
WINDOWS=${WINDOWS:-20}
WORK=${WORK:-bench-work}
LLAMACPP=${LLAMACPP:-.venv-loaders-llamacpp/bin/python}
PYTHON=.venv/bin/python
CONVERT=${CONVERT:-}
PLAIN=${PLAIN:-}
mkdir -p "$WORK"
"$PYTHON" benchmarks/calibration_ids.py "$MODEL" "$DATA/wikitext2-valid.txt" "$WORK/ids.safetensors" --samples "$SAMPLES"
[ -f "$WORK/imatrix.gguf" ] || "$PYTHON" benchmarks/imatrix.py "$MODEL" "$WORK/ids.safetensors" "$WORK/imatrix"
[ -f "$WORK/bf16.gguf" ] || "$PYTHON" -m qtool export "$MODEL" --to gguf --type bf16 --out "$WORK/bf16.gguf" --quiet
measure() {  # label, command...
  "$PYTHON" benchmarks/measure.py "$WORK" "$@"
}
for type in $TYPES; do
  rm -rf "${WORK:?}/qtool-$type" "${WORK:?}/llama.cpp-$type" "${WORK:?}/plain-$type" "${WORK:?}/llama.cpp-plain-$type"
  mkdir -p "$WORK/llama.cpp-$type" "$WORK/plain-$type" "$WORK/llama.cpp-plain-$type"
  measure "plain-$type" "$PYTHON" -m qtool export "$MODEL" --to gguf --type "$type" --out "$WORK/plain-$type/m.gguf" --json
  rm -rf "${WORK:?}/plain-gguf-$type" "${WORK:?}/llama.cpp-whole-$type"
  mkdir -p "$WORK/plain-gguf-$type" "$WORK/llama.cpp-whole-$type"
  measure "plain-gguf-$type" "$PYTHON" -m qtool export "$WORK/bf16.gguf" --to gguf --type "$type" \
    --out "$WORK/plain-gguf-$type/m.gguf" --json
  if [ -n "$CONVERT" ]; then  # two processes, as its users run it; what is between them counts
    measure "llama.cpp-whole-$type" bash -c '"$1" "$2" "$3" --outtype bf16 --outfile "$4/m-bf16.gguf" >&2 &&
      "$5" benchmarks/peer_llamacpp.py "$4/m-bf16.gguf" "$4/m.gguf" "$6"' whole "$PYTHON" "$CONVERT" "$MODEL" \
      "$WORK/llama.cpp-whole-$type" "$LLAMACPP" "$type"
    rm "$WORK/llama.cpp-whole-$type/m-bf16.gguf"
  fi
  measure "llama.cpp-plain-$type" "$LLAMACPP" benchmarks/peer_llamacpp.py "$WORK/bf16.gguf" "$WORK/llama.cpp-plain-$type/m.gguf" "$type"
  if [ -n "$PLAIN" ]; then continue; fi
  measure "llama.cpp-$type" "$LLAMACPP" benchmarks/peer_llamacpp.py "$WORK/bf16.gguf" "$WORK/llama.cpp-$type/m.gguf" "$type" \
    --imatrix "$WORK/imatrix.safetensors"
  measure "qtool-$type" "$PYTHON" -m qtool quantize "$MODEL" --method "$type" --out "$WORK/qtool-$type" --json \
    --calibration "$DATA/wikitext2-valid.txt" --samples "$SAMPLES" --sequence-length 512
  "$PYTHON" benchmarks/side_by_side.py "$MODEL" "$DATA/wikitext2-test.txt" "$WORK/quality-$type.json" \
    "$WORK/qtool-$type" "$WORK/llama.cpp-$type" "$WORK/plain-$type" --windows "$WINDOWS"  # all of them are in memory
done
ls -l "$WORK"/*/*.gguf
if [ -n "$PLAIN" ]; then exit; fi
for type in $TYPES; do cat "$WORK/quality-$type.json"; done
