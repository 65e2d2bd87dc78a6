"""How the values of a weight are distributed."""

from __future__ import annotations

import math
from typing import Any

import torch

from qtool.decode import Source
from qtool.inspect.files import Step, no_steps

ELEMENTS = 1 << 22  # taken at a time, so that no copy of a whole weight is made
KEYS = ("absmax", "std", "kurtosis", "zeros")


def describe(weight: torch.Tensor) -> dict[str, float | None]:
    """absmax; std; kurtosis E[(w - mean)^4] / std^4 (a normal distribution has 3; more: heavy tails), None for a
    constant; zeros, the share of elements that are exactly 0. weight: any shape; sums are in float64."""
    flat, count = weight.reshape(-1), max(weight.numel(), 1)
    pieces = flat.split(ELEMENTS)
    mean = math.fsum(float(piece.sum(dtype=torch.float64)) for piece in pieces) / count
    second = fourth = absmax = 0.0
    zeros = 0
    for piece in pieces:
        squares = (piece.double() - mean).square_()
        second += float(squares.sum())
        fourth += float(squares.square_().sum())
        zeros += int((piece == 0).sum())
        absmax = max(absmax, float(piece.abs().max()))
    variance = second / count
    return {"absmax": _short(absmax), "std": _short(math.sqrt(variance)),
            "kurtosis": _short(fourth / count / variance**2) if variance > 0 else None, "zeros": _short(zeros / count)}


def add(source: Source, rows: list[dict[str, Any]], step: Step = no_steps) -> None:
    """The statistics of every row's weight, as it is decoded, into the row; one weight is held at a time."""
    for done, row in enumerate(rows):
        step(done, len(rows), row["name"])
        weight = source.decoded(row["stored"])
        row.update(describe(weight))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
