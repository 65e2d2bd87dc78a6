"""Runs in a venv with llama-cpp-python: loads GGUF files as its users do; writes the logits and how texts are split.

usage: read_with_llamacpp.py JOBS.json, a list of
{"model": .gguf file, "ids": token ids, "texts": texts to split, "out": safetensors file, "context": 64, "nll": false}
nll: write the negative log-likelihood of each token instead of the logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from safetensors.numpy import save_file


def main(jobs: list[dict]) -> None:
    for job in jobs:
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


def _nll(scores: np.ndarray, ids: list[int]) -> np.ndarray:
    shifted = scores.astype(np.float64) - scores.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return -shifted[np.arange(len(ids) - 1), ids[1:]]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
