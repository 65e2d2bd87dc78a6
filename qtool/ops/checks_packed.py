"""Checks of the ops that run quantized weights; see checks.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qtool.ops.checks import one_device, require, shape

TILE = 32  # rows of a tile, and columns of a chunk
INTEGERS, TABLE, SMALL_FLOATS = 0, 1, 2  # PackedKind in csrc/kernels.h
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = 4  # tensors of a block before those of its products: input, query, key and second norm
PARTS = 5  # tensors of a product: words, scale, offset, levels, bias
SCALES = (torch.float32, torch.float16, torch.bfloat16)


def widths(bits: int) -> tuple[int, ...]:
    """The fields that codes of `bits` bits are split into, the low bits first."""
    return (bits,) if bits >= 8 else tuple(width for width in (4, 2, 1) if bits & width)


def multiply_packed(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
                    levels: torch.Tensor, kind: int, outputs: int, group: int, rounded: bool) -> None:
    require(x.dim() == 2 and x.dtype == torch.float32, f"x is {x.dtype} {shape(x)}, not float32 [T, K]")
    packed(words, scale, offset, levels, kind, x.shape[1], group)
    require(outputs >= 0 and words.shape[0] == -(-outputs // TILE), f"{words.shape[0]} tiles for {outputs} outputs")
    one_device(x, words, scale, offset, levels)


def unpack_packed(words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, levels: torch.Tensor, kind: int,
                  columns: int, group: int, begin: int, end: int) -> None:
    packed(words, scale, offset, levels, kind, columns, group)
    require(0 <= begin <= end <= words.shape[0], f"tiles {begin} to {end} of {words.shape[0]}")
    one_device(words, scale, offset, levels)


def packed(words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, levels: torch.Tensor, kind: int,
           columns: int, group: int) -> None:
    require(words.dim() == 4 and words.dtype == torch.int32 and words.shape[3] == TILE and words.is_contiguous(),
            f"words is {words.dtype} {shape(words)}, not int32 [tiles, chunks, bits, {TILE}]")
    tiles, chunks, bits, _ = words.shape
    legal = {INTEGERS: (2, 3, 4, 5, 6, 7, 8, 16, 32), TABLE: (4,), SMALL_FLOATS: (8,)}.get(kind, ())
    require(bits in legal, f"kind {kind} of {bits} bits")
    require(columns >= 0 and columns % 8 == 0 and chunks == -(-columns // TILE),
            f"{chunks} chunks for {columns} columns")
    require(group % 8 == 0 and (group > 0 or columns == 0) and (not group or columns % group == 0),
            f"group {group} for {columns} columns")
    wanted = (tiles, columns // group if group else scale.shape[1] if scale.dim() == 3 else 0, TILE)
    require(scale.shape == wanted and scale.dtype in SCALES and scale.is_contiguous(),
            f"scale is {scale.dtype} {shape(scale)}, not {list(wanted)}")
    require(offset.dtype == torch.float32 and (offset.shape == wanted or not offset.numel()) and offset.is_contiguous(),
            f"offset is {offset.dtype} {shape(offset)}, not float32 {list(wanted)} or empty")
    require(levels.dtype == torch.float32 and levels.shape == ((16,) if kind == TABLE else (0,)),
            f"levels is {levels.dtype} {shape(levels)} for kind {kind}")


def decode_block(hidden: torch.Tensor, weights: Sequence[torch.Tensor], layout: Sequence[int], cos: torch.Tensor,
                 sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int,
                 epsilon: float, scaling: float, rounded: bool) -> None:
    block(hidden.shape[-1], weights, layout, keys, values, window)
    tokens(hidden, hidden.shape[-1], cos, sin, keys, position)


def block(columns: int, weights: Sequence[torch.Tensor], layout: Sequence[int], keys: torch.Tensor,
          values: torch.Tensor, window: int) -> None:
    require(len(weights) == NORMS + PARTS * len(PRODUCTS) and len(layout) == 3 * len(PRODUCTS),
            f"{len(weights)} weights and {len(layout)} numbers")
    require(keys.dim() == 3 and keys.dtype == torch.float32 and keys.is_contiguous() and values.is_contiguous(),
            f"keys are {keys.dtype} {shape(keys)}, not float32 [heads, positions, size]")
    require(values.shape == keys.shape and values.dtype == keys.dtype, f"values {shape(values)}, keys {shape(keys)}")
    heads, _, size = keys.shape
    outputs = layout[2::3]
    require(window > 0 and size > 0 and size % 2 == 0 and heads > 0, f"window {window}, {heads} heads of {size}")
    require(columns > 0 and min(outputs) > 0, f"{columns} columns, outputs {list(outputs)}")
    require(outputs[0] % (heads * size) == 0 and outputs[1] == outputs[2] == heads * size,
            f"{outputs[0]} queries, {outputs[1]} keys and {outputs[2]} values for {heads} heads of {size}")
    require(outputs[3] == outputs[6] == columns and outputs[4] == outputs[5], f"outputs {list(outputs)}")
    for index, (norm, length) in enumerate(zip(weights[:NORMS], (columns, size, size, columns), strict=True)):
        vector(f"norm {index}", norm, length, index in (1, 2))
    for index, name in enumerate(PRODUCTS):
        words, scale, offset, levels, bias = weights[NORMS + PARTS * index:NORMS + PARTS * (index + 1)]
        kind, group, rows = layout[3 * index:3 * index + 3]
        packed(words, scale, offset, levels, kind, {3: outputs[0], 6: outputs[4]}.get(index, columns), group)
        require(words.shape[0] == -(-rows // TILE), f"{name}: {words.shape[0]} tiles for {rows} outputs")
        vector(f"bias of {name}", bias, rows, True)
    one_device(*weights, keys, values)


def tokens(hidden: torch.Tensor, columns: int, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor,
           position: int) -> None:
    """What changes from token to token; cheap."""
    wanted = (len(hidden), keys.shape[2] // 2)
    right = hidden.shape == (wanted[0], columns) and hidden.dtype == torch.float32 and hidden.is_contiguous()
    require(right and wanted[0] > 0, "hidden is not float32 [T, H], contiguous, with a token in it")
    right = cos.shape == wanted == sin.shape and cos.dtype == torch.float32 == sin.dtype
    require(right and cos.is_contiguous() and sin.is_contiguous(), "cos and sin are not float32 [T, size / 2]")
    if position < 0 or position + wanted[0] > keys.shape[1]:
        require(False, f"position {position}, {wanted[0]} tokens in a cache of {keys.shape[1]}")


def vector(name: str, tensor: torch.Tensor, length: int, optional: bool) -> None:
    there = tensor.shape == (length,) or (optional and not tensor.numel())
    require(there and tensor.dtype == torch.float32 and tensor.is_contiguous(),
            f"{name} is {tensor.dtype} {shape(tensor)}, not float32 [{length}]")
