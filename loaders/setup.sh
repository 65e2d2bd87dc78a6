#!/usr/bin/env bash
# Makes the virtual environments of `make test-loaders`: .venv-loaders-<name> for every loaders/<name>.txt.
# Each is made once, and again when its list changes. With names as arguments, only those.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

for list in loaders/*.txt; do
    name="$(basename "$list" .txt)"
    if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
    venv=".venv-loaders-$name"
    if cmp -s "$list" "$venv/.ready"; then continue; fi
    echo "loaders: making $venv"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    # torch first and pinned: otherwise pip fetches another build of it
    if ! grep -qx "# without torch" "$list"; then
        "$venv/bin/python" -m pip install -q torch==2.13.0 setuptools wheel -c constraints.txt
    fi
    options=()
    if grep -qx "# with openblas" "$list"; then
        # ggml's own products round their inputs to 8 bits; OpenBLAS's take float32. PyPI's build prefixes its symbols.
        # Not for this processor: with AMX, ggml takes other paths, and one of them crashes (general protection fault).
        "$venv/bin/python" -m pip install -q --no-deps "$(grep '^scipy-openblas32==' "$list")"
        blas="$("$venv/bin/python" -c 'import scipy_openblas32; print(scipy_openblas32.__path__[0])')"
        export CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=Generic -DBLAS_LIBRARIES=$blas/lib/libscipy_openblas.so \
-DBLAS_INCLUDE_DIRS=$blas/include -DCMAKE_CXX_FLAGS=-Dcblas_sgemm=scipy_cblas_sgemm -DGGML_CPU_REPACK=OFF -DGGML_NATIVE=OFF"
        options=(--no-cache-dir)  # not a wheel that was built without these arguments
    fi
    "$venv/bin/python" -m pip install -q --no-deps "${options[@]}" -r "$list"
    cp "$list" "$venv/.ready"
done
