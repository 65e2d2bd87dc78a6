"""NVFP4: groups of 16 four-bit floats (E2M1), scales in E4M3, and one global scale for the whole matrix.

value = level * (local / global), with global = 448 * 6 / largest weight, so that the largest local scale is 448.
Linears that an engine fuses (q/k/v, gate/up) are fitted together and so share their global scale.
Source: the NVFP4 layout of compressed-tensors 0.20 (docs: formats).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qtool.grids._levels import LevelGrid, small_float
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor

GRID = LevelGrid("nvfp4", 4, *small_float(2, 1, 6.0), groups=(16,), scale_dtype=torch.float8_e4m3fn, shrink=0.6)
JOINT, FREE_SCALES, WHOLE_SCALE = True, False, True
RANGE = 448.0 * 6.0
GLOBALS = (1.0, 0.9, 0.8, 0.7)  # parts of the range that a search tries for the global scale
check, width, encode, decode = GRID.check, GRID.width, GRID.encode, GRID.decode
steps, solve_columns, refine_columns = GRID.steps, GRID.solve_columns, GRID.refine_columns


def fit(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor | None = None,
        shrink_steps: int = 1, signed: bool = False, rounds: int = 0) -> QuantizedTensor:
    """Local scales in E4M3 units over a global divisor, kept in extra["global_scale"] (float32 [1])."""
    largest = weight.abs().max() if weight.numel() else weight.new_zeros(())
    whole = torch.where(largest > 0, RANGE / largest, 1.0).clamp(torch.finfo(torch.float32).tiny, 1e30).reshape(1)
    candidates = []
    for part in GLOBALS if shrink_steps > 1 else GLOBALS[:1]:
        divisor = whole * part
        fitted = GRID.fit(weight * divisor, scheme, scale_dtype, importance, shrink_steps, signed, rounds)
        candidates.append(replace(fitted, scale=fitted.scale / divisor, extra={"global_scale": divisor}))
    return min(candidates, key=lambda one: _error(weight, one, importance) if len(candidates) > 1 else 0.0)


def _error(weight: torch.Tensor, fitted: QuantizedTensor, importance: torch.Tensor | None) -> float:
    off = weight - decode(encode(weight, fitted))
    weighted = off.square() if importance is None else off.square() * importance
    return float(weighted.sum(dtype=torch.float64))


def local_scales(tensor: QuantizedTensor) -> torch.Tensor:
    """The scales as they are stored: float8_e4m3fn [N, G]."""
    return (tensor.scale * tensor.extra["global_scale"]).to(torch.float8_e4m3fn)


def effective(local: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """float32 [N, G] of stored local scales and their global divisor."""
    return local.float() / divisor


__all__ = ["FREE_SCALES", "GRID", "JOINT", "WHOLE_SCALE", "check", "decode", "effective", "encode", "fit",
           "local_scales", "refine_columns", "solve_columns", "steps", "width"]
