"""4-bit codes [N, K] as the formats lay them out in words of eight, which differ in nothing but order.

    ALONG_ROWS   int32 [N, K / 8]   eight columns of a row, the first in the lowest nibble
    TRANSPOSED   int32 [K / 8, N]   the same words, transposed
    AWQ          int32 [K, N / 8]   eight rows of a column: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on
N and K are multiples of 8. Both ops go over the words once, without a byte for each code; they share no code, so that
one can check the other.
"""

from __future__ import annotations

import torch

from qtool.ops import checks_int4
from qtool.ops.checks_int4 import ALONG_ROWS, AWQ, PER_WORD, TRANSPOSED, shape_of

__all__ = ["ALONG_ROWS", "AWQ", "PER_WORD", "TRANSPOSED", "repack", "same_codes", "shape_of"]
_ops = torch.ops.qtool


def repack(words: torch.Tensor, shape: tuple[int, int], source: int, target: int) -> torch.Tensor:
    """The words int32 of codes of this shape [N, K], laid out as `target` instead of `source`: the same tensor where
    these are one layout. Raises ValueError."""
    arguments = (words.contiguous(), *shape, source, target)
    checks_int4.repack_int4(*arguments)
    if source == target:
        return words
    return _ops.repack_int4(*arguments)


def same_codes(one: torch.Tensor, other: torch.Tensor, shape: tuple[int, int], layout: int, other_layout: int) -> bool:
    """Whether words of two layouts hold the same codes [N, K]. Raises ValueError."""
    arguments = (one.contiguous(), other.contiguous(), *shape, layout, other_layout)
    checks_int4.compare_int4(*arguments)
    return not bool(_ops.compare_int4(*arguments).any())
