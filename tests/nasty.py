"""Matrices that break quantizers, and text that does not look like text, for hypothesis and for loops."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qtool.moments import HeldOut
from qtool.tensors import CalibrationStats

COLUMNS = 256
Change = Callable[[torch.Tensor], object]


def _column(index: int, value: float) -> Change:
    return lambda matrix: matrix[:, index].fill_(value)


def _columns(stop: int, factor: float) -> Change:
    return lambda matrix: matrix[:, :stop].mul_(factor)


def _mixed(matrix: torch.Tensor) -> None:
    matrix[:, 7], matrix[:, 9] = 1e30, 1e-30
    matrix[1] *= 1e-30


def _spike(matrix: torch.Tensor) -> None:
    matrix[1, 5] = 1e4


# what is done to normal weights of size 0.05 [N, K]
WEIGHTS: dict[str, Change] = {
    "normal": lambda matrix: None, "zero group": _columns(32, 0.0), "zero row": lambda matrix: matrix[1].zero_(),
    "zero matrix": lambda matrix: matrix.zero_(), "1e-30": lambda matrix: matrix.mul_(2e-29),
    "1e30": lambda matrix: matrix.mul_(2e31), "row of 1e-30": lambda matrix: matrix[1].fill_(1e-30), "1e4": _spike,
    "mixed": _mixed, "equal columns": lambda matrix: matrix[:, 1:16].copy_(matrix[:, :1].expand(-1, 15)),
}
# what is done to inputs [T, K] whose columns differ in size
INPUTS: dict[str, Change] = {
    "normal": lambda x: None, "dead columns": _columns(48, 0.0), "one live column": lambda x: _columns(31, 0.0)(x),
    "constant column": _column(5, 7.0), "equal columns": lambda x: x[:, 1:128].copy_(x[:, :1].expand(-1, 127)),
    "massive": lambda x: x[:, 3].mul_(1e4), "more massive": lambda x: x[:, 3].mul_(1e7),
    "all zero": lambda x: x.zero_(), "tiny": lambda x: x.mul_(1e-15), "huge": lambda x: x.mul_(1e12),
    "small and half dead": lambda x: x[:, ::2].zero_().sum() + x.mul_(1e-3).sum(),
}


def weight(kind: str, rows: int, seed: int) -> torch.Tensor:
    """float32 [rows, COLUMNS]."""
    matrix = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05
    WEIGHTS[kind](matrix)
    return matrix


def inputs(kind: str, tokens: int, seed: int) -> torch.Tensor:
    """float32 [tokens, COLUMNS]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, COLUMNS, generator=generator) * torch.exp(torch.randn(COLUMNS, generator=generator))
    INPUTS[kind](x)
    return x


def statistics(x: torch.Tensor) -> CalibrationStats:
    """Of inputs [T, K], the same that an answer is measured on; with noise as the unquantized model's inputs."""
    noise = 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * x
    held_out = HeldOut(x.shape[1], False, x.device)
    held_out.add(x, x + noise)
    return CalibrationStats(x.T @ x / len(x), held_out.finish(), len(x), noise.T @ x / len(x))


def loss(weight: torch.Tensor, dense: torch.Tensor, x: torch.Tensor) -> float:
    """Σ|(W - Q) x|² over Σ|W x|², in float64; of what is zero, over 1."""
    off, whole = (float((x.double() @ matrix.double().T).square().sum()) for matrix in (weight - dense, weight))
    return off / (whole or 1.0)
