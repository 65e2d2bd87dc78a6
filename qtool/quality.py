"""How far a quantized weight is from the original: the figures that the manifest keeps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def output_error(weight: torch.Tensor, difference: torch.Tensor, energy: Callable[[torch.Tensor], float]) -> float:
    """Relative squared error of the outputs for W, D [N, K]; energy(M) is the mean of |M x|² over the inputs x."""
    reference = energy(weight)
    return energy(difference) / reference if reference > 0 else 0.0


def energy_under(hessian: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """M [N, K] -> tr(M H Mᵀ), for H [K, K], all float32."""
    return lambda matrix: float(((matrix @ hessian) * matrix).sum(dtype=torch.float64))


def weight_error(weight: torch.Tensor, difference: torch.Tensor) -> float:
    """Relative squared error of the weights, |D|² / |W|²."""
    reference = square_sum(weight)
    return square_sum(difference) / reference if reference > 0 else 0.0


def sqnr_db(relative_error: float) -> float | None:
    """Signal to quantization noise ratio in decibels; None where the error is zero (infinite)."""
    return -10 * math.log10(relative_error) if relative_error > 0 else None


def square_sum(matrix: torch.Tensor) -> float:
    """Σ of the squares of all elements: rows in the matrix's own type, their sum in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=-1).double().square().sum())  # makes no copy of the matrix
