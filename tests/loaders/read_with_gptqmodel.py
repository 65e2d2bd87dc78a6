"""Runs in a venv with GPTQModel: loads checkpoints with it on the CPU, writes the logits and the weights it decoded.

usage: read_with_gptqmodel.py JOBS.json, a list of {"model": folder, "ids": token ids, "out": safetensors file,
"format": "gptq" or "awq"}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default fails on two cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel would compile a kernel for every shape
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main(jobs: list[dict]) -> None:
    from gptqmodel import BACKEND, GPTQModel

    for job in jobs:
        backend = BACKEND.AWQ_TORCH if job.get("format") == "awq" else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(job["model"], device="cpu", dtype=torch.float16, backend=backend).model
        weights = {f"{name}.weight": module.dequantize_weight().T.contiguous()  # float16 [N, K]
                   for name, module in model.named_modules() if hasattr(module, "dequantize_weight")
                   and job.get("format") != "awq"}
        with torch.no_grad():
            logits = model(torch.tensor([job["ids"]])).logits[0].float()
        kinds = sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__})
        save_file({"logits": logits.contiguous(), **weights}, job["out"], {"modules": " ".join(kinds)})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
