"""GPTQ (Frantar et al., arXiv 2210.17323) as Babai's nearest plane (arXiv 2507.18553): one Cholesky, no inverse.

With H + λI = R Rᵀ, R upper triangular, the layer loss is |D R|² for D = W - Q, and columns are chosen left to right:
    t_j = W_j + Σ_{i<j} D_i R_ij / R_jj,   Q_j = nearest grid value to t_j,   D_j = W_j - Q_j.
The grids are static: fitted to the original weights before any column is chosen. So the columns can be taken in any
order (largest diag(H) first) while the file keeps its plain order and needs no g_idx.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from qtool import found, ops
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
    scale, zero_point = grid.fit(layer.weight, layer.scheme, layer.scale_dtype, importance, steps, options.signed,
                                 rounds)
    group = grid.width(layer.scheme, layer.weight.shape[1])

    order = column_order(layer.stats.hessian, options.order)
    hessian = layer.stats.hessian if order is None else layer.stats.hessian[order][:, order]
    upper, notes = factor(layer.name, hessian, options.damping, options.damping_mode)
    upper /= upper.diagonal().clone()  # column j over R_jj: the feedback of column i on column j
    codes = solve(layer.target, upper, scale, zero_point, layer.scheme.bits, group, order, options.block)
    quantized = QuantizedTensor(codes, scale.to(layer.scale_dtype), zero_point, layer.scheme.bits, group,
                                layer.scheme.symmetric)
    return layer.having(quantized=quantized, notes=notes)


def column_order(hessian: torch.Tensor, order: str) -> torch.Tensor | None:
    """int64 [K], the order in which columns are chosen (ties by position), or None for left to right."""
    if order == "none":
        return None
    return hessian.diagonal().argsort(descending=True, stable=True)


def solve(target: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int,
          group: int, order: torch.Tensor | None, block: int) -> torch.Tensor:
    """Codes uint8 [N, K] in the file's column order.

    target: float32 [N, K].  feedback: float32 [K, K] upper triangular with unit diagonal, in solving order.
    scale, zero_point: [N, G].  Left-looking: W is never rewritten, each block reads the D of all blocks before it.
    """
    columns = target.shape[1]
    index = torch.arange(columns, device=target.device) if order is None else order
    weight = target if order is None else target[:, order]
    groups = (index // group).to(torch.int32)
    difference = torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, block):
        here = slice(start, min(start + block, columns))
        shift = difference[:, :start] @ feedback[:start, here]
        codes[:, here], difference[:, here] = ops.solve_columns(
            weight[:, here], shift, feedback[here, here].triu(1), scale, zero_point, groups[here], bits)
    if order is None:
        return codes
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result
