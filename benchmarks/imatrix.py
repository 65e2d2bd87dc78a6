"""The importance matrix of a model on given token ids: for llama.cpp, so that it sees the text that qtool sees.

    python imatrix.py MODEL IDS.safetensors OUT    writes OUT.gguf (llama.cpp's file) and OUT.safetensors (the means)

The output head has no entry, as llama-imatrix leaves it out unless told otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtool.checkpoint.gguf_families import gguf_name, written_as
from qtool.checkpoint.imatrix import write_imatrix


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "ids", "out"):
        parser.add_argument(name)
    given = parser.parse_args()
    ids = load_file(given.ids)["ids"]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    family = written_as(model.config.model_type)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            square = inputs[0].reshape(-1, inputs[0].shape[-1]).square().sum(0, dtype=torch.float64)
            sums[name] = sums.get(name, torch.zeros_like(square)) + square

        return add

    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(str(gguf_name(f"model.{name}.weight", family)[0])))  # type: ignore[arg-type,index]
    with torch.inference_mode():
        for row in ids:
            model.model(row[None].long())
    means = {name: (total / ids.numel()).float() for name, total in sums.items()}
    save_file(means, given.out + ".safetensors")
    counts = torch.tensor([float(ids.numel())])
    write_imatrix(Path(given.out + ".gguf"), {name: (mean[None], counts) for name, mean in means.items()}, ["text"],
                  len(ids), ids.shape[1])


if __name__ == "__main__":
    main()
