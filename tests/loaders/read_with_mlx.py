"""Runs in a venv with mlx-lm: loads checkpoints on the CPU and writes the logits of some tokens, and how it goes on.

usage: read_with_mlx.py JOBS.json, a list of
{"model": folder, "source": what mlx-lm makes it of, if it is not there yet, "ids": token ids, "out": safetensors file,
"dtype": of the tokens' embeddings, "tokens": how many are generated}
With inputs in float32, mlx takes all products and sums in float32, whatever the type of the scales.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import convert
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model
from safetensors.numpy import save_file


def logits_of(model: nn.Module, ids: list[int]) -> np.ndarray:
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def main(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        if "source" in job:
            convert(job["source"], job["model"], quantize=True, q_bits=4, q_group_size=32, dtype="float32")
        model, _ = load_model(Path(job["model"]))
        kinds = sorted({type(module).__name__ for _, module in model.named_modules()})
        if job.get("dtype", "float32") == "float32":  # what is not quantized; scales stay as they are stored
            quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
            for _, module in model.named_modules():
                if not isinstance(module, quantized) and "weight" in module:
                    module.weight = module.weight.astype(mx.float32)
                if "bias" in module:
                    module.bias = module.bias.astype(mx.float32)
        ids = list(job["ids"])
        answer = {"logits": logits_of(model, ids)}
        for _ in range(job.get("tokens", 0)):
            ids.append(int(logits_of(model, ids)[-1].argmax()))
        save_file(answer | {"tokens": np.array(ids[len(job["ids"]):], dtype=np.int64)}, job["out"],
                  {"modules": " ".join(kinds)})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
