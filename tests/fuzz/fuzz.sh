#!/usr/bin/env bash
# tests/fuzz/fuzz.sh SECONDS [NAME ...]: each target (of those named) for so many seconds, with the interpreter $PYTHON.
# What was found, and what crashed, lies in build/fuzz/NAME.
set -uo pipefail
cd "$(dirname "$0")/../.."
seconds=$1; shift
if [ $# -gt 0 ]; then names=("$@"); else mapfile -t names < <("$PYTHON" -m tests.fuzz.run); fi
export OMP_NUM_THREADS=1
failed=()
for name in "${names[@]}"; do
  found=build/fuzz/$name
  mkdir -p "$found/inputs"
  options=(-max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -malloc_limit_mb=2048 -max_len=65536)
  [ ! -f "tests/fuzz/dictionaries/$name.txt" ] || options+=(-dict="tests/fuzz/dictionaries/$name.txt")
  if "$PYTHON" -m tests.fuzz.run "$name" "${options[@]}" -artifact_prefix="$found/" "$found/inputs" \
      "tests/fuzz/corpus/$name" > "$found/log" 2>&1; then
    echo "$name: $(grep -aoE 'Done [0-9]+ runs in [0-9]+ second' "$found/log")"
  else
    failed+=("$name")
    echo "$name: failed; $found/log ends with"
    tail -n 25 "$found/log"
  fi
done
[ ${#failed[@]} -eq 0 ] || { echo "findings: ${failed[*]}"; exit 1; }
