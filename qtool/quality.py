"""How far a quantized weight is from the original: the figures that the manifest keeps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

SMALL, LARGE = 1e-12, 1e12  # between these, float32 holds squares, sums of many and products with moments


def output_error(weight: torch.Tensor, difference: torch.Tensor,
                 energy: Callable[[torch.Tensor], float]) -> float | None:
    """Relative squared error of the outputs for W, D [N, K]; energy(M) is the mean of |M x|² over the inputs x.

    None where all outputs are zero.
    """
    unit = unit_of(weight)
    if unit != 1:
        weight, difference = weight / unit, difference / unit
    reference = energy(weight)
    return None if reference <= 0 else energy(difference) / reference


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
    """Σ of the squares of all elements [N, K]: rows in the matrix's own type, their sum in float64.

    Rows whose squares that type cannot hold are taken in float64.
    """
    norms = torch.linalg.vector_norm(matrix, dim=-1).double()  # makes no copy of the matrix
    lost = ~((norms > SMALL) & (norms < LARGE))
    if bool(lost.any()):
        low, high = matrix.aminmax(dim=-1)
        lost &= (low != 0) | (high != 0)
        norms[lost] = torch.linalg.vector_norm(matrix[lost].double(), dim=-1)
    return float(norms.square().sum())


def finite_or_worst(error: float) -> float:
    """An error to choose by: what overflowed is worse than all that did not."""
    return error if math.isfinite(error) else math.inf


def unit_of(matrix: torch.Tensor) -> float:
    """1, or of a matrix too large or small for products in float32 the power of two nearest to its largest value."""
    largest = max((abs(float(end)) for end in matrix.aminmax()), default=0.0) if matrix.numel() else 0.0
    if largest == 0 or SMALL < largest < LARGE or not math.isfinite(largest):
        return 1.0
    return 2.0 ** min(max(round(math.log2(largest)), -126), 126)
