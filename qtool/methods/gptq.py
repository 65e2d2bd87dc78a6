"""GPTQ (Frantar et al., arXiv 2210.17323) as Babai's nearest plane (arXiv 2507.18553): one Cholesky, no inverse.

With H + λI = L Lᵀ the layer loss is |D L|² for D = W - Q, and columns are chosen from the last to the first:
    t_j = W_j + Σ_{i>j} D_i L_ij / L_jj,   Q_j = nearest grid value to t_j,   D_j = W_j - Q_j.
The grids are static: fitted to the original weights before any column is chosen. So the columns can be taken in any
order (largest diag(H) first) while the file keeps its plain order and needs no g_idx.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Literal

import torch
from pydantic import Field

from qtool import found
from qtool.errors import NumericalError
from qtool.layer import Layer, factor
from qtool.recipe import Strict
from qtool.tensors import QuantizedTensor

CALIBRATED = True


class Options(Strict):
    """How GPTQ chooses codes.

    damping, damping_mode: λ of H + λI (see layer.damped).  order: "activation" takes the column with the largest
    diag(H) first, "none" goes left to right.  search: fit scales to the error weighted by diag(H) instead of to the
    largest weight.  signed: full-range symmetric grids.  block: columns per native kernel call.
    """

    damping: float = Field(0.01, ge=0.0, le=1.0)
    damping_mode: Literal["mean", "relative"] = "mean"
    order: Literal["activation", "none"] = "activation"
    search: bool = True
    signed: bool = True
    shrink_steps: int = Field(24, ge=1, le=200)
    rounds: int = Field(2, ge=0, le=10)
    block: int = Field(128, ge=8, le=256)


def run(layer: Layer, options: Options) -> Layer:
    if layer.stats is None:
        raise NumericalError(f"{layer.name}: GPTQ needs calibration statistics and got none")
    grid = found.load("grids", layer.scheme.grid)
    importance = layer.stats.hessian.diagonal()
    steps, rounds = (options.shrink_steps, options.rounds) if options.search else (1, 0)
    fitted = grid.fit(layer.weight, layer.scheme, layer.scale_dtype, importance, steps, options.signed, rounds)

    order = column_order(layer.stats.hessian, options.order).flip(0)  # the Cholesky factor wants the last first
    feedback, damping, repaired = factor(layer.name, layer.stats.hessian, options.damping, options.damping_mode, order)
    feedback /= feedback.diagonal().clone()  # column j over L_jj: the feedback of column i on column j
    codes = solve(grid, fitted.without_offset(layer.target), feedback, fitted, order, options.block)
    return layer.having(quantized=replace(fitted, codes=codes), notes={"damping": damping}, repaired=repaired)


def column_order(hessian: torch.Tensor, order: str) -> torch.Tensor:
    """int64 [K], the order in which columns are chosen (ties by position)."""
    if order == "none":
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


def solve(grid: ModuleType, target: torch.Tensor, feedback: torch.Tensor, fitted: QuantizedTensor, order: torch.Tensor,
          block: int) -> torch.Tensor:
    """Codes uint8 [N, K] in the file's column order, on a grid that has been fitted.

    target: float32 [N, K], less the grid's offsets.  order: int64 [K], the columns from the one that is chosen last to
    the first.  feedback: float32 [K, K] lower triangular with unit diagonal, rows and columns in that order.
    Left-looking: W is never rewritten, each block reads the D of all blocks before it.
    """
    weight = target[:, order]
    groups = (order // fitted.group_size).to(torch.int32)
    difference = torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for stop in range(weight.shape[1], 0, -block):
        here = slice(max(0, stop - block), stop)
        shift = difference[:, stop:] @ feedback[stop:, here]
        chosen, left = grid.solve_columns(weight[:, here].flip(1), shift.flip(1),
                                          feedback[here, here].flip(0, 1).triu(1), fitted, groups[here].flip(0))
        codes[:, here], difference[:, here] = chosen.flip(1), left.flip(1)
    del weight, difference
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result
