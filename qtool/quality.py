"""How far a quantized weight is from the original: the figures that the manifest keeps."""

from __future__ import annotations

import math

import torch


def output_error(weight: torch.Tensor, difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative squared error of the outputs, tr(D H Dᵀ) / tr(W H Wᵀ), for W, D [N, K] and H [K, K], all float32."""
    reference = _energy(weight, hessian)
    return _energy(difference, hessian) / reference if reference > 0 else 0.0


def weight_error(weight: torch.Tensor, difference: torch.Tensor) -> float:
    """Relative squared error of the weights, |D|² / |W|²."""
    reference = _square_sum(weight)
    return _square_sum(difference) / reference if reference > 0 else 0.0


def sqnr_db(relative_error: float) -> float | None:
    """Signal to quantization noise ratio in decibels; None where the error is zero (infinite)."""
    return -10 * math.log10(relative_error) if relative_error > 0 else None


def _energy(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((matrix @ hessian) * matrix).sum(dtype=torch.float64))


def _square_sum(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2  # converts as it goes, makes no copy
