"""Where the bits of GGUF's blocks lie: for each type the fields that ops.pack_fields puts together.

A block's parts, in this order: a code per column, a scale per sub-block, a min per sub-block, the two bytes of d, the
two bytes of dmin (parts that the type has). A field: (part, its lowest bit taken, bits, byte, where in the byte).
Source: ggml-common.h's block structs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from qtool import found

Field = tuple[int, int, int, int, int]
# ggml's number of a type, its bytes, where d and dmin lie (dmin -1: it has none)
TYPES = {
    "q4_0": (2, 18, 0, -1), "q4_1": (3, 20, 0, 2), "q5_0": (6, 22, 0, -1), "q5_1": (7, 24, 0, 2),
    "q8_0": (8, 34, 0, -1), "q2_k": (10, 84, 80, 82), "q3_k": (11, 110, 108, -1), "q4_k": (12, 144, 0, 2),
    "q5_k": (13, 176, 0, 2), "q6_k": (14, 210, 208, -1), "iq4_nl": (20, 18, 0, -1), "iq4_xs": (23, 136, 0, -1),
    "tq1_0": (34, 54, 52, -1), "tq2_0": (35, 66, 64, -1),
}


def nibbles(byte: int, part: int) -> Iterator[Field]:
    """32 codes: the low halves of 16 bytes, then the high halves."""
    for index in range(32):
        yield part + index, 0, 4, byte + index % 16, 4 * (index // 16)


def runs(byte: int, part: int, count: int = 32, lowest: int = 0) -> Iterator[Field]:
    """Two bits each of four runs of `count` codes, in `count` bytes."""
    for index in range(4 * count):
        yield part + index, lowest, 2, byte + index % count, 2 * (index // count)


def bit_planes(byte: int, bit: int, length: int) -> Iterator[Field]:
    """One bit of every code: run j of `length` codes has bit j of `length` bytes."""
    for index in range(256):
        yield index, bit, 1, byte + index % length, index // length


def halves(byte: int) -> Iterator[Field]:
    """Eight runs of 32 codes: each 32 bytes have one run in their low and the next in their high halves."""
    for index in range(256):
        yield index, 0, 4, byte + 32 * (index // 64) + index % 32, 4 * (index // 32 % 2)


def six_bits(byte: int, scales: int, mins: int) -> Iterator[Field]:
    """Eight scales and eight mins of six bits in 12 bytes."""
    for index in range(4):
        yield scales + index, 0, 6, byte + index, 0
        yield mins + index, 0, 6, byte + 4 + index, 0
    for index in range(4, 8):
        yield scales + index, 0, 4, byte + 4 + index, 0
        yield mins + index, 0, 4, byte + 4 + index, 4
        yield scales + index, 4, 2, byte - 4 + index, 6
        yield mins + index, 4, 2, byte + index, 6


def _q5(byte: int) -> Iterator[Field]:
    for index in range(32):
        yield index, 4, 1, byte + index // 8, index % 8
    yield from nibbles(byte + 4, 0)


def _q2_k() -> Iterator[Field]:
    for index in range(16):
        yield 256 + index, 0, 4, index, 0
        yield 272 + index, 0, 4, index, 4
    yield from runs(16, 0)
    yield from runs(48, 128)


def _q3_k() -> Iterator[Field]:
    yield from bit_planes(0, 2, 32)
    yield from runs(32, 0)
    yield from runs(64, 128)
    for index in range(16):
        yield 256 + index, 0, 4, 96 + index % 8, 4 * (index // 8)
        yield 256 + index, 4, 2, 104 + index % 4, 2 * (index // 4)


def _q6_k() -> Iterator[Field]:
    for index in range(256):
        half, run, at = index // 128, index // 32 % 4, index % 32
        yield index, 0, 4, 64 * half + 32 * (run % 2) + at, 4 * (run // 2)
    yield from runs(128, 0, lowest=4)
    yield from runs(160, 128, lowest=4)
    for index in range(16):
        yield 256 + index, 0, 8, 192 + index, 0


def _iq4_xs() -> Iterator[Field]:
    for index in range(8):
        yield 256 + index, 0, 4, 4 + index // 2, 4 * (index % 2)
        yield 256 + index, 4, 2, 2 + index // 4, 2 * (index % 4)
        yield from nibbles(8 + 16 * index, 32 * index)


def _codes(name: str) -> Iterator[Field]:
    """The fields of everything but d and dmin."""
    if name in ("q4_0", "q4_1", "iq4_nl"):
        yield from nibbles(4 if name == "q4_1" else 2, 0)
    elif name in ("q5_0", "q5_1"):
        yield from _q5(4 if name == "q5_1" else 2)
    elif name == "q8_0":
        yield from ((index, 0, 8, 2 + index, 0) for index in range(32))
    elif name in ("q4_k", "q5_k"):
        yield from six_bits(4, 256, 264)
        yield from halves(16 if name == "q4_k" else 48)
        yield from bit_planes(16, 4, 32) if name == "q5_k" else ()
    elif name == "tq2_0":
        yield from runs(0, 0)
        yield from runs(32, 128)
    elif name == "tq1_0":  # its codes are bytes already (formats/gguf.py)
        yield from ((index, 0, 8, index, 0) for index in range(52))
    else:
        yield from {"q2_k": _q2_k, "q3_k": _q3_k, "q6_k": _q6_k, "iq4_xs": _iq4_xs}[name]()


@cache
def fields(name: str) -> tuple[torch.Tensor, int, int]:
    """Of a type: the fields int32 [F, 5], the number of parts of a block, its bytes."""
    grid = found.load("grids", name)
    _, size, d, dmin = TYPES[name]
    table = list(_codes(name))
    subs = 0 if grid.scales[0] == grid.scales[1] else grid.super // grid.sub
    parts = (52 if name == "tq1_0" else grid.super) + subs * (2 if grid.mins else 1)
    for byte in (d, dmin) if dmin >= 0 else (d,):
        table += [(parts, 0, 8, byte, 0), (parts + 1, 0, 8, byte + 1, 0)]
        parts += 2
    return torch.tensor(table, dtype=torch.int32), parts, size
