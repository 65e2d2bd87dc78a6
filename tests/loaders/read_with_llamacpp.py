"""Runs in a venv with llama-cpp-python: loads GGUF files as its users do; writes the logits and how texts are split.

usage: read_with_llamacpp.py JOBS.json, a list of
{"model": .gguf file, "ids": token ids, "texts": texts to split, "out": safetensors file, "context": 64, "nll": false}
nll: write the negative log-likelihood of each token instead of the logits. A job
{"blocks": safetensors file of uint8 tensors named after types, "out": safetensors file} decodes blocks with ggml.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import scipy_openblas32
from safetensors.numpy import load_file, save_file

# ggml's BLAS library wants it by its name only
ctypes.CDLL(str(Path(scipy_openblas32.get_lib_dir()) / "libscipy_openblas.so"), ctypes.RTLD_GLOBAL)
import llama_cpp  # noqa: E402
from llama_cpp import GGML_TYPE_F32, Llama  # noqa: E402

TERNARY = {"tq1_0": 34, "tq2_0": 35}  # types that the Python package has no constants for


def main(jobs: list[dict]) -> None:
    for job in jobs:
        if "blocks" in job:
            save_file({name: _decoded(name, packed) for name, packed in load_file(job["blocks"]).items()}, job["out"])
            continue
        model = Llama(job["model"], n_ctx=job.get("context", 64), logits_all=True, verbose=False, n_threads=2,
                      type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False)
        model.eval(job["ids"])
        scores = np.array(model.scores[:len(job["ids"])], dtype=np.float32)
        answer = {"nll": _nll(scores, job["ids"])} if job.get("nll") else {"logits": scores}
        for index, text in enumerate(job.get("texts", [])):
            answer[f"text {index}"] = np.array(model.tokenize(text.encode(), add_bos=True, special=True), np.int64)
        pieces = [model.detokenize(answer[name].tolist(), special=True) for name in answer if name.startswith("text")]
        save_file(answer, job["out"], {"pieces": json.dumps([piece.decode() for piece in pieces])})
        model.close()


def _decoded(name: str, packed: np.ndarray) -> np.ndarray:
    """float32 values of the blocks of a type, by ggml's own dequantize_row_*."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    kind = TERNARY[name] if name in TERNARY else getattr(llama_cpp, f"GGML_TYPE_{name.upper()}")
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    packed = np.ascontiguousarray(packed)
    count = packed.size // library.ggml_type_size(kind) * library.ggml_blck_size(kind)
    values = np.empty(count, np.float32)
    decode = getattr(library, f"dequantize_row_{name.removesuffix('_k') + '_K' if name.endswith('_k') else name}")
    decode(packed.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(count))
    return values


def _nll(scores: np.ndarray, ids: list[int]) -> np.ndarray:
    shifted = scores.astype(np.float64) - scores.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return -shifted[np.arange(len(ids) - 1), ids[1:]]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
