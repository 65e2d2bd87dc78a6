"""Products with packed weights: against dequantizing and multiplying in float64, for every kind of weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import ops
from qtool.grids import fp8, nf4
from qtool.ops import packed, reference_packed
from qtool.ops.packed import PackedWeight
from tests.ops import cases

# sums of float32 in any order: this much of the sum of |x| |w|
TOLERANCE = 1e-6
KINDS = ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "uint4", "ternary", "nf4", "fp8"]
anything = settings(max_examples=12, deadline=None, derandomize=True)


def levels(kind: str) -> torch.Tensor:
    if kind == "nf4":
        return nf4.LEVELS
    if kind == "fp8":
        return fp8.GRID.levels
    if kind == "ternary":
        return torch.tensor([-1.0, 0.0, 1.0])
    count = 1 << int(kind[-1])
    return torch.arange(count).float() - (0 if kind[0] == "u" else count // 2)


def weight(kind: str, rows: int, groups: int, group: int, offset: bool) -> tuple[PackedWeight, torch.Tensor]:
    """A weight for running and the same in float32 [rows, groups * group]."""
    values = levels(kind)
    codes = torch.randint(len(values), (rows, groups * group), generator=cases.generator(1), dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=cases.generator(2)) + 0.1).half()
    shift = torch.randn(rows, groups, generator=cases.generator(3)) if offset else None
    dense = values[codes.long()] * scale.float().repeat_interleave(group, 1)
    if shift is not None:
        dense = dense + shift.repeat_interleave(group, 1)
    return packed.pack_codes(codes, values, scale, shift), dense


def assert_near(product: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, share: float = TOLERANCE) -> None:
    allowed = x.double().abs() @ dense.double().abs().T * share
    off = (product.double() - x.double() @ dense.double().T).abs()
    assert product.dtype == torch.float32 and (off <= allowed).all(), float((off - allowed).max())


@pytest.fixture(autouse=True)
def best_instructions() -> Iterator[None]:
    yield
    ops.force_instruction_set("")


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(0, 70), groups=st.integers(1, 3), group=st.sampled_from([8, 32, 64, 264]),
       tokens=st.sampled_from([0, 1, 2, 3, 5, 8, 9, 17]), offset=st.booleans())
@anything
def test_products(kind: str, rows: int, groups: int, group: int, tokens: int, offset: bool) -> None:
    small, dense = weight(kind, rows, groups, group, offset)
    x = torch.randn(tokens, groups * group, generator=cases.generator(4))
    share = TOLERANCE * (8 if kind == "uint4" else 1)  # there an offset takes most of the level away
    assert_near(packed.multiply_packed(x, small), x, dense, share)
    arguments = (*small.tensors, small.kind, small.rows, small.group, False)
    assert_near(reference_packed.multiply_packed(x, *arguments), x, dense, share)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(0, 70), columns=st.integers(1, 90), offset=st.booleans())
@anything
def test_weights_come_back(kind: str, rows: int, columns: int, offset: bool) -> None:
    """One group per row, any number of columns."""
    small, dense = weight(kind, rows, 1, columns, offset)
    back = packed.unpack_packed(small)[:columns, :rows].T
    expected = reference_packed.unpack_packed(*small.tensors, small.kind, small.padded, small.group, 0,
                                              len(small.words))[:columns, :rows].T
    assert torch.equal(back, expected)
    if kind == "uint4":
        torch.testing.assert_close(back, dense, rtol=1e-6, atol=1e-5)
    else:
        assert torch.equal(back, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_weights(dtype: torch.dtype) -> None:
    dense = cases.weights(75, 41).to(dtype)
    small = packed.pack_dense(dense)
    assert torch.equal(packed.unpack_packed(small)[:41, :75].T, dense.float())
    x = torch.randn(6, 41, generator=cases.generator(0))
    assert_near(packed.multiply_packed(x, small), x, dense.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(kind: str, isa: str) -> None:
    small, _ = weight(kind, 75, 5, 40, True)
    x = torch.randn(5, 200, generator=cases.generator(0))
    expected = [packed.multiply_packed(x, small), packed.multiply_packed(x, small, True), packed.unpack_packed(small)]
    if not ops.force_instruction_set(isa):
        pytest.skip(f"this processor has no {isa}")
    actual = [packed.multiply_packed(x, small), packed.multiply_packed(x, small, True), packed.unpack_packed(small)]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_strides(threads: int) -> None:
    small, dense = weight("int4", 200, 2, 64, False)
    x = torch.randn(128, 4, generator=cases.generator(0)).T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    product = packed.multiply_packed(x, small)
    torch.set_num_threads(before)
    assert_near(product, x, dense)
    assert torch.equal(product, packed.multiply_packed(x.contiguous(), small))


@pytest.mark.parametrize("kind", ["int4", "uint4", "nf4", "int8"])
@pytest.mark.parametrize("group", [32, 64, 16, 100])
def test_rounded_inputs(kind: str, group: int) -> None:
    """As the product of what the inputs become, and that is near to what they were."""
    small, dense = weight(kind, 75, 1 if group == 100 else 3, group, kind == "nf4")
    x = torch.randn(3, dense.shape[1], generator=cases.generator(4))
    x[1, :40] = 0
    seen = reference_packed.round_input(x)
    steps = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32)).abs().amax(-1) / 127
    assert ((seen - x).abs() <= steps.repeat_interleave(32, 1)[:, :x.shape[1]] * 0.50001).all()
    assert_near(packed.multiply_packed(x, small, True), seen, dense, TOLERANCE * (8 if kind == "uint4" else 1))


def test_what_cannot_be_packed() -> None:
    codes, scale = cases.codes(4, 24, 4), torch.ones(4, 2)
    with pytest.raises(ValueError, match="24 columns in 2 groups"):
        packed.pack_codes(codes, nf4.LEVELS, scale)
    with pytest.raises(ValueError, match="200 levels"):
        packed.pack_codes(codes, torch.linspace(0, 1, 200), scale[:, :1])
    small = packed.pack_codes(codes, nf4.LEVELS, scale[:, :1])
    with pytest.raises(ValueError, match=r"x \[1, 23\] for 24 columns"):
        packed.multiply_packed(torch.ones(1, 23), small)
