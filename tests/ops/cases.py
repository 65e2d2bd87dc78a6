"""Matrices, grids and devices for the tests of the ops."""

from __future__ import annotations

import pytest
import torch

from qtool.grids import fp8

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of zeros and one without negative values among them."""
    weight = torch.randn(rows, columns, generator=generator(seed)) * torch.exp(torch.randn(rows, 1,
                                                                                           generator=generator(seed)))
    if rows > 2:
        weight[1] = 0
        weight[2] = weight[2].abs()
    return weight


def importance(columns: int) -> torch.Tensor:
    return torch.rand(columns, generator=generator(9)) + 0.01


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=generator(seed), dtype=torch.uint8)


def signed_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """int8, both ends among them."""
    made = torch.randint(-128, 128, (rows, columns), generator=generator(seed), dtype=torch.int8)
    made[:, ::7], made[:, 1::11] = -128, 127
    return made


def grid(rows: int, groups: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of both signs and any zero points, [rows, groups]."""
    zero = codes(rows, groups, bits, 4)
    scale = (torch.rand(rows, groups, generator=generator(3)) + 0.1) * 4 / 2**bits
    return torch.where(zero % 2 == 0, scale, -scale), zero


def levels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending levels of uneven distances, one of them zero, and the edges halfway between them; 253 are FP8's."""
    if count == 253:
        return fp8.GRID.levels, fp8.GRID.edges
    values = torch.randn(count, generator=generator(11)).sort().values
    values[count // 2] = 0
    values = values.sort().values
    return values, (values[1:] + values[:-1]) / 2


def hessian(columns: int, seed: int = 5) -> torch.Tensor:
    """Positive definite, with strong correlations."""
    mix = torch.randn(columns, columns, generator=generator(seed))
    return mix @ mix.T / columns + 0.05 * torch.eye(columns)


def group_index(columns: int, groups: int) -> torch.Tensor:
    """Groups in no order, as act-order gives them."""
    return torch.randint(0, groups, (columns,), generator=generator(6), dtype=torch.int32)


def same(actual: torch.Tensor | tuple[torch.Tensor, ...], expected: torch.Tensor | tuple[torch.Tensor, ...]) -> bool:
    """Equal shapes, types and bits (the sign of a zero aside), wherever they lie."""
    if isinstance(actual, torch.Tensor):
        actual = (actual,)
    if isinstance(expected, torch.Tensor):
        expected = (expected,)
    return len(actual) == len(expected) and all(
        one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
        for one, other in zip(actual, expected, strict=True))
