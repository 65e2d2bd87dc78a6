"""Instruction sets and thread counts change no bit."""

from __future__ import annotations

import pytest
import torch

from qtool import ops
from tests.ops import cases

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="no compiled extension")


def everything(rows: int, columns: int, group: int, bits: int) -> list[torch.Tensor]:
    """What all ops say about one matrix."""
    weight, weighting = cases.weights(rows, columns), cases.importance(columns)
    groups = (torch.arange(columns) // group).to(torch.int32)
    square = cases.hessian(columns)
    results: list[torch.Tensor] = []
    for symmetric, signed, dtype in ((True, True, torch.bfloat16), (True, False, torch.float16),
                                     (False, False, torch.float32)):
        scale, zero = ops.fit_affine(weight, weighting, group, bits, symmetric, dtype, 7, signed=signed)
        codes = ops.round_affine(weight, scale, zero, group, bits)
        solved = ops.solve_columns(weight, 0.1 * weight, 0.1 * square, scale, zero, groups, bits)
        refined = ops.refine_columns(weight - solved[1], square, codes, scale, zero, groups, bits)
        packed = [ops.pack_bits(codes, bits), ops.pack_bits(codes, bits, True)]
        results += [scale, zero, codes, ops.dequantize_affine(codes, scale, zero, group), *solved, *refined, *packed,
                    ops.unpack_bits(packed[0], bits, columns), ops.unpack_bits(packed[1], bits, rows, True)]
    for count, dtype in ((16, torch.float8_e4m3fn), (253, torch.bfloat16), (255, torch.float8_e8m0fnu)):
        levels, edges = cases.levels(count)
        scale = ops.fit_levels(weight, weighting, group, levels, edges, dtype, 7)
        codes = ops.round_levels(weight, scale, levels, edges, group)
        solved = ops.solve_levels(weight, 0.1 * weight, 0.1 * square, scale, levels, edges, groups)
        refined = ops.refine_levels(weight - solved[1], square, codes, scale, levels, edges, groups)
        results += [scale, codes, ops.dequantize_levels(codes, scale, levels, group), *solved, *refined]
    results.append(ops.multiply_int8(cases.signed_codes(rows, columns), cases.signed_codes(rows + 3, columns, 1),
                                     weight[:, 0], cases.importance(rows + 3)))
    return results


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("shape", [(75, 192, 64, 4), (1, 30, 10, 3), (17, 256, 256, 2), (33, 77, 7, 8)])
def test_instruction_sets(isa: str, shape: tuple[int, int, int, int]) -> None:
    expected = everything(*shape)
    if not ops.force_instruction_set(isa):
        pytest.skip(f"this processor has no {isa}")
    assert isa in ops.backend()
    assert cases.same(tuple(everything(*shape)), tuple(expected))


def test_unknown_instruction_set() -> None:
    before = ops.backend()
    assert not ops.force_instruction_set("mmx")
    assert ops.backend() == before


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int) -> None:
    torch.set_num_threads(1)
    expected = everything(200, 128, 32, 4)
    torch.set_num_threads(threads)
    assert cases.same(tuple(everything(200, 128, 32, 4)), tuple(expected))
