"""Quantized weights as they lie in memory for running, and products with them.

Rows come in tiles of 32, columns in chunks of 32; a chunk of a tile holds its codes bit field by bit field in words of
several columns of one row each, row beside row: what one vector instruction needs lies together, and all is read in
order. The arithmetic is float32: value = scale * level + offset. A product of few tokens reads the codes
themselves; for more, tiles become float32 and the machine's own matrix product takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qtool.ops import checks, checks_packed, reference_packed
from qtool.ops.checks_packed import INTEGERS, SMALL_FLOATS, TABLE, TILE


@dataclass(frozen=True)
class PackedWeight:
    """A weight [rows, columns] for running. words: int32 [tiles, chunks, bits, 32].  scale: [tiles, groups, 32].

    offset: float32 like scale, or empty.  levels: float32 [16] (TABLE) or empty.  group: columns that share a scale.
    kind: INTEGERS, signed, of `bits` bits (with 16 and 32 bits bfloat16 and float32), TABLE of levels, or SMALL_FLOATS.
    padded: columns, rounded up to a multiple of 8.
    """

    words: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    levels: torch.Tensor
    kind: int
    rows: int
    columns: int
    group: int

    @property
    def padded(self) -> int:
        return -(-self.columns // 8) * 8

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.words, self.scale, self.offset, self.levels

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device) -> PackedWeight:
        words, scale, offset, levels = (tensor.to(device) for tensor in self.tensors)
        return replace(self, words=words, scale=scale, offset=offset, levels=levels)


def pack_codes(codes: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor,
               offset: torch.Tensor | None = None) -> PackedWeight:
    """Of codes uint8 [N, K] that stand for levels float32 [L], scale and offset [N, G]; K / G a multiple of 8, or G 1.

    Levels are signed integers of a few bits, up to 16 numbers, or E4M3's. Raises ValueError for others.
    """
    rows, columns = codes.shape
    groups = scale.shape[1]
    checks.require(groups > 0 and columns % groups == 0 and (groups == 1 or columns // groups % 8 == 0),
                   f"{columns} columns in {groups} groups")
    kind, bits, stored, shift = _coded(levels.float())
    offset = None if offset is None else offset.float()
    if shift:
        more = shift * scale.float()
        offset = more if offset is None else offset + more
    group = columns // groups if groups > 1 else -(-columns // 8) * 8
    table = torch.nn.functional.pad(levels.float(), (0, 16 - len(levels))) if kind == TABLE else levels.new_empty(0)
    words = _words(stored[codes.long()], bits)
    return PackedWeight(words, _tiled(_smallest(scale)), torch.empty(0) if offset is None else _tiled(offset),
                        table.float(), kind, rows, columns, group)


def pack_dense(weight: torch.Tensor) -> PackedWeight:
    """Of a weight [N, K] that is not quantized: bfloat16 stays so, others become float32."""
    rows, columns = weight.shape
    bits = 16 if weight.dtype == torch.bfloat16 else 32
    whole = weight.contiguous() if bits == 16 else weight.float().contiguous()
    words = _words(whole.view(torch.int16 if bits == 16 else torch.int32), bits)
    scale = torch.ones(words.shape[0], 1, TILE, dtype=torch.float16)
    return PackedWeight(words, scale, torch.empty(0), torch.empty(0), INTEGERS, rows, columns, -(-columns // 8) * 8)


def multiply_packed(x: torch.Tensor, weight: PackedWeight, rounded: bool = False) -> torch.Tensor:
    """float32 [T, N]: x [T, K] times the transposed weight.

    rounded: x is rounded to 8 bits first, with a scale for each 32 columns of a token, as llama.cpp does: of 4-bit
    integers the products are then integers too, which is faster.
    """
    checks.require(x.dim() == 2 and x.shape[1] == weight.columns,
                   f"x {checks.shape(x)} for {weight.columns} columns")
    x = x.to(torch.float32)
    if weight.padded != weight.columns:
        x = torch.nn.functional.pad(x, (0, weight.padded - weight.columns))
    arguments = (x.contiguous(), *weight.tensors, weight.kind, weight.rows, weight.group, rounded)
    checks_packed.multiply_packed(*arguments)  # type: ignore[arg-type]
    return reference_packed.product(*arguments)  # type: ignore[arg-type]


def unpack_packed(weight: PackedWeight, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """float32 [padded, 32 (end - begin)]: the rows of some tiles (all) transposed, those beyond the weight too."""
    end = weight.words.shape[0] if end is None else end
    arguments = (*weight.tensors, weight.kind, weight.padded, weight.group, begin, end)
    checks_packed.unpack_packed(*arguments)  # type: ignore[arg-type]
    return torch.ops.qtool.unpack_packed(*arguments)


def _coded(levels: torch.Tensor) -> tuple[int, int, torch.Tensor, float]:
    """kind, bits, what is stored for each code, and what is added to that to have the level."""
    if torch.equal(levels, levels.round()) and float(levels.max() - levels.min()) < 256:
        bits = max(2, int(levels.max() - levels.min()).bit_length())
        half = 1 << (bits - 1)
        fits = float(levels.min()) >= -half and float(levels.max()) < half
        shift = 0.0 if fits else float(levels.min()) + half
        return INTEGERS, bits, (levels - shift).to(torch.int32), shift
    if len(levels) <= 16:
        return TABLE, 4, torch.arange(len(levels), dtype=torch.int32), 0.0
    small = levels.to(torch.float8_e4m3fn)
    checks.require(torch.equal(small.float(), levels), f"{len(levels)} levels that are not those of E4M3")
    return SMALL_FLOATS, 8, small.view(torch.uint8).to(torch.int32), 0.0


def _words(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [tiles, chunks, bits, 32] of integers [N, K]; missing rows and columns are zero."""
    rows, columns = stored.shape
    tiles, chunks = -(-rows // TILE), -(-columns // TILE)
    stored = torch.nn.functional.pad(stored, (0, chunks * TILE - columns, 0, tiles * TILE - rows))
    planes, low = [], 0
    for width in checks_packed.widths(bits):
        if width == 32:
            plane = stored.reshape(tiles, TILE, chunks, TILE)
        else:
            part = (stored.to(torch.int32) >> low) & ((1 << width) - 1)
            places = torch.arange(0, 32, width, dtype=torch.int32)
            plane = (part.reshape(tiles, TILE, chunks, width, 32 // width) << places).sum(-1, dtype=torch.int32)
        planes.append(plane.permute(0, 2, 3, 1))
        low += width
    return torch.cat(planes, 2).contiguous()


def _tiled(values: torch.Tensor) -> torch.Tensor:
    """[tiles, groups, 32] of [N, G]."""
    rows, groups = values.shape
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % TILE))
    return padded.reshape(-1, TILE, groups).transpose(1, 2).contiguous()


def _smallest(scale: torch.Tensor) -> torch.Tensor:
    """The scales in the smallest type that holds them exactly."""
    wide = scale.float()
    types = (torch.float16, torch.bfloat16)
    return next((wide.to(one) for one in types if torch.equal(wide.to(one).float(), wide)), wide)
