"""Pure-torch versions of the ops that run quantized weights; see reference.py.

`decode_block` takes its products through `product`, so that a prompt runs fast too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qtool.ops.checks_packed import INTEGERS, NORMS, PARTS, PRODUCTS, SMALL_FLOATS, TILE, widths

FEW = 16  # tokens for which codes are read as they are
BLOCK_BYTES = 4 << 20  # of a weight that is float32 at one time


def product(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, levels: torch.Tensor,
            kind: int, outputs: int, group: int, rounded: bool) -> torch.Tensor:
    """multiply_packed, by the op of that name or, for many tokens, by parts of the weight in float32."""
    if len(x) <= FEW:
        return torch.ops.qtool.multiply_packed(x, words, scale, offset, levels, kind, outputs, group, rounded)
    x = round_input(x) if rounded else x
    made = x.new_empty(len(x), outputs)
    tiles = max(1, BLOCK_BYTES // (4 * TILE * max(x.shape[1], 1)))
    for begin in range(0, words.shape[0], tiles):
        end = min(begin + tiles, words.shape[0])
        part = torch.ops.qtool.unpack_packed(words, scale, offset, levels, kind, x.shape[1], group, begin, end)
        here = slice(begin * TILE, min(end * TILE, outputs))
        made[:, here] = x @ part[:, :here.stop - here.start]
    return made


def multiply_packed(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
                    levels: torch.Tensor, kind: int, outputs: int, group: int, rounded: bool) -> torch.Tensor:
    x = round_input(x) if rounded else x
    weight = unpack_packed(words, scale, offset, levels, kind, x.shape[1], group, 0, words.shape[0])
    return x @ weight[:, :outputs]


def round_input(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] as codes of 8 bits have it, with a scale for each 32 columns of a token: their absmax over 127."""
    chunks = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
    scale = chunks.abs().amax(-1, keepdim=True) / 127.0
    rounded = (chunks / torch.where(scale == 0, 1.0, scale)).round() * scale
    return rounded.flatten(1)[:, :x.shape[1]]


def unpack_packed(words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, levels: torch.Tensor, kind: int,
                  columns: int, group: int, begin: int, end: int) -> torch.Tensor:
    values = _levels(words[begin:end], levels, kind)[:, :columns]  # [tiles, K, 32]
    values = values * scale[begin:end].float().repeat_interleave(group, 1)
    if offset.numel():
        values = values + offset[begin:end].repeat_interleave(group, 1)
    return values.permute(1, 0, 2).reshape(columns, (end - begin) * TILE)


def _levels(words: torch.Tensor, levels: torch.Tensor, kind: int) -> torch.Tensor:
    """float32 [tiles, 32 chunks, 32]."""
    tiles, chunks, bits, _ = words.shape
    if bits == 32:
        return words.view(torch.float32).reshape(tiles, chunks * TILE, TILE)
    codes, first, low = torch.zeros(tiles, chunks, TILE, TILE, dtype=torch.int32, device=words.device), 0, 0
    for width in widths(bits):
        places = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)[:, None]
        part = (words[:, :, first:first + width, None] >> places) & ((1 << width) - 1)
        codes |= part.reshape(tiles, chunks, TILE, TILE) << low
        first, low = first + width, low + width
    codes = codes.reshape(tiles, chunks * TILE, TILE)
    if bits == 16:
        return (codes << 16).view(torch.float32)
    if kind == INTEGERS:
        return ((codes ^ (1 << (bits - 1))) - (1 << (bits - 1))).float()
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float() if kind == SMALL_FLOATS else levels[codes.long()]


def decode_block(hidden: torch.Tensor, weights: Sequence[torch.Tensor], layout: Sequence[int], cos: torch.Tensor,
                 sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int,
                 epsilon: float, scaling: float, rounded: bool) -> torch.Tensor:
    before, query_norm, key_norm, after = weights[:NORMS]
    products = {name: (weights[NORMS + PARTS * index:NORMS + PARTS * (index + 1)], layout[3 * index:3 * index + 3])
                for index, name in enumerate(PRODUCTS)}

    def multiply(name: str, x: torch.Tensor) -> torch.Tensor:
        (words, scale, offset, levels, bias), (kind, group, outputs) = products[name]
        made = product(x.contiguous(), words, scale, offset, levels, kind, outputs, group, rounded)
        return made + bias if bias.numel() else made

    tokens, size = len(hidden), keys.shape[2]
    x = _normalized(hidden, before, epsilon)
    query, key, value = (multiply(name, x).reshape(tokens, -1, size).transpose(0, 1) for name in PRODUCTS[:3])
    stop = position + tokens
    keys[:, position:stop] = _rotated(key, key_norm, cos, sin, epsilon)
    values[:, position:stop] = value
    query = _rotated(query, query_norm, cos, sin, epsilon)
    x = _attended(query, keys[:, :stop], values[:, :stop], position, window, scaling)
    hidden = hidden + multiply("o_proj", x)
    x = _normalized(hidden, after, epsilon)
    gate = torch.nn.functional.silu(multiply("gate_proj", x))
    return hidden + multiply("down_proj", gate * multiply("up_proj", x))


def _normalized(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _rotated(heads: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
             epsilon: float) -> torch.Tensor:
    """heads [heads, T, size]; cos, sin [T, size / 2]."""
    if norm.numel():
        heads = _normalized(heads, norm, epsilon)
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attended(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int,
              scaling: float) -> torch.Tensor:
    """[T, heads * size] of query [heads, T, size], keys and values [key heads, positions, size]."""
    tokens = query.shape[1]
    times = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0)
    here = torch.arange(position, position + tokens, device=query.device)[:, None]
    there = torch.arange(keys.shape[1], device=query.device)
    hidden = (there > here) | (there <= here - window)
    scores = (query @ keys.transpose(1, 2) * scaling).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1).reshape(tokens, -1)
