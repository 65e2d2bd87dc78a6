"""The asymmetric target: aim at what the unquantized model would compute, not at this layer alone (frontier 1.2).

min_Q |Q X - W X~|², with X~ the inputs in the unquantized model, is the ordinary problem for a moved target:
    W* = W + a W (C - H)(H + λI)⁻¹,   C - H = E[(x~ - x) xᵀ].
A linear whose outputs are added to a stream r (o_proj, down_proj) can make up for what r itself is off by, as far as
that is linear in x: min_Q |Q X + R - (W X~ + R~)|² moves the target by another b E[(r~ - r) xᵀ] (H + λI)⁻¹. Block-wise
training (AutoRound, arXiv 2309.05516, on quantized inputs) does that implicitly; here it is in the least squares.
a = b = 1 is the exact reduction but fits noise; "auto" takes the pair in [0, limit]² that is best on held-out tokens,
which is closed form, since the held-out loss is quadratic in both.
Sources: QEP (NeurIPS 2025), GPTAQ (ICML 2025), Qronos (ICLR 2026).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """factor: the `a` and `b` of the target, or auto.  limit: the largest that auto may take.  damping: λ, see gptq.

    residual: whether there is a `b`.  share: of the fitting samples, how many run through the unquantized model too;
    that is what this step costs.
    """

    share: float = Field(1.0, gt=0.0, le=1.0)
    factor: float | Literal["auto"] = "auto"
    limit: float = Field(1.0, ge=0.0, le=1.0)
    residual: bool = True
    damping: float = Field(0.01, ge=0.0, le=1.0)
    damping_mode: Literal["mean", "relative"] = "mean"


def run(layer: Layer, options: Options) -> Layer:
    stats = layer.stats
    if stats is None:
        raise NumericalError(f"{layer.name}: the asymmetric target needs calibration statistics and got none")
    if stats.cross is None:  # experts: the two streams may route a token differently
        return layer.having(notes={"asymmetric": 0.0})
    aims = [layer.weight @ stats.cross]
    if options.residual and stats.residual is not None:
        aims.append(stats.residual * (layer.weight != 0).any(1, keepdim=True))  # a grid of zeros cannot follow
    # H of the very tokens of C: what they share of chance cancels
    hessian = stats.hessian if stats.paired is None else stats.paired
    stats.cross = stats.paired = stats.residual = None  # the largest things in memory, and no later step needs them
    lower, _, repaired = factor(layer.name, hessian, options.damping, options.damping_mode)
    del hessian
    directions = [_solve(lower, aims.pop(0)) for _ in tuple(aims)]
    del lower
    if options.factor == "auto":
        strengths = best_factors(layer.weight, directions, stats.held_out, options.limit)
    else:
        strengths = [float(options.factor)] * len(directions)
    target = layer.weight.clone()
    for strength, direction in zip(strengths, directions, strict=True):
        target.add_(direction, alpha=strength)
    if not (all(map(math.isfinite, strengths)) and all_finite(target)):
        return layer.having(notes={"asymmetric": 0.0}, repaired={
            **repaired, "target": "the asymmetric target overflows float32; the weight itself is the target"})
    told = dict(zip(("asymmetric", "residual"), (round(one, 4) for one in strengths), strict=False))
    return layer.having(target=target, notes=told, repaired=repaired)


def best_factors(weight: torch.Tensor, directions: Sequence[torch.Tensor], held_out: HeldOut,
                 limit: float) -> list[float]:
    """argmin over factors f in [0, limit] of |(W + Σ f P) X + R - W X~ - R~|² on held-out tokens; zeros without any.

    directions: P [N, K], towards W X~ and, if there is a second one, R~ - R.
    """
    if not held_out.paired:
        return [0.0] * len(directions)
    unit = unit_of(weight)
    if unit != 1:
        weight, directions = weight / unit, [one / unit for one in directions]
    follows = len(directions) > 1 and held_out.knows_residual
    pulls = [held_out.pull(one, weight) + (held_out.pull_back(one) / unit if follows else 0.0) for one in directions]
    squares = [held_out.energy(one) for one in directions]
    if not follows:
        return [_clamped(pulls[0], squares[0], limit), *[0.0] * (len(directions) - 1)]
    between = held_out.product(*directions)
    found = squares[0] * squares[1] - between**2
    first, second = pulls[0] * squares[1] - pulls[1] * between, pulls[1] * squares[0] - pulls[0] * between
    if found > 0 and 0 <= first <= limit * found and 0 <= second <= limit * found:
        return [first / found, second / found]
    edges = [(end, _clamped(pulls[1] - between * end, squares[1], limit)) for end in (0.0, limit)]
    edges += [(_clamped(pulls[0] - between * end, squares[0], limit), end) for end in (0.0, limit)]

    def loss(factors: tuple[float, float]) -> float:
        one, other = factors
        return (one**2 * squares[0] + other**2 * squares[1] + 2 * one * other * between
                - 2 * one * pulls[0] - 2 * other * pulls[1])

    best: tuple[float, float] = min(edges, key=loss)
    return list(best)


def _clamped(pull: float, square: float, limit: float) -> float:
    """argmin over f in [0, limit] of f² square - 2 f pull."""
    return min(max(pull / square, 0.0), limit) if square > 0 else 0.0


def _solve(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """right (L Lᵀ)⁻¹ for right [N, K], L lower triangular."""
    half = torch.linalg.solve_triangular(lower.T, right, upper=True, left=False)
    return torch.linalg.solve_triangular(lower, half, upper=False, left=False)
