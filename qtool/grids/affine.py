"""Affine integers of 2 to 8 bits: value = (code - zero point) * scale, one scale per group of input columns.

Symmetric grids have their zero point at 2^(bits-1). Their range is one step longer on one side; a negative scale
puts the longer side where the larger weight is (full-range symmetric, frontier: llama.cpp does the same).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qtool import ops
from qtool.grids._levels import shared_refusal
from qtool.recipe import Scheme
from qtool.tensors import NO_CODES, QuantizedTensor

JOINT = True  # linears that share their input may be fitted as one stacked matrix
FREE_SCALES = True  # any value of the stored dtype is a scale


def check(scheme: Scheme) -> str | None:
    """Why the scheme cannot be an affine grid, or None."""
    if scheme.double_quant:
        return "affine grids keep their scales as they are; leave --double-quant out (it is for nf4 and fp4)"
    if scheme.strategy:
        return shared_refusal("affine")
    return None if 2 <= scheme.bits <= 8 else f"affine grids have 2 to 8 bits, not {scheme.bits}"


def reach(scheme: Scheme, scale_dtype: torch.dtype) -> float:
    """The largest |weight| that the largest scale leaves representable."""
    return float(torch.finfo(scale_dtype).max) * 2.0 ** (scheme.bits - 1)


def fit(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor | None = None,
        shrink_steps: int = 1, signed: bool = False, rounds: int = 0) -> QuantizedTensor:
    """Scale and zero point of each group of weight [N, K]; the codes are still to be chosen.

    shrink_steps = 1 and rounds = 0 is the plain absmax (min-max) grid; more steps search over a shrunken range and
    the zero point for the least error weighted by `importance` [K], rounds refit the scale in closed form.
    """
    columns = weight.shape[1]
    group = width(scheme, columns)
    importance = torch.ones(columns, device=weight.device) if importance is None else importance
    scale, zero_point = ops.fit_affine(weight, importance, group, scheme.bits, scheme.symmetric, scale_dtype,
                                       shrink_steps=shrink_steps, signed=signed, rounds=rounds)
    return QuantizedTensor(NO_CODES, scale.to(scale_dtype), zero_point, scheme.bits, group, scheme.symmetric,
                           activations=scheme.activations is not None)


def encode(weight: torch.Tensor, fitted: QuantizedTensor) -> QuantizedTensor:
    """Every weight [N, K] at the nearest grid value."""
    codes = ops.round_affine(weight, fitted.scale.float(), fitted.zero_point, fitted.group_size, fitted.bits)
    return replace(fitted, codes=codes)


def decode(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [N, K]."""
    return ops.dequantize_affine(tensor.codes, tensor.scale.float(), tensor.zero_point, tensor.group_size)


def steps(codes: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """What codes [N, any] of one group stand for, in units of its scale: float32. zero_point: [N, 1]."""
    return codes.float() - zero_point.float()


def solve_columns(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, fitted: QuantizedTensor,
                  group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.solve_columns."""
    return ops.solve_columns(weight, shift, factor, fitted.scale.float(), fitted.zero_point, group_index, fitted.bits)


def refine_columns(gradient: torch.Tensor, hessian: torch.Tensor, part: QuantizedTensor,
                   group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.refine_columns."""
    return ops.refine_columns(gradient, hessian, part.codes, part.scale.float(), part.zero_point, group_index,
                              part.bits)


def width(scheme: Scheme, columns: int) -> int:
    """Columns per group; -1 is one group per row."""
    return columns if scheme.group_size == -1 else int(scheme.group_size)
