"""A tiny checkpoint with its skeleton and weights, and the pieces that most tests start from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qtool.models import blocks, skeleton, streams
from qtool.tensors import TensorSpec

CPU = torch.device("cpu")
SAMPLES, LENGTH = 5, 24


def specs_of(weights: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


@dataclass
class Loaded:
    """A tiny checkpoint, and the pieces that most tests start from, in float32 unless said otherwise."""

    directory: Path
    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    skeleton: skeleton.Skeleton

    def read(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def store(self) -> streams.StreamStore:
        return streams.StreamStore(SAMPLES, LENGTH, self.skeleton.hidden, torch.float32, 1 << 30)

    def captured(self, ids: torch.Tensor, batches: list[slice],
                 dtype: torch.dtype = torch.float32) -> tuple[streams.StreamStore, blocks.BlockArguments]:
        store = self.store()
        return store, blocks.capture(self.skeleton, self.read, ids, store, CPU, dtype, batches)

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return blocks.load_block(self.skeleton, index, self.read, CPU, dtype)

    def full_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()


def open_tiny(directory: Path) -> Loaded:
    weights = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    return Loaded(directory, weights, config, skeleton.build(directory, config, specs_of(weights)))
