"""LLM.int8()'s product against loops written from the paper, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import ops
from qtool.activations import mixed_product
from tests.ops import cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ISAS = ["portable", "avx2", "avx512", ""]


def textbook(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, threshold: float) -> torch.Tensor:
    """Scalar by scalar: vector-wise quantization with outlier columns taken apart (arXiv 2208.07339, section 3)."""
    half, exact = x.half().tolist(), x.tolist()
    tokens, columns, outputs = len(x), x.shape[1], len(codes)
    apart = [threshold > 0 and any(abs(half[t][k]) >= threshold for t in range(tokens)) for k in range(columns)]
    product = torch.zeros(tokens, outputs, dtype=torch.float64)
    for t in range(tokens):
        small = [value for value in half[t] if not (threshold > 0 and abs(value) >= threshold)]
        largest = max(map(abs, small), default=0.0)
        for n in range(outputs):
            row, whole, broken = codes[n].tolist(), 0, 0.0
            for k in range(columns):
                if apart[k]:
                    weight = (codes[n, k].float() * (absmax[n] / 127)).to(x.dtype)
                    broken += exact[t][k] * float(weight)
                elif largest:
                    inverse = float(127 * torch.tensor(largest).reciprocal())  # float32, as the engine has it
                    whole += round(float(torch.tensor(half[t][k]) * inverse)) * row[k]
            product[t, n] = whole * largest * float(absmax[n]) / 127**2 + broken
    return product


def problem(dtype: torch.dtype, tokens: int, columns: int, outputs: int,
            seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs with a few large columns and a token of zeros; codes and scales of a weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, ::5] *= 4
    x[1::3] = 0
    codes = torch.randint(-127, 128, (outputs, columns), generator=generator, dtype=torch.int8)
    return x.to(dtype), codes, torch.rand(outputs, generator=generator) + 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@given(tokens=st.integers(0, 7), columns=st.integers(0, 40), outputs=st.integers(0, 9), seed=st.integers(0, 99),
       threshold=st.sampled_from([0.0, 0.5, 3.0, 6.0, 100.0]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_against_the_textbook(dtype: torch.dtype, tokens: int, columns: int, outputs: int, seed: int,
                              threshold: float) -> None:
    x, codes, absmax = problem(dtype, tokens, columns, outputs, seed)
    kept = x.clone()
    actual = mixed_product(x, codes, absmax, threshold)
    assert actual.dtype == torch.float32 and torch.equal(x, kept)
    torch.testing.assert_close(actual.double(), textbook(x, codes, absmax, threshold), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_give_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    x, codes, absmax = problem(dtype, 33, 217, 75, 0)
    wide = x.repeat_interleave(2, 1)[:, ::2], codes.t().contiguous().t()
    assert not any(one.is_contiguous() for one in wide)
    expected = mixed_product(x, codes, absmax, 6.0)
    if not ops.force_instruction_set(isa):
        pytest.skip(f"no {isa or 'compiled'} kernels here")
    try:
        assert cases.same(mixed_product(x, codes, absmax, 6.0), expected)
        assert cases.same(mixed_product(*wide, absmax, 6.0), expected)
    finally:
        ops.force_instruction_set("")


def test_outliers_are_not_rounded() -> None:
    """One feature of 1000 ruins the scale of its token, unless it is taken apart."""
    x, codes, absmax = problem(torch.float32, 8, 256, 64, 1)
    x[0] = torch.randn(256, generator=torch.Generator().manual_seed(2))
    x[0, 7] = 1000
    exact = x.double() @ (codes.double() * absmax.double()[:, None] / 127).T
    apart, together = ((mixed_product(x, codes, absmax, threshold) - exact)[0].norm() for threshold in (6.0, 0.0))
    assert apart < 0.01 * together


def test_values_that_are_no_numbers() -> None:
    """An infinity is an outlier; without a threshold, or as a NaN, it spoils its own token and no other."""
    x, codes, absmax = problem(torch.float32, 4, 32, 8, 3)
    x[0] = 1.0
    plain = [mixed_product(x, codes, absmax, threshold) for threshold in (0.0, 6.0)]
    for value, threshold, before in ((math.inf, 0.0, plain[0]), (math.nan, 0.0, plain[0]), (math.nan, 6.0, plain[1])):
        spoilt = x.clone()
        spoilt[0, 1] = value
        product = mixed_product(spoilt, codes, absmax, threshold)
        assert product[0].isnan().all() and torch.equal(product[1:], before[1:])
    x[0, 1], codes[:, 1] = 1e6, 1  # infinite in float16, but not in the dtype of the model
    assert mixed_product(x, codes, absmax, 6.0).isfinite().all()
