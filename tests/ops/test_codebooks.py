"""The ops on additive codebooks: the reference's bits on every instruction set, and what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import ops
from qtool.ops import codebooks, reference_codebooks
from tests.ops import cases

V = codebooks.VECTOR
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def books(count: int, words: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, words, V, generator=cases.generator(seed))


def codes(rows: int, groups: int, count: int, words: int) -> torch.Tensor:
    return torch.randint(0, words, (rows, groups, count), generator=cases.generator(3), dtype=torch.int32)


def problem(rows: int, groups: int, count: int, words: int) -> Arguments:
    """gradient, hessian, codes, scale, codebooks, roots."""
    square = cases.hessian(groups * V)
    blocks = [square[i:i + V, i:i + V] for i in range(0, groups * V, V)]
    roots = torch.stack([torch.linalg.cholesky(block) for block in blocks]) if groups else torch.zeros(0, V, V)
    scale = torch.rand(rows, generator=cases.generator(4)) + 0.1
    return (cases.weights(rows, groups * V), square, codes(rows, groups, count, words), scale, books(count, words),
            roots)


SIZES = {"rows": st.integers(0, 40), "groups": st.integers(0, 5), "count": st.integers(1, 4),
         "words": st.sampled_from([1, 2, 5, 16, 256])}
anything = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", ""])
@given(**SIZES, beam=st.sampled_from([1, 2, 7, 16]))
@anything
def test_refine_gives_the_bits_of_the_reference(isa: str, rows: int, groups: int, count: int, words: int,
                                                beam: int) -> None:
    if not ops.force_instruction_set(isa):
        pytest.skip(f"this processor has no {isa}")
    arguments = problem(rows, groups, count, words)
    assert cases.same(codebooks.refine_codebooks(*arguments, beam),
                      reference_codebooks.refine_codebooks(*arguments, beam))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@given(**SIZES)
@anything
def test_decode_and_sums(dtype: torch.dtype, rows: int, groups: int, count: int, words: int) -> None:
    made, chosen = books(count, words).to(dtype), codes(rows, groups, count, words)
    scale = cases.weights(rows, 1)[:, 0].to(dtype)
    values = codebooks.dequantize_codebooks(chosen, made, scale)
    assert cases.same(values, reference_codebooks.dequantize_codebooks(chosen, made.float(), scale.float()))
    picked = sum(made.double()[book][chosen[..., book].long()] for book in range(count))
    wanted = (picked * scale.double()[:, None, None]).reshape(rows, groups * V)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-4)
    sums = codebooks.sum_codewords(values, chosen, words)
    assert cases.same(sums, reference_codebooks.sum_codewords(values, chosen, words))
    # it is the transpose: <decode(c), v> = <c, sum(v)> with scales of 1
    other = cases.weights(rows, groups * V, 7)
    left = (codebooks.dequantize_codebooks(chosen, made, torch.ones(rows)).double() * other).sum()
    right = (made.double() * codebooks.sum_codewords(other, chosen, words)).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-3)


def test_what_is_not_contiguous() -> None:
    gradient, square, chosen, scale, made, roots = problem(20, 4, 2, 16)
    expected = codebooks.refine_codebooks(gradient, square, chosen, scale, made, roots, 3)
    strided = [one.repeat_interleave(2, -1)[..., ::2] for one in (gradient, square, chosen, scale, made, roots)]
    assert not any(one.is_contiguous() for one in strided)
    assert cases.same(codebooks.refine_codebooks(*strided, 3), expected)
    assert cases.same(codebooks.dequantize_codebooks(strided[2], strided[4], strided[3]),
                      codebooks.dequantize_codebooks(chosen, made, scale))
    assert cases.same(codebooks.sum_codewords(strided[0], strided[2], 16),
                      codebooks.sum_codewords(gradient, chosen, 16))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    arguments = problem(75, 6, 2, 256)

    def everything() -> tuple[torch.Tensor, ...]:
        moved = codebooks.refine_codebooks(*arguments, 4)
        return (*moved, codebooks.sum_codewords(arguments[0], moved[0], 256),
                codebooks.dequantize_codebooks(moved[0], arguments[4], arguments[3]))

    torch.set_num_threads(1)
    expected = everything()
    torch.set_num_threads(threads)
    assert cases.same(everything(), expected)


@given(rows=st.integers(1, 30), groups=st.integers(1, 5), count=st.integers(1, 3), beam=st.integers(1, 16))
@anything
def test_refine_never_raises_the_loss_and_says_what_changed(rows: int, groups: int, count: int, beam: int) -> None:
    target, square, chosen, scale, made, roots = problem(rows, groups, count, 16)
    before = codebooks.dequantize_codebooks(chosen, made, scale)
    found, change = codebooks.refine_codebooks((target - before) @ square, square, chosen, scale, made, roots, beam)
    after = codebooks.dequantize_codebooks(found, made, scale)
    torch.testing.assert_close(after - before, change, rtol=1e-5, atol=1e-5)

    def loss(values: torch.Tensor) -> torch.Tensor:
        off = (target - values).double()
        return ((off @ square.double()) * off).sum(1)

    assert (loss(after) <= loss(before) * (1 + 1e-5) + 1e-6).all()


def test_one_codebook_finds_the_nearest_of_all() -> None:
    """By brute force in float64, for a group alone."""
    target, square, chosen, scale, made, roots = problem(50, 1, 1, 256)
    before = codebooks.dequantize_codebooks(chosen, made, scale)
    found, _ = codebooks.refine_codebooks((target - before) @ square, square, chosen, scale, made, roots, 1)
    off = (target[:, None] - scale[:, None, None] * made[0]).double()
    best = torch.einsum("ncj,jk,nck->nc", off, square.double(), off)
    chosen_loss = best.gather(1, found[:, :, 0].long())[:, 0]
    torch.testing.assert_close(chosen_loss, best.min(1).values, rtol=1e-4, atol=1e-6)


def test_a_wide_beam_finds_the_best_of_all_pairs() -> None:
    """16 partial sums of 16 codewords are all there are."""
    target, square, chosen, scale, made, roots = problem(40, 1, 2, 16)
    before = codebooks.dequantize_codebooks(chosen, made, scale)
    losses = []
    for beam in (1, 16):
        found, _ = codebooks.refine_codebooks((target - before) @ square, square, chosen, scale, made, roots, beam)
        off = (target - codebooks.dequantize_codebooks(found, made, scale)).double()
        losses.append(((off @ square.double()) * off).sum(1))
    pairs = (made[0][:, None] + made[1][None]).reshape(-1, V)
    off = (target[:, None] - scale[:, None, None] * pairs).double()
    best = torch.einsum("ncj,jk,nck->nc", off, square.double(), off).min(1).values
    torch.testing.assert_close(losses[1], best, rtol=1e-4, atol=1e-6)
    assert (losses[0] > best * 1.001).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_keeps_its_codes(value: float) -> None:
    gradient, square, chosen, scale, made, roots = problem(20, 3, 2, 16)
    gradient[3, 5], made[1, 2, 3] = value, value
    actual = codebooks.refine_codebooks(gradient, square, chosen, scale, made, roots, 4)
    expected = reference_codebooks.refine_codebooks(gradient, square, chosen, scale, made, roots, 4)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1].nan_to_num(), expected[1].nan_to_num())
    assert int(actual[0].min()) >= 0 and int(actual[0].max()) < 16


@pytest.mark.parametrize(("place", "change", "words"), [
    (0, lambda one: one[:, :-1], "multiple of 8"), (0, lambda one: one.int(), "not floating point"),
    (1, lambda one: one[1:], "hessian is"), (2, lambda one: one.long(), "codes is torch.int64"),
    (2, lambda one: one[:, :1], "codes is"), (2, lambda one: one + 15, "for 16 codewords"),
    (2, lambda one: one - 16, "for 16 codewords"), (3, lambda one: one[1:], "scale is"),
    (4, lambda one: one[..., :7], "codebooks is"), (4, lambda one: one[:0], "codebooks is 0"),
    (5, lambda one: one[1:], "roots is"), (6, lambda one: 0, "beam is 0"), (6, lambda one: 17, "beam is 17"),
])
def test_wrong_arguments_are_named(place: int, change: object, words: str) -> None:
    arguments = [*problem(6, 3, 2, 16), 4]
    arguments[place] = change(arguments[place])  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        codebooks.refine_codebooks(*arguments)  # type: ignore[arg-type]


def test_too_many_columns_and_codes_out_of_range() -> None:
    with pytest.raises(ValueError, match="columns is 264"):
        codebooks.refine_codebooks(*problem(1, 33, 1, 2), 1)
    chosen, made = codes(4, 2, 2, 16), books(2, 16)
    for wrong in (chosen + 16, chosen - 16):
        with pytest.raises(ValueError, match="codewords"):
            codebooks.dequantize_codebooks(wrong, made, torch.ones(4))
        with pytest.raises(ValueError, match="codewords"):
            codebooks.sum_codewords(torch.ones(4, 16), wrong, 16)
    with pytest.raises(ValueError, match="words is 65537"):
        codebooks.sum_codewords(torch.ones(4, 16), chosen, 65537)
