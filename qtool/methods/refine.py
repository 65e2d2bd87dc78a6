"""Coordinate descent on the codes and closed-form refits of the scales after a solver (frontier 1.4 and 1.5).

Both moves are monotone in the layer loss tr(D H Dᵀ), D = target - Q; E = D H is kept up to date.
Code sweep: column j moves to the grid value nearest to Q_j + E_j / H_jj.  Scale refit: with c' the codes less the
zero point, masked to group g, s_g += (E · c') / (c' H c'ᵀ), rounded to the stored dtype and kept only if that helps.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Literal

import torch
from pydantic import Field

from qtool import found
from qtool.errors import RecipeError
from qtool.layer import Layer, damped
from qtool.recipe import Strict
from qtool.tensors import QuantizedTensor, all_finite

CALIBRATED = True


class Options(Strict):
    """sweeps: rounds over all columns.  scales: refit the scales between the sweeps.  damping: see gptq."""

    sweeps: int = Field(2, ge=0, le=20)
    scales: bool = True
    damping: float = Field(0.01, ge=0.0, le=1.0)
    damping_mode: Literal["mean", "relative"] = "mean"
    block: int = Field(128, ge=8, le=256)


def run(layer: Layer, options: Options) -> Layer:
    if layer.quantized is None or layer.stats is None:
        raise RecipeError("the refine step improves codes that an earlier step chose: put it after gptq or rtn "
                          "in a calibrated recipe")
    hessian = damped(layer.stats.hessian, options.damping, options.damping_mode)
    grid, answer = found.load("grids", layer.scheme.grid), layer.quantized
    error = (layer.target - grid.decode(answer)) @ hessian
    if not all_finite(error):
        return layer.having(repaired={"refine": "its sums overflow float32; the codes are those of the step before"})
    free = options.scales and (grid.FREE_SCALES or hasattr(grid, "refit")) and answer.strategy is None
    for _ in range(options.sweeps):
        answer = sweep(grid, answer, error, hessian, options.block, free)
    return layer.having(quantized=answer)


def sweep(grid: ModuleType, answer: QuantizedTensor, error: torch.Tensor, hessian: torch.Tensor, block: int,
          scales: bool) -> QuantizedTensor:
    """One pass over all codes and scales; `error` (E = D H, float32 [N, K]) is updated in place.

    Columns are taken in blocks, with one product to bring E up to date after each. Groups that fit into a block have
    their scales refitted before and after its codes move; longer ones once, before the pass.
    """
    answer = answer.own()
    columns, group = answer.codes.shape[1], answer.group_size
    refit = getattr(grid, "refit", partial(refit_scales, grid))
    if answer.parts:
        block = max(block, answer.unit)
    inside = answer.unit <= block
    if scales and not inside:
        refit(answer, error, hessian)
    if inside:
        block -= block % answer.unit
    for start in range(0, columns, block):
        here = slice(start, min(start + block, columns))
        part, local, square = answer.columns(here), error[:, here].clone(), hessian[here, here]
        before = grid.decode(part) if inside else None
        if scales and inside:
            refit(part, local, square)
        index = (torch.arange(start, here.stop, device=error.device) // group - start // group).to(torch.int32)
        answer.codes[:, here], change = grid.refine_columns(local, square, part, index)
        if before is not None:
            if scales:
                local.addmm_(change, square, alpha=-1)
                refit(part, local, square)
            change = grid.decode(part) - before
        error.addmm_(change, hessian[here], alpha=-1)  # in place: E may be the largest tensor of all
    return answer


def refit_scales(grid: ModuleType, answer: QuantizedTensor, error: torch.Tensor, hessian: torch.Tensor) -> None:
    """The least-squares scale of each group in turn, codes kept; the scales and `error` are updated in place."""
    group, scale = answer.group_size, answer.scale
    for index in range(scale.shape[1]):
        here = slice(index * group, (index + 1) * group)
        steps = grid.steps(answer.codes[:, here], answer.zero_point[:, index:index + 1])
        slope = (error[:, here] * steps).sum(1)
        curvature = ((steps @ hessian[here, here]) * steps).sum(1)
        old = scale[:, index].float()
        new = (old + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)).to(scale.dtype)
        move = new.float() - old
        better = (curvature > 0) & (2 * move * slope > move.square() * curvature) & torch.isfinite(new) & (new != 0)
        move = torch.where(better, move, 0.0)
        scale[:, index] = torch.where(better, new, scale[:, index])
        error.addmm_(move[:, None] * steps, hessian[here], alpha=-1)
