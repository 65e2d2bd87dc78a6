"""What the tests of the formats share: random quantized weights, and a checkpoint that lives in a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor, TensorSpec

NAME = "model.layers.0.self_attn.q_proj"


def random_tensor(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype, seed: int = 0) -> QuantizedTensor:
    """Codes anywhere in their range and scales of both signs, as the solvers may return them."""
    generator = torch.Generator().manual_seed(seed)
    group = columns if scheme.group_size == -1 else int(scheme.group_size)
    shape, top = (rows, columns // group), 1 << scheme.bits
    codes = torch.randint(0, top, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = ((torch.rand(shape, generator=generator) + 0.05) * torch.randn(shape, generator=generator).sign()).to(dtype)
    zeros = torch.full(shape, top // 2, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)
    return QuantizedTensor(codes, scale, zeros, scheme.bits, group, scheme.symmetric)


def dense(tensor: QuantizedTensor) -> torch.Tensor:
    """The formula of the specification, group by group."""
    rows, columns = tensor.codes.shape
    result = torch.empty(rows, columns)
    for group in range(tensor.scale.shape[1]):
        run = slice(group * tensor.group_size, (group + 1) * tensor.group_size)
        centred = tensor.codes[:, run].float() - tensor.zero_point[:, group, None].float()
        result[:, run] = centred * tensor.scale[:, group, None].float()
    return result


@dataclass
class InMemory:
    """A Checkpoint whose tensors are in a dictionary."""

    tensors: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)
    directory: Path = Path("nowhere")
    origin: str = "in memory"
    name: str = "memory"
    kind: str = "safetensors"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape))
                for name, tensor in sorted(self.tensors.items())}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]

    def companions(self) -> list[Path]:
        return []

    def hashes(self) -> dict[str, str]:
        return {"model.safetensors": "0" * 64}

    def close(self) -> None:
        self.tensors = {}
