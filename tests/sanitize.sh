#!/usr/bin/env bash
# The native ops under AddressSanitizer and UndefinedBehaviorSanitizer: a build of its own beside a copy of the package in
# build/sanitize; then the tests of the ops, calls of them with wrong arguments, and small models quantized, decoded and
# run. The first fault ends it. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$PYTHON")
place=$PWD/build/sanitize
mkdir -p "$place"
"$python" setup.py -q build_ext --sanitize --build-lib "$place/made" --build-temp "$place/objects"
rm -rf "$place/copy" && mkdir "$place/copy"
cp -r qtool tests recipes kernels_cuda setup.py pyproject.toml "$place/copy"
rm -f "$place"/copy/qtool/_native*.so && cp "$place"/made/qtool/_native*.so "$place/copy/qtool/"
cd "$place/copy"
compiler=${CXX:-g++}
# libstdc++ too: the sanitizer looks for its exceptions before Python has loaded it
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $(realpath "$($compiler -print-file-name=libstdc++.so.6)")"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
"$python" -c "from qtool import ops; print(ops.backend())"
"$python" -m tests.ops.raw_calls 2 "${CALLS:-3800}" 2> "$place/calls" || { tail -n 60 "$place/calls"; exit 1; }
"$python" -m pytest -q -x -p no:cacheprovider tests/ops tests/runtime/test_decoder.py tests/formats/test_gguf_blocks.py \
  tests/cli/test_quantizing.py --ignore tests/ops/test_cuda_emulated.py --ignore tests/ops/test_raw_calls.py \
  --deselect tests/ops/test_library.py::test_a_library_that_does_not_load_leaves_the_reference \
  --deselect tests/ops/test_library.py::test_installing_without_a_compiler_succeeds
