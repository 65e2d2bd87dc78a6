"""Every op gives the reference's bits, on every device, for any shape. The reference runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import ops
from qtool.ops import checks, reference, reference_levels
from tests.ops import cases

ROWS, BITS, GROUPS = st.integers(0, 40), st.integers(2, 8), st.integers(1, 4)
GRIDS = st.sampled_from([(True, True), (True, False), (False, False)])  # symmetric, signed
anything = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@given(rows=ROWS, groups=GROUPS, group=st.integers(1, 40), bits=BITS, kind=GRIDS, steps=st.integers(1, 8),
       rounds=st.integers(0, 2))
@anything
def test_fit_affine(device: str, dtype: torch.dtype, rows: int, groups: int, group: int, bits: int,
                    kind: tuple[bool, bool], steps: int, rounds: int) -> None:
    weight, weighting = cases.weights(rows, groups * group), cases.importance(groups * group)
    actual = ops.fit_affine(weight.to(device), weighting.to(device), group, bits, kind[0], dtype, steps, 0.4, kind[1],
                            rounds)
    expected = reference.fit_affine(weight, weighting, group, bits, kind[0], ops.SCALE_TYPES.index(dtype), steps, 0.4,
                                    kind[1], rounds)
    assert cases.same(actual, expected)
    scale = actual[0].cpu()
    assert torch.equal(scale, scale.to(dtype).float()) and (scale != 0).all() and scale.isfinite().all()


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("group", [600, 1536])
def test_fit_affine_with_long_groups(device: str, group: int) -> None:
    weight, weighting = cases.weights(18, group), cases.importance(group)
    actual = ops.fit_affine(weight.to(device), weighting.to(device), group, 4, False, torch.float16, 3, rounds=1)
    assert cases.same(actual, reference.fit_affine(weight, weighting, group, 4, False, 1, 3, 0.4, True, 1))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-8, 1e-5, 1e4, 1e10, 1e38])
def test_fit_affine_at_the_ends_of_float(device: str, dtype: torch.dtype, size: float) -> None:
    weight = (cases.weights(12, 32).double() * size).float()
    weight[3, 3], weight[4, 4], weight[5, 5], weight[6] = float("nan"), float("inf"), -float("inf"), float("nan")
    weighting = cases.importance(32)
    for symmetric, signed in ((True, True), (True, False), (False, False)):
        scale, zero = ops.fit_affine(weight.to(device), weighting.to(device), 16, 4, symmetric, dtype, 5, 0.4, signed)
        expected = reference.fit_affine(weight, weighting, 16, 4, symmetric, ops.SCALE_TYPES.index(dtype), 5, 0.4,
                                        signed, 2)
        assert cases.same((scale, zero), expected)
        assert scale.isfinite().all() and (scale != 0).all() and torch.equal(scale, scale.to(dtype).float())
        actual = ops.round_affine(weight.to(device), scale, zero, 16, 4)
        assert cases.same(actual, reference.round_affine(weight, *expected, 16, 4))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@given(rows=ROWS, groups=GROUPS, group=st.integers(1, 70), bits=BITS)
@anything
def test_round_and_dequantize(device: str, dtype: torch.dtype, rows: int, groups: int, group: int, bits: int) -> None:
    weight = cases.weights(rows, groups * group).to(dtype)
    scale, zero = cases.grid(rows, groups, bits)
    codes = ops.round_affine(weight.to(device), scale.to(device), zero.to(device), group, bits)
    assert cases.same(codes, reference.round_affine(weight.float(), scale, zero, group, bits))
    values = ops.dequantize_affine(codes, scale.to(device), zero.to(device), group)
    assert cases.same(values, reference.dequantize_affine(codes.cpu(), scale, zero, group))


@pytest.mark.parametrize("device", cases.DEVICES)
@given(rows=ROWS, columns=st.integers(0, 256), groups=GROUPS, bits=BITS)
@anything
def test_solve_columns(device: str, rows: int, columns: int, groups: int, bits: int) -> None:
    factor = 0.1 * cases.weights(columns, columns, 2)  # full: what lies below the diagonal must not matter
    arguments = (cases.weights(rows, columns), 0.1 * cases.weights(rows, columns, 1), factor,
                 *cases.grid(rows, groups, bits), cases.group_index(columns, groups))
    actual = ops.solve_columns(*(tensor.to(device) for tensor in arguments), bits)
    assert cases.same(actual, reference.solve_columns(*arguments, bits))


@pytest.mark.parametrize("device", cases.DEVICES)
@given(rows=ROWS, columns=st.integers(0, 256), groups=GROUPS, bits=BITS, stuck=st.booleans())
@anything
def test_refine_columns(device: str, rows: int, columns: int, groups: int, bits: int, stuck: bool) -> None:
    hessian = cases.hessian(columns)
    if stuck and columns:
        hessian[0, 0], hessian[-1, -1] = 0, -1
    arguments = (cases.weights(rows, columns), hessian, cases.codes(rows, columns, bits),
                 *cases.grid(rows, groups, bits), cases.group_index(columns, groups))
    actual = ops.refine_columns(*(tensor.to(device) for tensor in arguments), bits)
    assert cases.same(actual, reference.refine_columns(*arguments, bits))
    if stuck and columns:
        assert not actual[1][:, [0, -1]].any()


LEVELS = st.sampled_from([2, 3, 15, 16, 17, 253, 256])  # 253: FP8's, which are found by arithmetic


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", ops.SCALE_TYPES)
@given(rows=ROWS, groups=GROUPS, group=st.integers(1, 40), count=LEVELS, steps=st.integers(1, 8),
       rounds=st.integers(0, 2), size=st.sampled_from([1e-42, 1e-12, 1.0, 1e5, 1e38]))
@anything
def test_fit_levels(device: str, dtype: torch.dtype, rows: int, groups: int, group: int, count: int, steps: int,
                    rounds: int, size: float) -> None:
    weight, weighting = (cases.weights(rows, groups * group).double() * size).float(), cases.importance(groups * group)
    if rows > 5:
        weight[4, 0], weight[5, -1] = float("nan"), float("inf")
    grid = cases.levels(count)
    actual = ops.fit_levels(weight.to(device), weighting.to(device), group, *(one.to(device) for one in grid), dtype,
                            steps, 0.5, rounds)
    top = float(grid[0].abs().max())
    expected = reference_levels.fit_levels(weight, weighting, *grid, group, ops.SCALE_TYPES.index(dtype), steps, 0.5,
                                           top, rounds)
    assert cases.same(actual, expected)
    scale = actual.cpu()
    assert torch.equal(scale, scale.to(dtype).float()) and (scale != 0).all() and scale.isfinite().all()


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@given(rows=ROWS, groups=GROUPS, group=st.integers(1, 70), count=LEVELS)
@anything
def test_round_and_dequantize_levels(device: str, dtype: torch.dtype, rows: int, groups: int, group: int,
                                     count: int) -> None:
    weight, scale = cases.weights(rows, groups * group).to(dtype), cases.grid(rows, groups, 4)[0]
    if rows:
        weight[0, 0] = float("nan")
    values, edges = cases.levels(count)
    codes = ops.round_levels(weight.to(device), scale.to(device), values.to(device), edges.to(device), group)
    assert cases.same(codes, reference_levels.round_levels(weight.float(), scale, values, edges, group))
    found = ops.dequantize_levels(codes, scale.to(device), values.to(device), group)
    assert cases.same(found, reference_levels.dequantize_levels(codes.cpu(), scale, values, group))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_every_edge_and_level_of_fp8(device: str) -> None:
    levels, edges = cases.levels(253)
    points = torch.cat([levels, edges, edges.nextafter(torch.tensor(torch.inf)), torch.tensor(
        [torch.inf, -torch.inf, torch.nan, -0.0, 1e-30, -1e-30, 448.1, 464.0, 1e9, -1e9])])
    weight = torch.cat([points, -points])[None]
    codes = ops.round_levels(weight.to(device), torch.ones(1, 1, device=device), levels.to(device), edges.to(device),
                             weight.shape[1]).cpu()
    assert torch.equal(codes, reference_levels.round_levels(weight, torch.ones(1, 1), levels, edges, weight.shape[1]))
    known = weight.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(levels[codes.long()][~weight.isnan()], known[~weight.isnan()])


@pytest.mark.parametrize("device", cases.DEVICES)
@given(rows=ROWS, columns=st.integers(0, 256), groups=GROUPS, count=LEVELS)
@anything
def test_solve_levels(device: str, rows: int, columns: int, groups: int, count: int) -> None:
    arguments = (cases.weights(rows, columns), 0.1 * cases.weights(rows, columns, 1), 0.1 * cases.weights(columns,
                 columns, 2), cases.grid(rows, groups, 4)[0], *cases.levels(count), cases.group_index(columns, groups))
    actual = ops.solve_levels(*(tensor.to(device) for tensor in arguments))
    assert cases.same(actual, reference_levels.solve_levels(*arguments))


@pytest.mark.parametrize("device", cases.DEVICES)
@given(rows=ROWS, columns=st.integers(0, 256), groups=GROUPS, count=LEVELS, stuck=st.booleans())
@anything
def test_refine_levels(device: str, rows: int, columns: int, groups: int, count: int, stuck: bool) -> None:
    hessian = cases.hessian(columns)
    if stuck and columns:
        hessian[0, 0], hessian[-1, -1] = 0, -1
    codes = (cases.codes(rows, columns, 8).int() % count).to(torch.uint8)
    arguments = (cases.weights(rows, columns), hessian, codes, cases.grid(rows, groups, 4)[0], *cases.levels(count),
                 cases.group_index(columns, groups))
    actual = ops.refine_levels(*(tensor.to(device) for tensor in arguments))
    assert cases.same(actual, reference_levels.refine_levels(*arguments))
    if stuck and columns:
        assert not actual[1][:, [0, -1]].any()


@pytest.mark.parametrize("device", cases.DEVICES)
@given(tokens=st.integers(0, 70), outputs=st.integers(0, 70), columns=st.integers(0, 300))
@anything
def test_multiply_int8(device: str, tokens: int, outputs: int, columns: int) -> None:
    arguments = (cases.signed_codes(tokens, columns), cases.signed_codes(outputs, columns, 1),
                 cases.weights(tokens, 1)[:, 0], cases.weights(outputs, 1, 2)[:, 0])
    actual = ops.multiply_int8(*(tensor.to(device) for tensor in arguments))
    assert cases.same(actual, reference.multiply_int8(*arguments))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_multiply_int8_at_the_end_of_32_bits(device: str) -> None:
    """The largest sum that there can be, where float32 would have lost digits on the way."""
    columns = checks.MAX_PRODUCTS - 1
    left, right = torch.full((1, columns), -128, dtype=torch.int8), torch.full((3, columns), -128, dtype=torch.int8)
    right[1], right[2, 0] = 127, -127
    one = torch.ones(3, device=device)
    sums = [columns * 128 * 128, -columns * 128 * 127, columns * 128 * 128 - 128]
    assert sums[0] < 2**31
    actual = ops.multiply_int8(left.to(device), right.to(device), one[:1], one)
    assert cases.same(actual, torch.tensor([sums], dtype=torch.float64).float())


@pytest.mark.parametrize("device", cases.DEVICES)
@given(bits=BITS, other=st.integers(0, 9), count=st.integers(0, 150), transposed=st.booleans(),
       seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_packing(device: str, bits: int, other: int, count: int, transposed: bool, seed: int) -> None:
    codes = cases.codes(*((count, other) if transposed else (other, count)), bits, seed)
    packed = ops.pack_bits(codes.to(device), bits, transposed)
    assert cases.same(packed, reference.pack_bits(codes, bits, transposed))
    assert cases.same(ops.unpack_bits(packed, bits, count, transposed), codes)
    assert cases.same(reference.unpack_bits(packed.cpu(), bits, count, transposed), codes)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_any_strides(device: str) -> None:
    weight, other = cases.weights(96, 40).t().to(device), cases.weights(80, 192)[::2, ::2].to(device)
    scale, zero = (tensor.to(device) for tensor in cases.grid(40, 3, 4))
    wide = scale.repeat_interleave(2, 1)[:, ::2], zero.repeat_interleave(2, 1)[:, ::2]
    weighting, index = cases.importance(192)[::2].to(device), cases.group_index(192, 3)[::2].to(device)
    square = cases.hessian(192)[::2, ::2].to(device)
    codes = cases.codes(96, 80, 4).t()[::2].to(device)
    levels = tuple(one.to(device).repeat_interleave(2)[::2] for one in cases.levels(16))
    words = ops.pack_bits(codes, 4)
    spread = words.repeat_interleave(3, 1)[:, ::3]
    left, right = cases.signed_codes(40, 96).t().to(device), cases.signed_codes(60, 80)[::3, ::2].to(device)
    rows = cases.weights(96, 2)[:, 0].to(device), cases.weights(20, 2)[:, 1].to(device)
    calls = [
        (ops.multiply_int8, (left, right, *rows)),
        (ops.fit_affine, (weight, weighting, 32, 4, True, torch.float16)),
        (ops.round_affine, (weight, *wide, 32, 4)), (ops.dequantize_affine, (codes, *wide, 32)),
        (ops.solve_columns, (weight, other, square, *wide, index, 4)),
        (ops.refine_columns, (weight, square, codes, *wide, index, 4)),
        (ops.fit_levels, (weight, weighting, 32, *levels, torch.float8_e4m3fn)),
        (ops.round_levels, (weight, wide[0], *levels, 32)),
        (ops.dequantize_levels, (codes, wide[0], levels[0], 32)),
        (ops.solve_levels, (weight, other, square, wide[0], *levels, index)),
        (ops.refine_levels, (weight, square, codes, wide[0], *levels, index)),
        (ops.pack_bits, (codes, 4)), (ops.pack_bits, (codes, 4, True)), (ops.unpack_bits, (spread, 4, 96)),
    ]
    for op, arguments in calls:
        assert any(isinstance(one, torch.Tensor) and not one.is_contiguous() for one in arguments)
        plain = [one.contiguous() if isinstance(one, torch.Tensor) else one for one in arguments]
        assert cases.same(op(*arguments), op(*plain)), op.__name__
