"""A GGUF file of plain block types seen as a checkpoint of integers: its codes and scales, for other formats.

Plain are the types with one scale for 32 columns and levels in equal steps (q4_0, q5_0, q8_0; q4_1 and q5_1 where every
minimum is a multiple of its scale). K-quants have scales of scales, which no other format holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qtool import formats, found
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.reader import Checkpoint
from qtool.decode import Source
from qtool.errors import InputError
from qtool.formats._ggml_fields import TYPES
from qtool.grids import affine
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor

INSIDE = ".layers."
NO_ZERO_POINTS = "its minima are no multiples of its scales, so its codes cannot be kept as they are"


def of(source: Source) -> Source:
    """The linears of the blocks with codes and float16 scales; embeddings and head are decoded to float16.

    A file without block types comes back as it is. Raises InputError for a type with scales of scales.
    """
    kinds = {name.removesuffix(".weight"): kind for name, (kind, _) in source.checkpoint.block_types.items()
             if INSIDE in name}
    if not kinds:
        return source
    for linear, kind in kinds.items():
        if kind not in TYPES or not found.load("grids", kind).plain:
            raise InputError(f"{linear} is {kind}, whose scales no other format holds; --to hf keeps dense weights, "
                             "which quantize rounds again")
    return _Codes(open_checkpoint(source.origin, gguf_dtype=torch.float16), kinds)


class _Codes(Source):
    """kinds: the block type of each linear."""

    def __init__(self, checkpoint: Checkpoint, kinds: Mapping[str, str]) -> None:
        super().__init__(checkpoint)
        self._kinds = kinds
        self.format = formats.load("gguf")
        self.schemes = {linear: Scheme(bits=grid.bits, group_size=grid.super, symmetric=not grid.mins)
                        for linear, grid in ((name, found.load("grids", kind)) for name, kind in kinds.items())}
        beside = [f"{name} ({kind})" for name, (kind, _) in checkpoint.block_types.items()
                  if name.removesuffix(".weight") not in kinds]
        self.notes = (f"decoded to float16: {', '.join(beside)}",) if beside else ()

    def read_quantized(self, linear_name: str, unread: str | None = None) -> QuantizedTensor:
        quantized = self._quantized(linear_name)
        if quantized is None:
            raise InputError(f"{linear_name}: {NO_ZERO_POINTS}")
        return quantized

    def decoded(self, linear_name: str) -> torch.Tensor:
        if linear_name not in self.schemes:
            return super().decoded(linear_name)
        return affine.decode(self.read_quantized(linear_name))

    def stored_scale(self, linear_name: str) -> torch.Tensor:
        return self.read_quantized(linear_name).scale

    def obstacle(self, linear_name: str) -> str | None:
        exact = not found.load("grids", self._kinds[linear_name]).mins or self._quantized(linear_name) is not None
        return None if exact else NO_ZERO_POINTS

    def _quantized(self, linear_name: str) -> QuantizedTensor | None:
        assert self.checkpoint.fetch_blocks is not None and self.format is not None
        name, grid = f"{linear_name}.weight", found.load("grids", self._kinds[linear_name])
        packed = self.checkpoint.fetch_blocks(name)
        blocks = self.format.unpack(linear_name, {name: packed}.__getitem__, grid.scheme, self.specs[name].shape)
        made: QuantizedTensor | None = grid.as_affine(blocks)
        return made
