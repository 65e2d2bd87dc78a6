"""The mathematics of an evaluation, on logits; no model in sight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

ROWS = 128  # predictions whose distributions are held at one time: 128 x vocabulary x 3 float32


@dataclass
class Figures:
    """What windows add up. nll: per model, the mean over each window.  kl: float32 [predictions] per window.

    same: predictions for which both models find the same token most likely.
    """

    nll: list[list[float]]
    kl: list[torch.Tensor]
    same: int

    @classmethod
    def empty(cls, models: int) -> Figures:
        return cls([[] for _ in range(models)], [], 0)


def add(figures: Figures, logits: list[torch.Tensor], targets: torch.Tensor) -> None:
    """One window: logits [P, V] of each model (the reference last), targets int64 [P]."""
    sums = [0.0] * len(logits)
    kl = torch.empty(len(targets))
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        logs = [one[rows].float().log_softmax(-1) for one in logits]
        for index, log in enumerate(logs):
            sums[index] -= float(log.gather(1, targets[rows, None]).sum(dtype=torch.float64))
        if len(logs) == 2:
            quantized, reference = logs
            figures.same += int((quantized.argmax(-1) == reference.argmax(-1)).sum())
            kl[rows] = _kl(reference, quantized).cpu()
    for nll, total in zip(figures.nll, sums, strict=True):
        nll.append(total / len(targets))
    if len(logits) == 2:
        figures.kl.append(kl)


def perplexity(nll: list[float]) -> dict[str, float]:
    """exp of the mean, with the standard error over windows (of the mean, carried through exp)."""
    mean, error = _mean_and_error(nll)
    value = math.exp(min(mean, 700.0))  # beyond that float64 overflows, and the model is noise
    return {"perplexity": value, "perplexity_error": value * error, "nll": mean, "nll_error": error}


def divergence(figures: Figures) -> dict[str, Any]:
    """KL(reference || model), agreement, and excess = ln(perplexity ratio) with the error of its paired difference."""
    by_window = [float(kl.mean(dtype=torch.float64)) for kl in figures.kl]
    every = torch.cat(figures.kl).sort().values
    mean, error = _mean_and_error(by_window)
    excess, excess_error = _mean_and_error([ours - theirs for ours, theirs in zip(*figures.nll, strict=True)])
    return {
        "excess": {"mean": excess, "error": excess_error},
        "kl": {"mean": mean, "error": error, "median": _quantile(every, 0.5), "p99": _quantile(every, 0.99)},
        "top1_agreement": figures.same / len(every),
    }


def _kl(reference: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Per row, from log probabilities; a token that the reference rules out (-inf) adds nothing."""
    probability = reference.exp()
    return torch.where(probability > 0, probability * (reference - quantized), 0.0).sum(-1)


def _quantile(ordered: torch.Tensor, share: float) -> float:
    return float(ordered[min(round(share * (len(ordered) - 1)), len(ordered) - 1)])


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
