"""Pure-torch versions of the ops on layouts of 4-bit codes; see reference.py."""

from __future__ import annotations

import torch

from qtool.ops.checks_int4 import AWQ, PER_WORD, TRANSPOSED
from qtool.ops.reference import pack_bits, unpack_bits

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the rows in a word of AWQ's, from the lowest nibble on
BITS = 4


def repack_int4(words: torch.Tensor, rows: int, columns: int, source: int, target: int) -> torch.Tensor:
    codes = _codes(words, rows, columns, source)
    if target == AWQ:
        eights = codes.t().reshape(columns, rows // PER_WORD, PER_WORD)[..., ORDER]
        return pack_bits(eights.reshape(columns, rows), BITS, False)
    packed = pack_bits(codes, BITS, False)
    return packed.t().contiguous() if target == TRANSPOSED else packed


def compare_int4(one: torch.Tensor, other: torch.Tensor, rows: int, columns: int, layout: int,
                 other_layout: int) -> torch.Tensor:
    differ = _codes(one, rows, columns, layout) != _codes(other, rows, columns, other_layout)
    return differ.reshape(rows, columns // PER_WORD, PER_WORD).any(-1).any(0).to(torch.uint8)


def _codes(words: torch.Tensor, rows: int, columns: int, layout: int) -> torch.Tensor:
    """uint8 [rows, columns]."""
    if layout != AWQ:
        return unpack_bits(words.t() if layout == TRANSPOSED else words, BITS, columns, False)
    eights = unpack_bits(words, BITS, rows, False).reshape(columns, rows // PER_WORD, PER_WORD)
    natural = torch.empty_like(eights)
    natural[..., ORDER] = eights
    return natural.reshape(columns, rows).t()
