"""The ops on GGUF's blocks: the reference's bits in every instruction set, less error than ggml's own rounding."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import found, ops
from qtool.grids._levels import midpoints
from qtool.grids.ggml import MEMBERS
from qtool.ops import reference_blocks
from tests.ops import cases

few = settings(max_examples=6, deadline=None, derandomize=True)


def arguments(name: str, rows: int, blocks: int, steps: int, rounds: int, energy: float) -> tuple[object, ...]:
    grid = MEMBERS[name]
    columns = blocks * grid.super
    return (cases.weights(rows, columns), cases.importance(columns), grid.levels, midpoints(grid.levels), grid.super,
            grid.sub, grid.scales, grid.mins, steps, rounds, energy)


def by_reference(given: tuple[object, ...]) -> tuple[torch.Tensor, ...]:
    weight, importance, levels, edges, super_, sub, (low, high), mins, steps, rounds, energy = given  # type: ignore[misc]
    uniform = bool(torch.equal(levels, levels[0] + torch.arange(len(levels))))
    return reference_blocks.fit_blocks(weight, importance, levels, edges, super_, sub, low, high, mins, steps, rounds,
                                       energy, uniform)


@pytest.mark.parametrize("name", MEMBERS)
@given(rows=st.integers(0, 19), blocks=st.integers(1, 2), steps=st.integers(1, 5), rounds=st.integers(0, 2),
       energy=st.sampled_from([0.0, 1.5]))
@few
def test_fit_blocks(name: str, rows: int, blocks: int, steps: int, rounds: int, energy: float) -> None:
    given = arguments(name, rows, blocks, steps, rounds, energy)
    assert cases.same(ops.fit_blocks(*given), by_reference(given))  # type: ignore[arg-type]


@pytest.mark.skipif(not ops.native_available(), reason="no compiled extension")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets_change_no_bit(isa: str) -> None:
    expected = {name: ops.fit_blocks(*arguments(name, 21, 1, 4, 1, 0.5)) for name in MEMBERS}  # type: ignore[arg-type]
    try:
        if not ops.force_instruction_set(isa):
            pytest.skip(f"this processor has no {isa}")
        for name, answer in expected.items():
            assert cases.same(ops.fit_blocks(*arguments(name, 21, 1, 4, 1, 0.5)), answer)  # type: ignore[arg-type]
    finally:
        ops.force_instruction_set("")


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e3])
def test_any_size_of_weights_gives_finite_scales(name: str, size: float) -> None:
    grid = MEMBERS[name]
    weight = cases.weights(9, 256) * size
    fitted = grid.fit(weight, grid.scheme, torch.float16, cases.importance(256), 5, True, 1)
    decoded = grid.decode(grid.encode(weight, fitted))
    assert decoded.isfinite().all()
    assert (weight - decoded).square().sum() <= 1.01 * weight.square().sum()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0"])
def test_less_error_than_rounding_without_a_search(name: str) -> None:
    """gguf's package quantizes these as llama.cpp does without an importance matrix."""
    weight = torch.randn(8, 512, generator=cases.generator(1))
    kind, grid = GGMLQuantizationType[name.upper()], MEMBERS[name]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    fitted = grid.fit(weight, grid.scheme, torch.float16, torch.ones(512), 19, True, 2)
    ours = grid.decode(grid.encode(weight, fitted))
    assert (weight - ours).square().sum() < 0.97 * (weight - theirs).square().sum()


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_more_search_is_never_worse_in_the_blocks(name: str) -> None:
    """Each round keeps what lowers the weighted error of a block."""
    grid, weight, importance = MEMBERS[name], cases.weights(12, 256), cases.importance(256)
    errors = []
    for rounds in (0, 1, 3):
        fitted = grid.fit(weight, grid.scheme, torch.float16, importance, 9, True, rounds)
        decoded = grid.decode(grid.encode(weight, fitted))
        errors.append(((weight - decoded).square() * importance).sum(1))
    assert (errors[1] <= errors[0] * 1.0001).all() and (errors[2] <= errors[1] * 1.0001).all()
    assert errors[2].sum() < errors[0].sum()


@given(parts=st.integers(1, 6), size=st.integers(1, 5), rows=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_fields_come_back(parts: int, size: int, rows: int, seed: int) -> None:
    """Any set of fields that do not overlap; and the reference's bits."""
    generator = cases.generator(seed)
    free = [(byte, bit) for byte in range(size) for bit in range(0, 8, 2)]
    wanted = [(part, first) for part in range(parts) for first in range(0, 8, 2)]
    order = torch.randperm(len(free), generator=generator).tolist()
    chosen = [(*wanted[i], 2, *free[j]) for i, j in zip(range(len(wanted)), order, strict=False)]
    fields = torch.tensor([(part, first, bits, byte, at) for part, first, bits, byte, at in chosen], dtype=torch.int32)
    mask = torch.zeros(parts, dtype=torch.uint8)
    for part, first, _, _, _ in chosen:
        mask[part] |= 3 << first
    values = torch.randint(0, 256, (rows, parts), generator=generator, dtype=torch.uint8)
    packed = ops.pack_fields(values, fields, size)
    assert cases.same(packed, reference_blocks.pack_fields(values, fields, size))
    assert torch.equal(ops.unpack_fields(packed, fields, parts), values & mask)
    assert cases.same(ops.unpack_fields(packed, fields, parts), reference_blocks.unpack_fields(packed, fields, parts))


@pytest.mark.parametrize("field", [(2, 0, 4, 0, 0), (0, 0, 4, 3, 0), (0, 6, 4, 0, 0), (0, 0, 4, 0, 6),
                                   (-1, 0, 1, 0, 0)])
def test_fields_outside_of_a_block_are_refused(field: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="outside its block"):
        ops.pack_fields(torch.zeros(3, 2, dtype=torch.uint8), torch.tensor([field], dtype=torch.int32), 3)


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q2_k", "q3_k", "iq4_xs", "q4_0", "q4_1", "iq4_nl", "tq2_0"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_refit_lowers_the_layer_loss_and_keeps_the_error_up_to_date(name: str, seed: int) -> None:
    grid, columns = found.load("grids", name), 512
    weight = torch.randn(7, columns, generator=cases.generator(seed))
    hessian = cases.hessian(columns, seed + 5)
    start = grid.encode(weight, grid.fit(weight, grid.scheme, torch.float16, None, 3, True, 0)).own()

    def loss() -> float:
        off = weight - grid.decode(start)
        return float(((off @ hessian) * off).sum())

    before, codes = loss(), start.codes.clone()
    error = (weight - grid.decode(start)) @ hessian
    grid.refit(start, error, hessian)
    assert loss() < before * 0.9999 and torch.equal(codes, start.codes)
    torch.testing.assert_close(error, (weight - grid.decode(start)) @ hessian, rtol=1e-3, atol=2e-3)
    assert torch.equal(start.parts["d"], start.parts["d"].half().float())
