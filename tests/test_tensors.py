"""What the tensor helpers compare."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.tensors import same_bits

BYTES = st.lists(st.integers(0, 255), max_size=40)


@given(BYTES, st.integers(0, 9), st.integers(0, 39))
def test_same_bits_at_any_offset(content: list[int], offset: int, place: int) -> None:
    one = torch.tensor([0] * offset + content, dtype=torch.uint8)[offset:]
    other = torch.tensor(content, dtype=torch.uint8)
    assert same_bits(one, other)
    if content:
        other[place % len(content)] ^= 1
        assert not same_bits(one, other)
    assert not same_bits(one, torch.tensor([*content, 0], dtype=torch.uint8))


def test_same_bits_are_bits() -> None:
    """NaN is itself, and the two zeros differ."""
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.arange(12).view(3, 4).T, torch.arange(12).view(3, 4).T.contiguous())
