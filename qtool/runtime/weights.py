"""From a quantized tensor, as formats give it, to a weight for running."""

from __future__ import annotations

import torch

from qtool import found
from qtool.ops.packed import PackedWeight, pack_codes
from qtool.tensors import QuantizedTensor


def obstacle(tensor: QuantizedTensor) -> str | None:
    """Why no product with packed weights knows this tensor, or None."""
    if tensor.codes.dim() != 2:
        return "additive codebooks"
    columns, groups = tensor.codes.shape[1], tensor.scale.shape[1]
    if groups != 1 and (columns != groups * tensor.group_size or tensor.group_size % 8):
        return f"{groups} groups of {tensor.group_size} for {columns} columns; multiples of 8 are known"
    return None


def pack(tensor: QuantizedTensor) -> PackedWeight:
    """The same values for running; zero points become offsets of their groups (one rounding more, in float32)."""
    scale, offset = tensor.scale, tensor.offset
    if tensor.grid != "affine":
        levels = tensor.extra["levels"].float() if "levels" in tensor.extra else levels_of(tensor.grid)
        return pack_codes(tensor.codes, levels, scale, offset)
    half = 1 << (tensor.bits - 1)
    if bool((tensor.zero_point != half).any()):
        offset = (half - tensor.zero_point.float()) * scale.float()
    return pack_codes(tensor.codes, torch.arange(-half, half).float(), scale, offset)


def levels_of(grid: str) -> torch.Tensor:
    """float32 [L], what the codes of a grid that has levels stand for."""
    module = found.load("grids", grid)
    levels: torch.Tensor = getattr(module, "GRID", module).levels
    return levels
