"""Fake quantization: what a format would store, as a function that autograd can follow.

Values that the format rounds (a scale in float16, a gain in bfloat16) are rounded in the forward pass and have the
slope of the identity (straight-through estimator, arXiv 1308.3432). Roundings to a grid too; the slope in the scale is
that of LSQ (arXiv 1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from qtool import found
from qtool.tensors import QuantizedTensor

Values = Mapping[str, torch.Tensor]
SCALE, SCALES = "scale", ("scale", "scales")


def learnable(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """What the format stores of a linear as real numbers and lets be any number, by name, as float32; may be empty."""
    grid = found.load("grids", tensor.grid)
    if hasattr(grid, "learnable"):
        own: dict[str, torch.Tensor] = grid.learnable(tensor)
        return own
    free = grid.FREE_SCALES and tensor.strategy is None and not tensor.parts and tensor.offset is None
    return {SCALE: tensor.scale.float()} if free else {}


def stored(tensor: QuantizedTensor, values: Values) -> QuantizedTensor:
    """With these values, rounded as the format rounds them; the codes stay."""
    grid = found.load("grids", tensor.grid)
    if hasattr(grid, "stored"):
        made: QuantizedTensor = grid.stored(tensor, values)
        return made
    return replace(tensor, scale=values[SCALE].to(tensor.scale.dtype)) if values else tensor


def dense(tensor: QuantizedTensor, values: Values) -> torch.Tensor:
    """float32 [N, K]: the weight that stays when these values are stored, differentiable in them."""
    grid = found.load("grids", tensor.grid)
    if hasattr(grid, "smooth"):
        held = grid.learnable(grid.stored(tensor, values))
        made: torch.Tensor = grid.smooth(tensor, {what: value + (held[what] - value).detach()
                                                  for what, value in values.items()})
        return made
    return FixedCodes.apply(values[SCALE], tensor, grid) if values else grid.decode(tensor)


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The value as `dtype` holds it, in float32, with the slope of the identity."""
    return value + (value.detach().to(dtype).float() - value.detach())


def step_units(tensor: QuantizedTensor, grid: ModuleType) -> torch.Tensor:
    """What the codes stand for, in units of their scales: float32 [N, K]."""
    return grid.steps(tensor.codes, tensor.zero_point.repeat_interleave(tensor.group_size, 1))


def by_group(tensor: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] -> [N, G, group size]."""
    return tensor.reshape(len(tensor), -1, group_size)


class FixedCodes(torch.autograd.Function):
    """(scale [N, G], codes) -> decoded weight [N, K], linear in the scales as they are stored."""

    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor, tensor: QuantizedTensor, grid: ModuleType) -> torch.Tensor:
        ctx.tensor, ctx.grid = tensor, grid
        return grid.decode(replace(tensor, scale=scale.to(tensor.scale.dtype)))

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        products = slope * step_units(ctx.tensor, ctx.grid)
        return by_group(products, ctx.tensor.group_size).sum(-1), None, None


class Rounded(torch.autograd.Function):
    """(scale [N, G], latent weight [N, K]) -> the latent weight at the nearest grid value.

    The slope in the weight is 1 where it is in the range of the grid, 0 outside. The slope in the scale is q - w/s
    inside and q outside, with q the value in steps, times LSQ's 1 / sqrt(weights in the group * largest step).
    """

    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor, latent: torch.Tensor, tensor: QuantizedTensor,
                grid: ModuleType) -> torch.Tensor:
        ctx.tensor, ctx.grid = encoded(scale, latent, tensor, grid), grid
        ctx.save_for_backward(latent)
        return grid.decode(ctx.tensor)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        tensor, (latent,) = ctx.tensor, ctx.saved_tensors
        steps, group = step_units(tensor, ctx.grid), tensor.group_size
        quotient = latent / tensor.scale.float().repeat_interleave(group, 1)
        low, high = ends(tensor, ctx.grid)
        inside = (by_group(quotient, group) >= low) & (by_group(quotient, group) <= high)
        inside = inside.reshape(quotient.shape)
        products = by_group(slope * (steps - quotient * inside), group).sum(-1)
        return products / math.sqrt(group * float(high.abs().max())), slope * inside, None, None


def encoded(scale: torch.Tensor, latent: torch.Tensor, tensor: QuantizedTensor, grid: ModuleType) -> QuantizedTensor:
    """The codes of a latent weight [N, K] with this scale, which is rounded to its stored dtype."""
    made: QuantizedTensor = grid.encode(latent, replace(tensor, scale=scale.to(tensor.scale.dtype)))
    return made


def ends(tensor: QuantizedTensor, grid: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value in steps that a weight may have without being cut off: float32 [N, G, 1] each.

    Half a step beyond the outermost levels, as what lies there is still nearest to them.
    """
    levels = grid_levels(tensor, grid)
    low, high = levels[..., :1], levels[..., -1:]
    return low - (levels[..., 1:2] - low) / 2, high + (high - levels[..., -2:-1]) / 2


def grid_levels(tensor: QuantizedTensor, grid: ModuleType) -> torch.Tensor:
    """The values of all codes in steps, ascending: float32 [N, G, 2^bits] or [1, 1, L]."""
    if hasattr(grid, "GRID"):
        return grid.GRID.levels.to(tensor.scale.device)[None, None]
    codes = torch.arange(2**tensor.bits, dtype=torch.uint8, device=tensor.scale.device)
    return codes.float() - tensor.zero_point.float()[..., None]


def latent(weight: torch.Tensor, tensor: QuantizedTensor, grid: ModuleType, margin: float = 0.05) -> torch.Tensor:
    """float32 [N, K]: nearest to `weight` among the values that the codes of `tensor` are nearest to.

    margin: how far to stay from the edge of a code's cell, as a share of the way to the next level.
    """
    levels, group = grid_levels(tensor, grid), tensor.group_size
    steps = by_group(step_units(tensor, grid), group)
    levels = levels.expand(*tensor.scale.shape, levels.shape[-1])
    place = torch.searchsorted(levels.contiguous(), steps.contiguous()).clamp_max(levels.shape[-1] - 1)
    before = levels.gather(-1, (place - 1).clamp_min(0))
    after = levels.gather(-1, (place + 1).clamp_max(levels.shape[-1] - 1))
    outer = place == levels.shape[-1] - 1
    low = torch.where(place == 0, -torch.inf, steps - (0.5 - margin) * (steps - before))
    high = torch.where(outer, torch.inf, steps + (0.5 - margin) * (after - steps))
    scale = tensor.scale.float()[..., None]
    quotient = by_group(weight, group) / torch.where(scale == 0, 1.0, scale)
    low, high = low.clamp_min(ends(tensor, grid)[0]), high.clamp_max(ends(tensor, grid)[1])
    return (torch.minimum(torch.maximum(quotient, low), high) * scale).reshape(weight.shape)
