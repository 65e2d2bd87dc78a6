"""NVFP4: groups of 16 four-bit floats (E2M1), scales in E4M3, and one global scale for the whole matrix.

value = level * (local / global), with global = 448 * 6 / largest weight, so that the largest local scale is 448.
Linears that an engine fuses (q/k/v, gate/up) are fitted together and so share their global scale.
compressed-tensors divides by it, ModelOpt multiplies with its inverse; a global is chosen for which both give the same
float32 for every local scale. One in five floats is of that kind.
Source: the NVFP4 layouts of compressed-tensors 0.20 and ModelOpt 0.47 (docs: formats).
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
LOCALS = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # every positive scale of a group
NEAR = 256  # floats that are tried; one in five has a multiplier
GLOBALS = (1.0, 0.9, 0.8, 0.7)  # parts of the range that a search tries for the global scale
check, width, encode, decode = GRID.check, GRID.width, GRID.encode, GRID.decode
steps, solve_columns, refine_columns = GRID.steps, GRID.solve_columns, GRID.refine_columns


def reach(scheme: Scheme, scale_dtype: torch.dtype) -> float:
    """The largest |weight|: the global scale follows any."""
    return float(torch.finfo(torch.float32).max)


def fit(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor | None = None,
        shrink_steps: int = 1, signed: bool = False, rounds: int = 0) -> QuantizedTensor:
    """Local scales in E4M3 units over a global divisor, kept in extra["global_scale"] (float32 [1])."""
    largest = weight.abs().max() if weight.numel() else weight.new_zeros(())
    whole = torch.where(largest > 0, RANGE / largest, 1.0).clamp(torch.finfo(torch.float32).tiny, 1e30).reshape(1)
    candidates = []
    for part in GLOBALS if shrink_steps > 1 else GLOBALS[:1]:
        over = invertible(whole * part)
        fitted = GRID.fit(weight * over, scheme, scale_dtype, importance, shrink_steps, signed, rounds)
        candidates.append(replace(fitted, scale=fitted.scale / over, extra={"global_scale": over}))
    return min(candidates, key=lambda one: _error(weight, one, importance) if len(candidates) > 1 else 0.0)


def _error(weight: torch.Tensor, fitted: QuantizedTensor, importance: torch.Tensor | None) -> float:
    off = weight - decode(encode(weight, fitted))
    weighted = off.square() if importance is None else off.square() * importance
    return float(weighted.sum(dtype=torch.float64))


def invertible(divisor: torch.Tensor) -> torch.Tensor:
    """A float32 [1] little below `divisor` that has a multiplier.

    The steps grow: near some numbers, as the root of 2, the inverses of all neighbours are rounded the same way.
    """
    bits = divisor.cpu().view(torch.int32)
    return next(one for one in ((bits - step * step).view(torch.float32) for step in range(NEAR))
                if multiplier(one) is not None).to(divisor.device)


def multiplier(divisor: torch.Tensor) -> torch.Tensor | None:
    """float32 [1] such that every local scale times it is that scale over `divisor`, bit for bit; None without one."""
    inverse = 1 / divisor
    return inverse if torch.equal(LOCALS * inverse.cpu(), LOCALS / divisor.cpu()) else None


def divisor(multiplier: torch.Tensor) -> torch.Tensor | None:
    """float32 [1] such that every local scale over it is that scale times `multiplier`, bit for bit; None without."""
    bits = (1 / multiplier).view(torch.int32)
    tried = ((bits + step).view(torch.float32) for step in (0, 1, -1))
    return next((one for one in tried if torch.equal(LOCALS / one, LOCALS * multiplier)), None)


def local_scales(tensor: QuantizedTensor) -> torch.Tensor:
    """The scales as they are stored: float8_e4m3fn [N, G]."""
    return (tensor.scale * tensor.extra["global_scale"]).to(torch.float8_e4m3fn)


def effective(local: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """float32 [N, G] of stored local scales and their global divisor."""
    return local.float() / divisor


__all__ = ["FREE_SCALES", "GRID", "JOINT", "WHOLE_SCALE", "check", "decode", "divisor", "effective", "encode", "fit",
           "invertible", "local_scales", "multiplier", "reach", "refine_columns", "solve_columns", "steps", "width"]
