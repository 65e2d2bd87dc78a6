"""Equalize: scale input channels so that what the solver will leave is least, as far as scales can tell.

Columns that are chosen one by one with feedback leave tr(D H Dᵀ) ≈ Σ_j L_jj² Σ_r s_rj² / 12, with H + λI = L Lᵀ and
s_rj the scale of row r in the group of column j, proportional to its largest |W_rk|. Channel j times t_j divides L_jj
by t_j and multiplies column j of W, so before any code is chosen

    J(t) = Σ_j L_jj² / t_j² Σ_r max_{k in group of j} (|W_rk| t_k)²

says what t is worth. With a norm of order p for the maximum, t_j ∂J/∂t_j is the difference of two positive sums, what
a larger t_j adds and what it takes off; rounds of t_j *= (taken / added)^(1 / (p + 2)) end where they are equal.
Sources: the loss is that of Babai's nearest plane (arXiv 2507.18553); that channel scales between layers are free is
known from cross-layer equalization (arXiv 1906.04721), which evens out the ranges of weights and looks at no inputs.
"""

from __future__ import annotations

import torch
from pydantic import Field

from qtool.errors import NumericalError
from qtool.layer import Layer, Survey, factor
from qtool.methods.gptq import column_order
from qtool.recipe import Scheme, Strict

CALIBRATED = True
SCALES_INPUTS = True
SURVEYS_MOMENTS = True
NORM = 8  # of the largest weight of a group; 4 finds less, the maximum itself has no slope
TINY = 1e-30
WIDEST = 3.0  # of |log t|: a channel without weights or inputs would go on for ever


class Options(Strict):
    """samples: sequences that the inputs are surveyed on.  rounds: over t, for each of two orders of the columns.

    damping: see gptq.  worth: channels stay as they are where J would fall by less than this share.
    """

    samples: int = Field(32, ge=1)
    rounds: int = Field(12, ge=1, le=100)
    damping: float = Field(0.01, ge=0.0, le=1.0)
    worth: float = Field(0.01, ge=0.0, lt=1.0)


def check(scheme: Scheme) -> str | None:
    """Why the step knows nothing of a scheme's rounding, or None."""
    if scheme.grid != "affine" or scheme.activations:
        return ("the equalize step foresees the error of integers in groups (scheme.grid: affine) for inputs that are "
                "not rounded; leave it out, or take awq or smoothquant")
    return None


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is left to do for single layers: the scales are in the weights by now."""
    return layer


def input_scales(layer: Layer, survey: Survey, options: Options) -> list[tuple[torch.Tensor, dict[str, float]]]:
    """The scale of each input channel [K], and what the manifest tells: the share of J that is left, 1 of none done."""
    if survey.hessian is None:
        raise NumericalError(f"{layer.name}: equalize needs the Hessian of its inputs and got none")
    columns = layer.weight.shape[1]
    weights = Weights(layer.weight, columns if layer.scheme.group_size == -1 else int(layer.scheme.group_size))
    log = torch.zeros(columns, device=layer.weight.device)
    before = left = 0.0
    for _ in range(2):
        pivot = pivots(layer.name, survey.hessian, log.exp(), options.damping)
        before = weights.loss(torch.zeros_like(log), pivot)
        for _ in range(options.rounds):
            taken, added = weights.slopes(log, pivot)
            ratio = survey.tie(taken).clamp_min(TINY) / survey.tie(added).clamp_min(TINY)
            log = (log + ratio.log() / (NORM + 2)).clamp(-WIDEST, WIDEST)
        left = weights.loss(log, pivot) / max(before, TINY)
    if not left <= 1 - options.worth:
        return [(torch.ones_like(log), {"equalize": 1.0})]
    return [(log.exp(), {"equalize": round(left, 4)})]


def pivots(name: str, hessian: torch.Tensor, scale: torch.Tensor, damping: float) -> torch.Tensor:
    """L_jj² of each column [K] in units of unscaled channels, columns in the order that scaled ones are chosen in."""
    scaled = hessian / scale[:, None] / scale
    order = column_order(scaled, "activation").flip(0)
    lower, _, _ = factor(name, scaled, damping, "mean", order)
    result = torch.empty_like(scale)
    result[order] = lower.diagonal().square()
    return result * scale.square()


class Weights:
    """|W| of each group to the power of NORM, in units of the group's largest: what J and its slopes are sums of."""

    def __init__(self, weight: torch.Tensor, group: int) -> None:
        size = weight.abs().unflatten(1, (-1, group))
        self.unit = size.amax(2)  # [N, G]
        self.powers = (size / self.unit[..., None].clamp_min(TINY)).pow(NORM)  # [N, G, group]

    def loss(self, log: torch.Tensor, pivot: torch.Tensor) -> float:
        """J at the scales exp(log) [K]."""
        left, _, square = self._sums(log, pivot)
        return float((left.sum(1).double() * square.sum(0).double()).sum())

    def slopes(self, log: torch.Tensor, pivot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a larger scale takes off J by finer rounding of its channel, and adds by a larger range: [K] each."""
        left, mass, square = self._sums(log, pivot)
        share = torch.einsum("ngk,ng->gk", self.powers, square / mass) * self._scales(log)
        return (left * square.sum(0)[:, None]).flatten(), (left.sum(1, keepdim=True) * share).flatten()

    def _sums(self, log: torch.Tensor, pivot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """L_jj² / t_j² [G, group]; Σ (|W| t)^NORM of a row in a group, and the square of its norm, [N, G]."""
        mass = torch.einsum("ngk,gk->ng", self.powers, self._scales(log)).clamp_min(TINY)
        left = (pivot * (-2 * log).exp()).view(self.powers.shape[1:])
        return left, mass, self.unit.square() * mass.pow(2 / NORM)

    def _scales(self, log: torch.Tensor) -> torch.Tensor:
        return (NORM * log).exp().view(self.powers.shape[1:])
