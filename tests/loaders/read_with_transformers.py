"""Runs in any venv with transformers: loads checkpoints as its users do and writes the logits.

usage: read_with_transformers.py JOBS.json, a list of
{"model": folder, "ids": token ids, "out": safetensors file, "dtype": "float32", "dequantize": false}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # GPTQModel's own default fails on two cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel would compile a kernel for every shape
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # threads of aqlm's kernel for CPUs add to the same sums at one time

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main(jobs: list[dict]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for job in jobs:
        settings = {}
        if job.get("dequantize"):
            from transformers import CompressedTensorsConfig

            settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=getattr(torch, job.get("dtype", "float32")), **settings)
        assert AutoTokenizer.from_pretrained(job["model"]).encode("Hello")
        weights = four_bit_weights(model)
        logits = logits_of(model, job["ids"])
        kinds = sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__})
        save_file({**logits, **weights}, job["out"], {"modules": " ".join(kinds)})


def logits_of(model: torch.nn.Module, ids: list[int]) -> dict[str, torch.Tensor]:
    """`logits`; and `packed.logits`, if bitsandbytes has a kernel of its own for this processor (AVX512-BF16), for
    which the first product packs the codes anew and rounds the scales of the blocks to bfloat16."""
    packing = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    answers = {}
    for name in ("logits", "packed.logits") if packing else ("logits",):
        for module in packing:
            module.support_avx512bf16_for_cpu = name == "packed.logits"
        with torch.no_grad():
            answers[name] = model(torch.tensor([ids])).logits[0].float().contiguous()
    return answers


def four_bit_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What bitsandbytes makes of its own linears: name.weight -> dense."""
    states = {f"{name}.weight": module.weight for name, module in model.named_modules()
              if type(module).__name__ == "Linear4bit"}
    if not states:
        return {}
    from bitsandbytes.functional import dequantize_4bit

    return {name: dequantize_4bit(weight.data, weight.quant_state).contiguous() for name, weight in states.items()}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
