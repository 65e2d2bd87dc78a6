"""Pure-torch versions of the ops on grids of levels; see reference.py."""

from __future__ import annotations

import torch

from qtool.ops.checks import SCALE_TYPES
from qtool.ops.reference import Pair, _float32, _wide
from qtool.ops.reference import stored as natural


def stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest value that dtype has, never zero and never infinite; float32. The 8-bit types have no sign."""
    size = scale.abs()
    if dtype is torch.float8_e8m0fnu:
        power = ((size.view(torch.int32) + 0x400000) & 0x7F800000).view(torch.float32)
        return power.clamp(2.0**-126, 2.0**127)
    if dtype is torch.float8_e4m3fn:
        return size.clamp(2.0**-9, 448.0).to(dtype).float()
    return natural(scale, dtype)


def fit_levels(weight: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, edges: torch.Tensor, group: int,
               scale_type: int, steps: int, shrink_min: float, top: float, rounds: int) -> torch.Tensor:
    dtype = SCALE_TYPES[scale_type]
    tile = weight.reshape(weight.shape[0], weight.shape[1] // group, group)
    weighting = importance.reshape(1, -1, group)
    # NaN counts as nothing here, as in the kernels' comparisons
    span = tile.abs().nan_to_num(0.0, posinf=torch.inf).amax(-1)
    one, flat = torch.ones_like(span), ~(span > 0)
    best, best_error, ratio = one, torch.full_like(span, torch.inf), one
    for step in range(steps + rounds):
        if step < steps:
            shrink = 1.0 if steps == 1 else _float32(
                1 + _float32(_float32(shrink_min - 1) * _float32(step / (steps - 1))))
            scale = torch.where(flat, one, stored(span * shrink / (one * top), dtype))
        else:
            scale = torch.where(ratio.abs() > 0, stored(ratio, dtype), best)
        error, closed = _error(tile, weighting, levels, edges, scale)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
        ratio = torch.where(better, closed, ratio)
    return torch.where(flat, one, best)


def _error(tile: torch.Tensor, weighting: torch.Tensor, levels: torch.Tensor, edges: torch.Tensor,
           scale: torch.Tensor) -> Pair:
    steps = levels[_choose(tile / scale[..., None], edges)]
    off = tile - steps * scale[..., None]
    error, above, below = torch.zeros_like(scale), torch.zeros_like(scale), torch.zeros_like(scale)
    for column in range(tile.shape[-1]):
        weight, step = weighting[..., column], steps[..., column]
        error = error + weight * (off[..., column] * off[..., column])
        above = above + weight * (tile[..., column] * step)
        below = below + weight * (step * step)
    return error, above / below


def round_levels(weight: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor, edges: torch.Tensor,
                 group: int) -> torch.Tensor:
    return _choose(weight / _wide(scale, group), edges).to(torch.uint8)


def dequantize_levels(codes: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor, group: int) -> torch.Tensor:
    return levels[codes.long()] * _wide(scale, group)


def solve_levels(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor,
                 levels: torch.Tensor, edges: torch.Tensor, group_index: torch.Tensor) -> Pair:
    target = weight + shift
    codes, residual = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    groups = group_index.long()
    for j in range(weight.shape[1]):
        step = scale[:, groups[j]]
        code = _choose(target[:, j] / step, edges)
        off = weight[:, j] - levels[code] * step
        target[:, j + 1:] += off[:, None] * factor[j, j + 1:]
        codes[:, j], residual[:, j] = code.to(torch.uint8), off
    return codes, residual


def refine_levels(gradient: torch.Tensor, hessian: torch.Tensor, old_codes: torch.Tensor, scale: torch.Tensor,
                  levels: torch.Tensor, edges: torch.Tensor, group_index: torch.Tensor) -> Pair:
    slope, codes, delta = gradient.clone(), old_codes.clone(), torch.zeros_like(gradient)
    groups = group_index.long()
    for j in range(gradient.shape[1]):
        step, curvature = scale[:, groups[j]], hessian[j, j]
        value = levels[codes[:, j].long()] * step
        code = _choose((value + slope[:, j] / curvature) / step, edges)
        move = levels[code] * step - value
        taken = (2.0 * move * slope[:, j] - move * move * curvature > 0) & (curvature > 0)
        change = torch.where(taken, move, 0.0)
        slope[:, j + 1:] -= change[:, None] * hessian[j, j + 1:]
        codes[:, j] = torch.where(taken, code, codes[:, j].long()).to(torch.uint8)
        delta[:, j] = change
    return codes, delta


def _choose(quotient: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """int64: how many edges lie below; 0 for a NaN."""
    code = torch.bucketize(quotient.contiguous(), edges)
    return torch.where(quotient.isnan(), 0, code)
