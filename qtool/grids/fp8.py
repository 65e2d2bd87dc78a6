"""FP8, E4M3 without infinities: 4 bits of exponent, 3 of mantissa, up to ±448.

One scale per output channel or group, or shared between rows: one for the matrix, or for each block of 128 x 128.
A fit with a search tries larger scales than the absmax needs: the steps of the grid are relative, so nothing is lost at
the top, and where the weights lie between powers of two changes their error.
Source: arXiv 2209.05433 (FP8 formats for deep learning); stored bits are torch.float8_e4m3fn's.
"""

from __future__ import annotations

import torch

from qtool.grids._levels import LevelGrid, small_float
from qtool.quality import unit_of
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor

TOP, BLOCK = 448.0, 128
OCTAVE = 1.875  # the largest scale tried: one step of the mantissa below twice the smallest
GRID = LevelGrid("fp8", 8, *small_float(4, 3, TOP), shrink=OCTAVE, shares=True)
JOINT, FREE_SCALES = True, True
width, encode, decode = GRID.width, GRID.encode, GRID.decode
reach, steps, solve_columns, refine_columns = GRID.reach, GRID.steps, GRID.solve_columns, GRID.refine_columns


def check(scheme: Scheme) -> str | None:
    """Why the scheme cannot be this grid, or None."""
    wanted = {"tensor": -1, "block": BLOCK}.get(scheme.strategy or "", scheme.group_size)
    if scheme.group_size != wanted:
        return f"strategy: {scheme.strategy} goes with group_size {wanted}, not {scheme.group_size}"
    return GRID.check(scheme)


def fit(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor | None = None,
        shrink_steps: int = 1, signed: bool = False, rounds: int = 0) -> QuantizedTensor:
    """See LevelGrid.fit; scales [N, K / group] that rows share are repeated for each of them."""
    if scheme.strategy is None or not weight.numel():
        return GRID.fit(weight, scheme, scale_dtype, importance, shrink_steps, signed, rounds)
    rows, columns = weight.shape
    group, high = width(scheme, columns), rows if scheme.strategy == "tensor" else BLOCK

    def cells(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(rows // high, high, columns // group, group)

    importance = torch.ones(columns, device=weight.device) if importance is None else importance
    unit = unit_of(weight)  # so that errors can be squared
    weight, kind = weight / unit, torch.finfo(scale_dtype)
    span = cells(weight.abs()).amax((1, 3)) / TOP
    least = torch.full_like(span, torch.inf, dtype=torch.float64)
    best = torch.full_like(span, 1 / unit)
    for step in range(shrink_steps):
        stretch = 1 + (OCTAVE - 1) * step / max(shrink_steps - 1, 1)
        scale = (span * stretch * unit).to(scale_dtype).float().clamp(kind.tiny, kind.max) / unit
        fitted = GRID.fitted(scale.repeat_interleave(high, 0), group)
        off = weight - decode(encode(weight, fitted))
        error = cells(off.square_().mul_(importance)).sum((1, 3), dtype=torch.float64)
        better = (error < least) & (span > 0)
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return GRID.fitted((best * unit).repeat_interleave(high, 0).to(scale_dtype), group, strategy=scheme.strategy)


__all__ = ["FREE_SCALES", "GRID", "JOINT", "check", "decode", "encode", "fit", "reach", "refine_columns",
           "solve_columns", "steps", "width"]
