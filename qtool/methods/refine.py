"""Coordinate descent on the codes and closed-form refits of the scales after a solver (frontier 1.4 and 1.5).

Both moves are monotone in the layer loss tr(D H Dᵀ), D = target - Q; E = D H is kept up to date.
Code sweep: column j moves to the grid value nearest to Q_j + E_j / H_jj.  Scale refit: with c' the codes less the
zero point, masked to group g, s_g += (E · c') / (c' H c'ᵀ), rounded to the stored dtype and kept only if that helps.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from qtool import found, ops
from qtool.errors import RecipeError
from qtool.layer import Layer, damped
from qtool.recipe import Strict
from qtool.tensors import QuantizedTensor

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
    grid = found.load("grids", layer.scheme.grid)
    answer = layer.quantized
    error = (layer.target - grid.decode(answer)) @ hessian
    for sweep in range(options.sweeps):
        if options.scales:
            answer = refit_scales(answer, error, hessian)
        answer = sweep_codes(answer, error, hessian, options.block)
        if options.scales and sweep == options.sweeps - 1:
            answer = refit_scales(answer, error, hessian)
    return layer.having(quantized=answer)


def sweep_codes(answer: QuantizedTensor, error: torch.Tensor, hessian: torch.Tensor, block: int) -> QuantizedTensor:
    """One sweep of coordinate descent; `error` (E = D H, float32 [N, K]) is updated in place."""
    codes, scale = answer.codes.clone(), answer.scale.float()
    groups = (torch.arange(codes.shape[1], device=codes.device) // answer.group_size).to(torch.int32)
    for start in range(0, codes.shape[1], block):
        here = slice(start, min(start + block, codes.shape[1]))
        codes[:, here], change = ops.refine_columns(error[:, here], hessian[here, here], codes[:, here], scale,
                                                    answer.zero_point, groups[here], answer.bits)
        error -= change @ hessian[here]
    return QuantizedTensor(codes, answer.scale, answer.zero_point, answer.bits, answer.group_size, answer.symmetric)


def refit_scales(answer: QuantizedTensor, error: torch.Tensor, hessian: torch.Tensor) -> QuantizedTensor:
    """The least-squares scale of each group in turn, codes kept; `error` is updated in place."""
    scale = answer.scale.clone()
    for group in range(scale.shape[1]):
        here = slice(group * answer.group_size, (group + 1) * answer.group_size)
        steps = answer.codes[:, here].float() - answer.zero_point[:, group:group + 1].float()
        slope = (error[:, here] * steps).sum(1)
        curvature = ((steps @ hessian[here, here]) * steps).sum(1)
        old = scale[:, group].float()
        new = (old + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)).to(scale.dtype)
        move = new.float() - old
        better = (curvature > 0) & (2 * move * slope > move.square() * curvature) & torch.isfinite(new) & (new != 0)
        move = torch.where(better, move, 0.0)
        scale[:, group] = torch.where(better, new, scale[:, group])
        error -= (move[:, None] * steps) @ hessian[here]
    return QuantizedTensor(answer.codes, scale, answer.zero_point, answer.bits, answer.group_size, answer.symmetric)
