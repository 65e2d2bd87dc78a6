"""The mathematics of an evaluation, on logits; no model in sight.

Windows are the unit of every error: predictions inside one depend on each other, windows much less. The error of a
mean is the standard error over windows; differences to the base are taken window by window first, so that what makes a
window hard for both cancels. Quantiles have the standard error of a bootstrap over windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

ROWS = 128  # predictions whose distributions are held at one time: 128 x vocabulary x 3 float32
QUANTILES = (("median", 0.5), ("p99", 0.99), ("p999", 0.999))
RESAMPLES = 200  # of the bootstrap: enough for a standard error (Efron and Tibshirani 1993, section 6.4)
CONFIDENCE = 0.95


@dataclass
class Figures:
    """What windows add up of one model, and with a base of the two together; one entry per window.

    nll, base_nll: the mean.  kl: KL(base || model), float32 [predictions].  same: the share of predictions for which
    both find the same token most likely.
    """

    nll: list[float] = field(default_factory=list)
    base_nll: list[float] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    same: list[float] = field(default_factory=list)


def add(figures: Figures, targets: torch.Tensor, logits: torch.Tensor, base: torch.Tensor | None = None) -> None:
    """One window: targets int64 [P], logits [P, V] of the model and of the base."""
    count = len(targets)
    both = [logits] if base is None else [logits, base]
    sums, same, kl = [0.0] * len(both), 0, torch.empty(count)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        logs = [one[rows].float().log_softmax(-1) for one in both]
        for index, log in enumerate(logs):
            sums[index] -= float(log.gather(1, targets[rows, None]).sum(dtype=torch.float64))
        if base is not None:
            same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
            kl[rows] = _kl(logs[1], logs[0]).cpu()
    figures.nll.append(sums[0] / count)
    if base is not None:
        figures.base_nll.append(sums[1] / count)
        figures.kl.append(kl)
        figures.same.append(same / count)


def perplexity(nll: Sequence[float]) -> dict[str, Any]:
    """exp of the mean over windows, its standard error (of the mean, carried through exp) and 95 % interval.

    The interval is exp(mean ± t · error) with Student's t for the number of windows; None for a single window.
    """
    mean, error = _mean_and_error(nll)
    value = _exp(mean)
    half = student(len(nll) - 1) * error if len(nll) > 1 else 0.0
    interval = [_exp(mean - half), _exp(mean + half)] if len(nll) > 1 else None
    return {"perplexity": value, "perplexity_error": value * error, "perplexity_interval": interval,
            "nll": mean, "nll_error": error}


def divergence(figures: Figures) -> dict[str, Any]:
    """KL(base || model), agreement, and excess = ln(perplexity ratio), all with errors over windows."""
    mean, error = _mean_and_error([float(kl.mean(dtype=torch.float64)) for kl in figures.kl])
    excess, excess_error = _mean_and_error(
        [ours - theirs for ours, theirs in zip(figures.nll, figures.base_nll, strict=True)])
    same, same_error = _mean_and_error(figures.same)
    return {
        "excess": {"mean": excess, "error": excess_error},
        "kl": {"mean": mean, "error": error, **_quantiles(figures.kl)},
        "top1_agreement": {"mean": same, "error": same_error},
    }


def student(freedom: int) -> float:
    """The t beyond which (both sides together) 5 % of Student's distribution lie; freedom: 1 or more.

    By bisection on the closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4).
    """
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < CONFIDENCE else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _inside(angle: float, freedom: int) -> float:
    """The probability of |t| < tan(angle) · sqrt(freedom)."""
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for power in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (power - 1) / power
    return (angle + math.sin(angle) * total) * 2 / math.pi if freedom % 2 else math.sin(angle) * total


def _quantiles(windows: Sequence[torch.Tensor]) -> dict[str, float]:
    """Each quantile of all predictions with its standard error; 0 for a single window."""
    ordered, place = torch.cat(list(windows)).sort()
    owner = torch.repeat_interleave(torch.tensor([len(one) for one in windows]))[place]
    found = {name: float(ordered[_rank(share, len(ordered))]) for name, share in QUANTILES}
    drawn: dict[str, list[float]] = {name: [] for name in found}
    generator = torch.Generator().manual_seed(0)
    for _ in range(RESAMPLES if len(windows) > 1 else 0):
        chosen = torch.randint(len(windows), (len(windows),), generator=generator)
        reached = torch.bincount(chosen, minlength=len(windows))[owner].cumsum(0)
        for name, share in QUANTILES:
            wanted = _rank(share, int(reached[-1])) + 1
            drawn[name].append(float(ordered[int(torch.searchsorted(reached, wanted))]))
    errors = {f"{name}_error": float(torch.tensor(values, dtype=torch.float64).std()) if values else 0.0
              for name, values in drawn.items()}
    return {key: one[key] for name, _ in QUANTILES for one, key in ((found, name), (errors, f"{name}_error"))}


def _rank(share: float, count: int) -> int:
    return min(round(share * (count - 1)), count - 1)


def _kl(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Per row, from log probabilities; a token that the base rules out (-inf) adds nothing."""
    probability = base.exp()
    return torch.where(probability > 0, probability * (base - model), 0.0).sum(-1)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # beyond that float64 overflows, and the model is noise


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
