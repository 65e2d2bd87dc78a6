"""What the ops compute, against textbook loops and formulas written independently of the reference."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from qtool import ops
from tests.ops import cases


def solve_blocks(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int,
                 bits: int, block: int) -> torch.Tensor:
    """Codes of all columns by solve_columns: H = R Rᵀ with R upper triangular, one product between blocks."""
    factor = torch.linalg.cholesky(hessian.double().flip(0, 1)).flip(0, 1)
    factor = (factor / factor.diagonal()).float()
    columns = weight.shape[1]
    groups = (torch.arange(columns) // group).to(torch.int32)
    codes, left = torch.empty(weight.shape, dtype=torch.uint8), torch.empty_like(weight)
    for start in range(0, columns, block):
        here = slice(start, min(start + block, columns))
        shift = left[:, :start] @ factor[:start, here]
        codes[:, here], left[:, here] = ops.solve_columns(weight[:, here], shift, factor[here, here], scale, zero,
                                                          groups[here], bits)
    return codes


def textbook_gptq(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int,
                  bits: int) -> torch.Tensor:
    """Column by column with the Cholesky factor of the inverse, in float64, as the paper has it."""
    weight = weight.double().clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for j in range(weight.shape[1]):
        step, offset = scale[:, j // group].double(), zero[:, j // group].double()
        code = ((weight[:, j] / step).round() + offset).clamp(0, 2**bits - 1)
        codes[:, j] = code.to(torch.uint8)
        error = (weight[:, j] - (code - offset) * step) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return codes


def loss(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int,
         hessian: torch.Tensor) -> torch.Tensor:
    """(W - Q) H (W - Q)ᵀ of each row, float64."""
    off = (weight - ops.dequantize_affine(codes, scale, zero, group)).double()
    return ((off @ hessian.double()) * off).sum(1)


@pytest.mark.parametrize("bits, group, block", [(4, 32, 32), (3, 32, 128), (4, 96, 40), (2, 16, 96), (4, 32, 1)])
def test_solve_columns_is_gptq(bits: int, group: int, block: int) -> None:
    weight, hessian = cases.weights(40, 96), cases.hessian(96)
    scale, zero = ops.fit_affine(weight, hessian.diagonal(), group, bits, False, torch.float16)
    codes = solve_blocks(weight, hessian, scale, zero, group, bits, block)
    textbook = textbook_gptq(weight, hessian, scale, zero, group, bits)
    # a tie decided otherwise in float32 changes the rest of its row, so a row may differ, but not its loss by much
    assert (codes == textbook).all(1).float().mean() >= 0.9
    ours, theirs = (loss(weight, one, scale, zero, group, hessian).sum() for one in (codes, textbook))
    assert abs(ours - theirs) <= 0.02 * theirs
    nearest = ops.round_affine(weight, scale, zero, group, bits)
    assert ours < 0.9 * loss(weight, nearest, scale, zero, group, hessian).sum()


def test_block_size_changes_nothing_but_rounding() -> None:
    weight, hessian = cases.weights(40, 96), cases.hessian(96)
    scale, zero = ops.fit_affine(weight, hessian.diagonal(), 32, 4, True, torch.bfloat16)
    one, other = (solve_blocks(weight, hessian, scale, zero, 32, 4, block) for block in (16, 96))
    assert (one == other).all(1).float().mean() >= 0.9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refine_never_raises_the_loss_and_ends_in_an_optimum(bits: int) -> None:
    weight, hessian, group = cases.weights(30, 64), cases.hessian(64), 32
    scale, zero = ops.fit_affine(weight, hessian.diagonal(), group, bits, False, torch.float16)
    codes = ops.round_affine(weight, scale, zero, group, bits)
    groups = (torch.arange(64) // group).to(torch.int32)
    before = first = loss(weight, codes, scale, zero, group, hessian)
    for _ in range(30):
        gradient = (weight - ops.dequantize_affine(codes, scale, zero, group)) @ hessian
        old = ops.dequantize_affine(codes, scale, zero, group)
        codes, delta = ops.refine_columns(gradient, hessian, codes, scale, zero, groups, bits)
        torch.testing.assert_close(ops.dequantize_affine(codes, scale, zero, group) - old, delta)
        after = loss(weight, codes, scale, zero, group, hessian)
        assert (after <= before * (1 + 1e-5) + 1e-9).all()
        before = after
        if not delta.any():
            break
    assert not delta.any() and before.sum() < 0.95 * first.sum()
    for j, move in itertools.product(range(0, 64, 7), (-1, 1)):  # no single step of a code is better
        moved = codes.int()
        moved[:, j] = (moved[:, j] + move).clamp(0, 2**bits - 1)
        assert (loss(weight, moved.to(torch.uint8), scale, zero, group, hessian) >= before * (1 - 1e-5) - 1e-9).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_plain_fit_is_absmax_and_minmax(bits: int) -> None:
    weight, ones = cases.weights(20, 64).abs() - 0.3, torch.ones(64)
    tile = weight.reshape(20, 2, 32)
    low, high, largest = tile.amin(-1), tile.amax(-1), tile.abs().amax(-1)
    scale, zero = ops.fit_affine(weight, ones, 32, bits, True, torch.float32, 1, signed=True, rounds=0)
    torch.testing.assert_close(scale.abs(), largest / 2 ** (bits - 1))
    codes = ops.round_affine(weight, scale, zero, 32, bits).reshape(20, 2, 32)
    assert (codes.gather(-1, tile.abs().argmax(-1, True)) == 0).all()  # the longer side is where code 0 lies
    scale, zero = ops.fit_affine(weight, ones, 32, bits, True, torch.float32, 1, signed=False, rounds=0)
    torch.testing.assert_close(scale, largest / ((2**bits - 1) / 2))
    assert (zero == 2 ** (bits - 1)).all()
    scale, zero = ops.fit_affine(weight, ones, 32, bits, False, torch.float32, 1, rounds=0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    torch.testing.assert_close(scale, (high - low) / (2**bits - 1))
    assert torch.equal(zero, (-low / scale).round().clamp(0, 2**bits - 1).to(torch.uint8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_and_refit_lower_the_error(bits: int, symmetric: bool) -> None:
    weight, weighting = cases.weights(50, 128), cases.importance(128)

    def error(steps: int, rounds: int) -> torch.Tensor:
        scale, zero = ops.fit_affine(weight, weighting, 32, bits, symmetric, torch.float16, steps, rounds=rounds)
        codes = ops.round_affine(weight, scale, zero, 32, bits)
        off = (weight - ops.dequantize_affine(codes, scale, zero, 32)).double()
        return (off * off * weighting).reshape(50, 4, 32).sum(-1)

    plain, searched, refitted = error(1, 0), error(24, 0), error(24, 2)
    assert (searched <= plain * (1 + 1e-5)).all() and (refitted <= searched * (1 + 1e-5)).all()
    assert searched.sum() < 0.95 * plain.sum() and refitted.sum() < searched.sum()


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype, digits", [(torch.float16, 10), (torch.bfloat16, 7)])
def test_scales_are_rounded_half_to_even(dtype: torch.dtype, digits: int, device: str) -> None:
    ties = 1 + torch.arange(1, 2 ** (digits + 1), 2) * 2.0 ** -(digits + 1)  # each halfway between two neighbours
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (0.0, 9.0)]
    small = torch.arange(1, 200) * 2.0**-25 if dtype is torch.float16 else ties[:0]  # subnormal halves of 2^-24
    wanted = torch.cat([ties, *near, small])
    weight = torch.stack([wanted * 8, wanted], 1).to(device)  # 4 bits: scale = largest / 8
    scale, _ = ops.fit_affine(weight, torch.ones(2, device=device), 2, 4, True, dtype, 1, rounds=0)
    rounded = wanted.to(dtype).float()
    assert torch.equal(scale.cpu()[:, 0].abs(), torch.where(rounded == 0, 2.0**-24, rounded))


def test_a_group_of_zeros() -> None:
    for symmetric, zero in ((True, 8), (False, 0)):
        scale, point = ops.fit_affine(torch.zeros(3, 32), torch.ones(32), 16, 4, symmetric, torch.float16)
        assert (scale == 1).all() and (point == zero).all()


@pytest.mark.parametrize("device", cases.DEVICES)
def test_the_first_of_equal_grids_wins(device: str) -> None:
    weight, nothing = cases.weights(9, 32).to(device), torch.zeros(32, device=device)
    for symmetric in (True, False):
        fit = functools.partial(torch.ops.qtool.fit_affine, weight, nothing, 16, 4, symmetric, 0)
        assert cases.same(fit(24, 0.4, True, 2), fit(1, 0.4, True, 0))


def test_columns_without_importance_count_a_little() -> None:
    """Where calibration text left a whole group at zero, it is fitted as with equal importances."""
    weight, importance = cases.weights(9, 32), torch.ones(32)
    equal = ops.fit_affine(weight, importance, 16, 4, True, torch.float16)
    importance[:16] = 0
    assert cases.same(ops.fit_affine(weight, importance, 16, 4, True, torch.float16), equal)


def test_rounding_is_half_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 3.49999, float("nan"), float("inf"), -float("inf"), 1e30]])
    codes = ops.round_affine(weight, torch.ones(1, 1), torch.full((1, 1), 8, dtype=torch.uint8), 10, 4)
    assert codes.tolist() == [[8, 10, 10, 8, 6, 11, 0, 15, 0, 15]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_whole_codes_fill_words_from_the_low_end(bits: int) -> None:
    each = 32 // bits
    codes = cases.codes(3, 2 * each, bits)
    fields = codes.reshape(3, 2, each).to(torch.int64) << (bits * torch.arange(each))
    words = fields.sum(-1)
    assert torch.equal(ops.pack_bits(codes, bits).to(torch.int64) & 0xFFFFFFFF, words)
    assert torch.equal(ops.pack_bits(codes.t(), bits, True), ops.pack_bits(codes, bits).t())


def test_three_bits_are_one_stream() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 8
    stream = sum(int(code) << (3 * place) for place, code in enumerate(codes[0]))
    words = [(stream >> shift) & 0xFFFFFFFF for shift in (0, 32, 64)]
    assert [word % 2**32 for word in ops.pack_bits(codes, 3)[0].tolist()] == words
