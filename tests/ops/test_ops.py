"""Every op against its reference, on every device and instruction set there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import ops
from qtool.ops import reference

ISAS = ["portable", "avx2", "avx512"]
SHAPES = [(1, 32), (5, 64), (16, 96), (37, 192), (64, 128), (0, 64)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(not ops.native_available(), reason="no compiled extension")


@pytest.fixture
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ops.force_instruction_set("")


def weights(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    if rows > 2:
        weight[1] = 0
        weight[2] = weight[2].abs()
    return weight.to(dtype)


def importance(columns: int) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(9)) + 0.01


def grid(rows: int, columns: int, group: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (torch.rand(rows, columns // group, generator=torch.Generator().manual_seed(3)) + 0.1) / 2**bits
    zero = torch.randint(0, 2**bits, scale.shape, generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    return scale * torch.where(zero % 2 == 0, 1.0, -1.0), zero


def fit_cases() -> list[tuple[int, bool, bool, torch.dtype]]:
    return [(bits, symmetric, signed, dtype) for bits in (2, 3, 4, 8) for symmetric, signed in
            ((True, True), (True, False), (False, False)) for dtype in DTYPES]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits, symmetric, signed, dtype", fit_cases())
def test_fit_affine(bits: int, symmetric: bool, signed: bool, dtype: torch.dtype, device: str) -> None:
    for rows, columns in SHAPES:
        weight, weighting = weights(rows, columns).to(device), importance(columns).to(device)
        for steps, rounds in ((1, 0), (6, 2)):
            scale, zero = ops.fit_affine(weight, weighting, 32, bits, symmetric, dtype, steps, 0.4, signed, rounds)
            expected = reference.fit_affine(weight, weighting, 32, bits, symmetric, ops.SCALE_TYPES.index(dtype), steps,
                                            0.4, signed, rounds)
            assert torch.equal(scale, expected[0]) and torch.equal(zero, expected[1])
            assert torch.equal(scale, scale.to(dtype).float())
            assert (scale != 0).all() and scale.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_and_dequantize(dtype: torch.dtype, device: str) -> None:
    for rows, columns in SHAPES:
        for bits in (2, 3, 4, 5, 8):
            weight = weights(rows, columns, dtype=dtype).to(device)
            scale, zero = (tensor.to(device) for tensor in grid(rows, columns, 32, bits))
            codes = ops.round_affine(weight, scale, zero, 32, bits)
            assert torch.equal(codes, reference.round_affine(weight.float(), scale, zero, 32, bits))
            values = ops.dequantize_affine(codes, scale, zero, 32)
            assert torch.equal(values, reference.dequantize_affine(codes, scale, zero, 32))


def test_rounding_is_half_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 3.49999, float("nan"), float("inf")]])
    codes = ops.round_affine(weight, torch.ones(1, 1), torch.full((1, 1), 8, dtype=torch.uint8), 8, 4)
    assert codes.tolist()[0][:6] == [8, 10, 10, 8, 6, 11]
    assert codes.tolist()[0][7] == 15


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 7, 64, 128, 256])
def test_solve_columns(columns: int, device: str) -> None:
    for rows in (0, 1, 16, 33):
        weight, shift = weights(rows, columns, 1), 0.1 * weights(rows, columns, 2)
        factor = 0.3 * torch.randn(columns, columns, generator=torch.Generator().manual_seed(5)).triu(1)
        scale, zero = grid(rows, 96, 32, 4)
        index = (torch.arange(columns) % 3).to(torch.int32)
        arguments = [tensor.to(device) for tensor in (weight, shift, factor, scale, zero, index)]
        codes, residual = ops.solve_columns(*arguments, 4)
        expected = reference.solve_columns(*arguments, 4)
        assert torch.equal(codes, expected[0]) and torch.equal(residual, expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 7, 64, 128])
def test_refine_columns(columns: int, device: str) -> None:
    for rows in (0, 1, 16, 33):
        mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(5))
        hessian = mix @ mix.T / columns + 0.1 * torch.eye(columns)
        scale, zero = grid(rows, 96, 32, 4)
        index = (torch.arange(columns) % 3).to(torch.int32)
        codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
        gradient = weights(rows, columns, 1) @ hessian
        arguments = [tensor.to(device) for tensor in (gradient, hessian, codes, scale, zero, index)]
        moved, delta = ops.refine_columns(*arguments, 4)
        expected = reference.refine_columns(*arguments, 4)
        assert torch.equal(moved, expected[0]) and torch.equal(delta, expected[1])
        # monotone: with D = target - value, the loss changes by -2 delta g + delta H delta, which must not be positive
        change = (delta.cpu() @ hessian * delta.cpu()).sum(1) - 2 * (delta.cpu() * gradient).sum(1)
        assert (change <= 1e-4).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 9), st.integers(1, 150), st.booleans(), st.integers(0, 99))
def test_packing_round_trip(bits: int, other: int, count: int, transposed: bool, seed: int) -> None:
    shape = (count, other) if transposed else (other, count)
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = ops.pack_bits(codes, bits, transposed)
    assert torch.equal(packed, reference.pack_bits(codes, bits, transposed))
    assert torch.equal(ops.unpack_bits(packed, bits, count, transposed), codes)
    assert torch.equal(reference.unpack_bits(packed, bits, count, transposed), codes)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_on_a_gpu(transposed: bool) -> None:
    for bits in range(2, 9):
        codes = torch.randint(0, 2**bits, (77, 91), dtype=torch.uint8)
        packed = ops.pack_bits(codes.cuda(), bits, transposed)
        assert torch.equal(packed.cpu(), ops.pack_bits(codes, bits, transposed))
        assert torch.equal(ops.unpack_bits(packed, bits, 77 if transposed else 91, transposed).cpu(), codes)


def test_three_bits_are_one_stream() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 8
    stream = sum(int(code) << (3 * place) for place, code in enumerate(codes[0]))
    words = [(stream >> shift) & 0xFFFFFFFF for shift in (0, 32, 64)]
    assert [word % 2**32 for word in ops.pack_bits(codes, 3)[0].tolist()] == words


def test_any_strides() -> None:
    weight = weights(96, 40).t()
    scale, zero = grid(40, 96, 32, 4)
    assert torch.equal(ops.round_affine(weight, scale, zero, 32, 4),
                       ops.round_affine(weight.contiguous(), scale, zero, 32, 4))
    codes = torch.randint(0, 16, (96, 40), dtype=torch.uint8)
    assert torch.equal(ops.pack_bits(codes.t(), 4), ops.pack_bits(codes.t().contiguous(), 4))
    assert torch.equal(ops.pack_bits(codes[:, ::2], 4), ops.pack_bits(codes[:, ::2].contiguous(), 4))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_and_threads_give_the_same_bits(isa: str, restore: None) -> None:
    weight, weighting = weights(75, 192), importance(192)
    scale, zero = ops.fit_affine(weight, weighting, 64, 4, True, torch.bfloat16)
    codes = ops.round_affine(weight, scale, zero, 64, 4)
    solved = ops.solve_columns(weight, 0.1 * weight, 0.1 * torch.ones(192, 192).triu(1), scale, zero,
                               (torch.arange(192) // 64).to(torch.int32), 4)
    if not ops.force_instruction_set(isa):
        pytest.skip(f"this processor has no {isa}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        again = ops.fit_affine(weight, weighting, 64, 4, True, torch.bfloat16)
        assert torch.equal(again[0], scale) and torch.equal(again[1], zero)
        assert torch.equal(ops.round_affine(weight, scale, zero, 64, 4), codes)
        new = ops.solve_columns(weight, 0.1 * weight, 0.1 * torch.ones(192, 192).triu(1), scale, zero,
                                (torch.arange(192) // 64).to(torch.int32), 4)
        assert torch.equal(new[0], solved[0]) and torch.equal(new[1], solved[1])


def test_opcheck() -> None:
    weight, weighting = weights(8, 64), importance(64)
    scale, zero = grid(8, 64, 32, 4)
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    square, index = torch.eye(64), (torch.arange(64) // 32).to(torch.int32)
    calls = {
        "fit_affine": (weight, weighting, 32, 4, True, 0, 3, 0.5, True, 1),
        "round_affine": (weight, scale, zero, 32, 4), "dequantize_affine": (codes, scale, zero, 32),
        "solve_columns": (weight, weight, square, scale, zero, index, 4),
        "refine_columns": (weight, square, codes, scale, zero, index, 4),
        "pack_bits": (codes, 4, False), "unpack_bits": (torch.zeros(8, 8, dtype=torch.int32), 4, 64, False),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.qtool, name).default, arguments)


@pytest.mark.parametrize("call, words", [
    (lambda: ops.fit_affine(torch.ones(2, 30), torch.ones(30), 16, 4, True, torch.float32), "does not divide 30"),
    (lambda: ops.fit_affine(torch.ones(2, 32), torch.ones(31), 16, 4, True, torch.float32), "importance"),
    (lambda: ops.fit_affine(torch.ones(2, 32), torch.ones(32), 16, 9, True, torch.float32), "bits is 9"),
    (lambda: ops.round_affine(torch.ones(2, 32), torch.ones(2, 1), torch.ones(2, 1), 32, 4), "uint8"),
    (lambda: ops.pack_bits(torch.ones(3, dtype=torch.uint8), 4), "two dimensions"),
    (lambda: ops.unpack_bits(torch.ones(3, 2, dtype=torch.int32), 4, 99), "cannot hold 99"),
    (lambda: ops.solve_columns(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8, 8), torch.ones(2, 1),
                               torch.ones(2, 1, dtype=torch.uint8), torch.full((8,), 3, dtype=torch.int32), 4),
     "group_index 3..3 for 1 groups"),
])
def test_wrong_arguments(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
