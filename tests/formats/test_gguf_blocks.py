"""GGUF's block types: gguf's own dequantizers read what is packed, bit for bit; mixtures choose what llama.cpp does."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import mixtures
from qtool.errors import CheckpointError
from qtool.formats import gguf as format_
from qtool.formats._ggml_fields import TYPES, fields
from qtool.grids.ggml import MEMBERS
from qtool.mixtures import Shape
from qtool.tensors import QuantizedTensor


def anything(name: str, rows: int, columns: int, seed: int) -> QuantizedTensor:
    """Every value that a type can hold, at random."""
    grid, generator = MEMBERS[name], torch.Generator().manual_seed(seed)

    def integers(top: int, width: int) -> torch.Tensor:
        return torch.randint(0, top + 1, (rows, columns // width), generator=generator, dtype=torch.uint8)

    def halves() -> torch.Tensor:
        return (torch.randn(rows, columns // grid.super, generator=generator) * 0.1).half().float()

    low, high = grid.scales
    scales = integers(high - low, grid.sub)
    mins = torch.full_like(scales, 1) if grid.mins == 1 else integers(grid.mins, grid.sub)
    codes = integers(len(grid.levels) - 1, 1)
    made: QuantizedTensor = grid.fitted(halves(), scales, halves(), mins, codes)
    return made


@pytest.mark.parametrize("name", TYPES)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_gguf_reads_what_is_packed(name: str, rows: int, blocks: int, seed: int) -> None:
    grid = MEMBERS[name]
    columns = blocks * grid.super
    tensor = anything(name, rows, columns, seed)
    spec, = format_.layout("x", (rows, columns), grid.scheme, torch.bfloat16)
    packed = format_.pack("x", tensor)["x.weight"]
    assert (packed.dtype, tuple(packed.shape)) == (spec.dtype, spec.shape)
    values = grid.decode(tensor)
    number, kind = TYPES[name][0], GGMLQuantizationType[name.upper()]
    assert kind == number and gguf.GGML_QUANT_SIZES[kind] == (grid.super, TYPES[name][1])
    assert torch.equal(torch.from_numpy(gguf.dequantize(packed.numpy(), kind)), values)
    again = format_.unpack("x", {"x.weight": packed}.__getitem__, grid.scheme, (rows, columns))
    assert torch.equal(grid.decode(again), values)
    assert torch.equal(format_.pack("x", again)["x.weight"], packed)


@pytest.mark.parametrize("name", TYPES)
def test_every_bit_of_a_block_has_one_place(name: str) -> None:
    table, parts, size = fields(name)
    seen = [(int(byte), int(at) + bit) for _, _, bits, byte, at in table for bit in range(int(bits))]
    assert len(seen) == len(set(seen)) and {byte for byte, _ in seen} == set(range(size))
    assert set(table[:, 0].tolist()) == set(range(parts))


def test_rows_that_do_not_divide_are_refused() -> None:
    assert "q5_0" in str(format_.check(MEMBERS["q4_k"].scheme, "x", (4, 576)))
    assert format_.check(MEMBERS["q5_0"].scheme, "x", (4, 576)) is None


SMOLLM2 = Shape(layers=30, heads=9, kv_heads=3, experts=0, calibrated=False)


def counted(mixture: str, role: str, columns: int, model: Shape = SMOLLM2) -> dict[str | None, int]:
    chosen = [mixtures.choose(mixture, role, layer, columns, model) for layer in range(model.layers)]
    return {name: chosen.count(name) for name in chosen}


def test_the_types_of_smollm2_are_those_of_llama_cpp() -> None:
    """A dry run of llama-quantize on its shape: hidden 576, feed-forward 1536, tied."""
    assert counted("q4_k_m", "attn_v", 576) == {"q8_0": 14, "q5_0": 16}
    assert counted("q4_k_m", "ffn_down", 1536) == {"q6_k": 14, "q4_k": 16}
    for role in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert counted("q4_k_m", role, 576) == {"q5_0": 30}
    assert mixtures.choose("q4_k_m", "output", 0, 576, SMOLLM2) == "q8_0"
    assert counted("q6_k", "attn_q", 576) == {"q8_0": 30} and counted("q6_k", "ffn_down", 1536) == {"q6_k": 30}
    assert counted("q4_0", "ffn_down", 1536) == {"q4_0": 30}
    assert mixtures.choose("q4_0", "output", 0, 576, SMOLLM2) == "q8_0"


def test_statistics_and_shapes_change_some_types() -> None:
    calibrated = Shape(32, 32, 8, 0, True)
    assert counted("q4_0", "ffn_down", 1024, calibrated) == {"q4_1": 4, "q4_0": 28}
    assert counted("iq4_xs", "ffn_down", 1024, calibrated) == {"iq4_xs": 32}
    assert counted("iq4_xs", "ffn_down", 1024, Shape(32, 32, 8, 0, False)) == {"q5_k": 4, "iq4_xs": 28}
    assert counted("iq4_xs", "attn_v", 1024, calibrated) == {"q5_k": 32}  # four heads share a key
    assert counted("q2_k", "attn_v", 1024, calibrated) == {"q4_k": 32}
    assert counted("q2_k", "attn_v", 1024, Shape(32, 9, 3, 0, True)) == {"q3_k": 32}
    assert counted("q3_k_m", "attn_v", 1024, calibrated) == {"q5_k": 2, "q4_k": 30}
    assert counted("q4_k_m", "attn_v", 1024, Shape(32, 32, 8, 8, True)) == {"q8_0": 32}
    assert mixtures.choose("q4_0", "output", 0, 1024, calibrated) == "q6_k"
    assert mixtures.choose("tq2_0", "token_embd", 0, 1024, calibrated) == "q4_k"
    assert mixtures.choose("q4_k_m", "ffn_up", 0, 40, calibrated) is None


@pytest.mark.parametrize("name", TYPES)
def test_blocks_of_any_bits_are_decoded_or_refused(name: str) -> None:
    """Two bits can say 3, and tq2_0 has three levels."""
    grid, stored = MEMBERS[name], torch.full((1, TYPES[name][1]), 255, dtype=torch.uint8)
    if name == "tq2_0":
        with pytest.raises(CheckpointError, match="has a code that tq2_0 does not have"):
            format_.unpack("x", lambda _: stored, grid.scheme, (1, grid.super))
    else:
        assert format_.dequantize("x", lambda _: stored, grid.scheme, (1, grid.super)).shape == (1, grid.super)
