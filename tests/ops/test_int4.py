"""Layouts of 4-bit codes: the reference's bits on every instruction set, and a comparison that sees every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import ops
from qtool.ops import int4, reference_int4
from tests.ops import cases

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LAYOUTS = st.sampled_from([int4.ALONG_ROWS, int4.TRANSPOSED, int4.AWQ])
SIDES = st.one_of(st.integers(0, 6), st.sampled_from([15, 16, 17, 33])).map(lambda eights: 8 * eights)
anything = settings(max_examples=60, deadline=None, derandomize=True)


def laid_out(codes: torch.Tensor, layout: int) -> torch.Tensor:
    """As the formats are described, one code after the other."""
    rows, columns = codes.shape
    made = torch.zeros(int4.shape_of(rows, columns, layout), dtype=torch.int64)
    for n in range(rows):
        for k in range(columns):
            code = int(codes[n, k])
            if layout == int4.AWQ:
                made[k, n // 8] |= code << 4 * ORDER.index(n % 8)
            elif layout == int4.TRANSPOSED:
                made[k // 8, n] |= code << 4 * (k % 8)
            else:
                made[n, k // 8] |= code << 4 * (k % 8)
    return torch.where(made >= 1 << 31, made - (1 << 32), made).to(torch.int32)


@pytest.mark.parametrize("source", [int4.ALONG_ROWS, int4.TRANSPOSED, int4.AWQ])
@pytest.mark.parametrize("target", [int4.ALONG_ROWS, int4.TRANSPOSED, int4.AWQ])
def test_what_the_layouts_mean(source: int, target: int) -> None:
    codes = cases.codes(24, 40, 4)
    words, wanted = laid_out(codes, source), laid_out(codes, target)
    assert torch.equal(int4.repack(words, (24, 40), source, target), wanted)
    assert torch.equal(reference_int4.repack_int4(words, 24, 40, source, target), wanted)
    assert int4.same_codes(words, wanted, (24, 40), source, target)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", ""])
@given(rows=SIDES, columns=SIDES, source=LAYOUTS, target=LAYOUTS)
@anything
def test_the_bits_of_the_reference(isa: str, rows: int, columns: int, source: int, target: int) -> None:
    if not ops.force_instruction_set(isa):
        pytest.skip(f"this processor has no {isa}")
    words = reference_int4.repack_int4(ops.pack_bits(cases.codes(rows, columns, 4), 4), rows, columns, 0, source)
    made = torch.ops.qtool.repack_int4(words, rows, columns, source, target)
    assert cases.same(made, reference_int4.repack_int4(words, rows, columns, source, target))
    assert int4.same_codes(words, made, (rows, columns), source, target)
    assert cases.same(int4.repack(made, (rows, columns), target, source), words)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@given(rows=SIDES.filter(bool), columns=SIDES.filter(bool), source=LAYOUTS, target=LAYOUTS, data=st.data())
@anything
def test_one_bit_that_differs_is_seen(isa: str, rows: int, columns: int, source: int, target: int,
                                      data: st.DataObject) -> None:
    if not ops.force_instruction_set(isa):
        pytest.skip(f"this processor has no {isa}")
    words = reference_int4.repack_int4(ops.pack_bits(cases.codes(rows, columns, 4), 4), rows, columns, 0, source)
    made = int4.repack(words, (rows, columns), source, target).clone()
    made.view(-1)[data.draw(st.integers(0, made.numel() - 1))] ^= torch.tensor(
        1 << data.draw(st.integers(0, 31)), dtype=torch.int64).to(torch.int32)
    assert not int4.same_codes(words, made, (rows, columns), source, target)
    differ = torch.ops.qtool.compare_int4(words, made, rows, columns, source, target)
    assert cases.same(differ, reference_int4.compare_int4(words, made, rows, columns, source, target))
    assert int(differ.sum()) == 1


def test_what_is_not_contiguous() -> None:
    words = ops.pack_bits(cases.codes(16, 64, 4), 4)
    strided = words.repeat_interleave(2, -1)[..., ::2]
    assert not strided.is_contiguous()
    made = int4.repack(strided, (16, 64), int4.ALONG_ROWS, int4.AWQ)
    assert cases.same(made, int4.repack(words, (16, 64), int4.ALONG_ROWS, int4.AWQ))
    assert int4.same_codes(strided, words.t(), (16, 64), int4.ALONG_ROWS, int4.TRANSPOSED)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    words = ops.pack_bits(cases.codes(136, 1024, 4), 4)
    torch.set_num_threads(1)
    expected = int4.repack(words, (136, 1024), int4.ALONG_ROWS, int4.AWQ)
    torch.set_num_threads(threads)
    assert cases.same(int4.repack(words, (136, 1024), int4.ALONG_ROWS, int4.AWQ), expected)
    assert int4.same_codes(words, expected, (136, 1024), int4.ALONG_ROWS, int4.AWQ)


WORDS = torch.zeros(16, 4, dtype=torch.int32)


@pytest.mark.parametrize("words, shape, source, target, told", [
    (WORDS, (16, 32), 0, 3, "target is 3"), (WORDS, (16, 32), -1, 0, "layout is -1"),
    (WORDS, (16, 36), 0, 1, "no multiples of 8"), (WORDS, (12, 32), 0, 1, "no multiples of 8"),
    (WORDS, (16, 40), 0, 1, r"not int32 \[16, 5\]"), (WORDS.long(), (16, 32), 0, 1, "words is torch.int64"),
    (WORDS, (16, 32), 1, 0, r"not int32 \[4, 16\]"), (WORDS, (16, 32), 2, 0, r"not int32 \[32, 2\]"),
])
def test_wrong_arguments(words: torch.Tensor, shape: tuple[int, int], source: int, target: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        int4.repack(words, shape, source, target)
