"""Affine integers of 2 to 8 bits: value = (code - zero point) * scale, one scale per group of input columns.

Symmetric grids have their zero point at 2^(bits-1). Their range is one step longer on one side; a negative scale
puts the longer side where the larger weight is (full-range symmetric, frontier: llama.cpp does the same).
"""

from __future__ import annotations

import torch

from qtool import ops
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor


def check(scheme: Scheme) -> str | None:
    """Why the scheme cannot be an affine grid, or None."""
    return None if 2 <= scheme.bits <= 8 else f"affine grids have 2 to 8 bits, not {scheme.bits}"


def fit(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor | None = None,
        shrink_steps: int = 1, signed: bool = False, rounds: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32 [N, G], values of scale_dtype) and zero point (uint8 [N, G]) of each group.

    shrink_steps = 1 and rounds = 0 is the plain absmax (min-max) grid; more steps search over a shrunken range and
    the zero point for the least error weighted by `importance` [K], rounds refit the scale in closed form.
    """
    columns = weight.shape[1]
    importance = torch.ones(columns, device=weight.device) if importance is None else importance
    return ops.fit_affine(weight, importance, width(scheme, columns), scheme.bits, scheme.symmetric, scale_dtype,
                          shrink_steps=shrink_steps, signed=signed, rounds=rounds)


def encode(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, scale: torch.Tensor,
           zero_point: torch.Tensor) -> QuantizedTensor:
    """Every weight [N, K] at the nearest grid value."""
    group = width(scheme, weight.shape[1])
    codes = ops.round_affine(weight, scale, zero_point, group, scheme.bits)
    return QuantizedTensor(codes, scale.to(scale_dtype), zero_point, scheme.bits, group, scheme.symmetric)


def decode(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [N, K]."""
    return ops.dequantize_affine(tensor.codes, tensor.scale.float(), tensor.zero_point, tensor.group_size)


def width(scheme: Scheme, columns: int) -> int:
    """Columns per group; -1 is one group per row."""
    return columns if scheme.group_size == -1 else int(scheme.group_size)
