"""The asymmetric target: aim at what the unquantized model would compute, not at this layer alone (frontier 1.2).

min_Q |Q X - W X~|², with X~ the inputs in the unquantized model, is the ordinary problem for a moved target:
    W* = W + a W (C - H)(H + λI)⁻¹,   C - H = E[(x~ - x) xᵀ].
a = 1 is the exact reduction but fits noise; "auto" takes the `a` in [0, limit] that is best on held-out tokens, which
is closed form, since the held-out loss is quadratic in a.
Sources: QEP (NeurIPS 2025), GPTAQ (ICML 2025), Qronos (ICLR 2026).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from qtool.errors import NumericalError
from qtool.layer import Layer, factor
from qtool.moments import HeldOut
from qtool.quality import unit_of
from qtool.recipe import Strict
from qtool.tensors import all_finite

CALIBRATED = True
CODEBOOKS = True
NEEDS_FLOAT_STREAM = True


class Options(Strict):
    """factor: the `a` of the target, or auto.  limit: the largest `a` that auto may take.  damping: λ, see gptq.

    share: of the fitting samples, how many run through the unquantized model too; that is what this step costs.
    """

    share: float = Field(1.0, gt=0.0, le=1.0)
    factor: float | Literal["auto"] = "auto"
    limit: float = Field(1.0, ge=0.0, le=1.0)
    damping: float = Field(0.01, ge=0.0, le=1.0)
    damping_mode: Literal["mean", "relative"] = "mean"


def run(layer: Layer, options: Options) -> Layer:
    stats = layer.stats
    if stats is None:
        raise NumericalError(f"{layer.name}: the asymmetric target needs calibration statistics and got none")
    if stats.cross is None:  # experts: the two streams may route a token differently
        return layer.having(notes={"asymmetric": 0.0})
    moved = layer.weight @ stats.cross
    # H of the very tokens of C: what they share of chance cancels
    hessian = stats.hessian if stats.paired is None else stats.paired
    stats.cross = stats.paired = None  # the largest things in memory, and no later step needs them
    lower, _, repaired = factor(layer.name, hessian, options.damping, options.damping_mode)
    del hessian
    direction = _solve(lower, moved)
    del lower, moved
    strength = best_factor(layer.weight, direction, stats.held_out)
    strength = min(strength, options.limit) if options.factor == "auto" else float(options.factor)
    target = layer.weight + strength * direction
    if not (math.isfinite(strength) and all_finite(target)):
        return layer.having(notes={"asymmetric": 0.0}, repaired={
            **repaired, "target": "the asymmetric target overflows float32; the weight itself is the target"})
    return layer.having(target=target, notes={"asymmetric": round(strength, 4)}, repaired=repaired)


def best_factor(weight: torch.Tensor, direction: torch.Tensor, held_out: HeldOut) -> float:
    """argmin over a in [0, 1] of |(W + a P) X - W X~|² on held-out tokens, P the direction [N, K]; 0 without any."""
    unit = unit_of(weight)
    if unit != 1:
        weight, direction = weight / unit, direction / unit
    curvature = held_out.energy(direction) if held_out.paired else 0.0
    return min(max(held_out.pull(direction, weight) / curvature, 0.0), 1.0) if curvature > 0 else 0.0


def _solve(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """right (L Lᵀ)⁻¹ for right [N, K], L lower triangular."""
    half = torch.linalg.solve_triangular(lower.T, right, upper=True, left=False)
    return torch.linalg.solve_triangular(lower, half, upper=False, left=False)
