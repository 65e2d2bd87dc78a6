"""Rotations: orthogonal, flat, the same everywhere, and applied by factors as the dense matrix would be."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import hadamard

HADAMARD_SIZES = [1, 2, 4, 12, 20, 28, 36, 60, 64, 80, 96, 112, 128, 576, 640, 768, 896, 960, 1152, 1536, 2304, 2560,
                  3584, 5120, 5376]


def dense(rotation: hadamard.Rotation) -> torch.Tensor:
    return torch.diag(rotation.signs) @ functools.reduce(torch.kron, rotation.factors)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 76, 84, 108])
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = hadamard.paley(order) * math.sqrt(order)
    assert set(matrix.round(decimals=9).unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", HADAMARD_SIZES)
def test_widths_of_real_models_have_flat_rotations(size: int) -> None:
    """|R_ij| = 1 / sqrt(n) everywhere: the product of the factors' entries is."""
    rotation = hadamard.rotation(size, 0)
    assert math.prod(len(factor) for factor in rotation.factors) == size
    for factor in rotation.factors:
        torch.testing.assert_close(factor.abs(), torch.full_like(factor, 1 / math.sqrt(len(factor))))
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5))
def test_every_size_is_orthogonal_and_nearly_flat(size: int, seed: int) -> None:
    rotation = hadamard.rotation(size, seed)
    x = torch.randn(3, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = dense(rotation)
    torch.testing.assert_close(rotation.turn(x).reshape(6, size), x.reshape(6, size) @ matrix)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert float(matrix.abs().max()) <= math.sqrt(2 / size) + 1e-12


def test_signs_follow_the_seed() -> None:
    """Fixed values: another generator or another machine would give other files."""
    assert torch.equal(hadamard.rotation(64, 3).signs, hadamard.rotation(64, 3).signs)
    assert not torch.equal(hadamard.rotation(64, 3).signs, hadamard.rotation(64, 4).signs)
    assert hadamard.rotation(12, 0).signs.tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1]


def test_a_rotation_says_what_it_is() -> None:
    assert str(hadamard.rotation(576, 0)) == "hadamard 36 x 16"
    assert str(hadamard.rotation(50, 0)) == "hartley 25 x 2"
