"""Pure-torch versions of the ops on GGUF's blocks (csrc/blocks.inc); see reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qtool.ops.reference import Pair, _float32, stored
from qtool.ops.reference_levels import _choose

MOVES = (0.0, -1.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """What a block may hold; the arguments of fit_blocks."""

    levels: torch.Tensor
    edges: torch.Tensor
    sub: int
    scale_low: int
    scale_high: int
    mins: int
    steps: int
    uniform: bool

    @property
    def flat(self) -> bool:
        return self.scale_low == self.scale_high

    def nearest(self, quotient: torch.Tensor) -> torch.Tensor:
        if self.uniform:
            low, high = float(self.levels[0]), float(self.levels[-1])
            return torch.where(quotient.isnan(), low, quotient).clamp(low, high).round()
        return self.levels[_choose(quotient, self.edges)]

    def nudge(self, step: int) -> float:
        if self.steps == 1:
            return 0.0
        return _float32(_float32(0.9) * _float32(2.0 * _float32(step / (self.steps - 1)) - 1.0))


class Blocks(NamedTuple):
    """d, dmin [N, B]; integers scale, minus [N, B, S]; tile, weights [N, B, S, sub]."""

    tile: torch.Tensor
    weights: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor
    scale: torch.Tensor
    minus: torch.Tensor


def fit_blocks(weight: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, edges: torch.Tensor, super_: int,
               sub: int, scale_low: int, scale_high: int, mins: int, steps: int, rounds: int, energy: float,
               uniform: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    rule = Rule(levels, edges, sub, scale_low, scale_high, mins, steps, uniform)
    shape = (rows, columns // super_, super_ // sub, sub)
    tile = weight.reshape(shape)
    weights = _weights(weight.reshape(shape[0], shape[1], super_), importance, energy).reshape(shape)
    scale, minus = _with_minimum(rule, tile, weights) if mins else _without(rule, tile, weights)
    blocks = _to_integers(rule, tile, weights, scale, minus)
    for _ in range(rounds):
        blocks = _refit(rule, _try_neighbours(rule, blocks))
    if rounds:
        blocks = _try_neighbours(rule, blocks)
    integers = [part.reshape(rows, columns // sub).to(torch.uint8) for part in (blocks.scale - scale_low, blocks.minus)]
    return blocks.d, integers[0], blocks.dmin, integers[1]


def _weights(blocks: torch.Tensor, importance: torch.Tensor, energy: float) -> torch.Tensor:
    weights = importance.reshape(1, *blocks.shape[1:]).expand(blocks.shape)
    if not energy > 0:
        return weights
    mean = torch.zeros_like(blocks[..., 0])
    for column in range(blocks.shape[-1]):
        mean = mean + blocks[..., column] * blocks[..., column]
    mean = mean / blocks.shape[-1] * _float32(energy)
    return weights * (mean[..., None] + blocks * blocks).sqrt()


def _sums(rule: Rule, tile: torch.Tensor, weights: torch.Tensor, low: torch.Tensor,
          inverse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    level = rule.nearest((tile - low[..., None]) * inverse[..., None])
    weighted = weights * level
    terms = (weights, weighted, weighted * level, weights * tile, weighted * tile)
    return tuple(_in_order(term) for term in terms)


def _in_order(terms: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[..., 0])
    for column in range(terms.shape[-1]):
        total = total + terms[..., column]
    return total


def _with_minimum(rule: Rule, tile: torch.Tensor, weights: torch.Tensor) -> Pair:
    low, high = tile.amin(-1), tile.amax(-1)
    if not rule.flat:
        low = low.clamp(max=0.0)
    span = high - low
    scale, minus, best = torch.zeros_like(low), -low, torch.full_like(low, torch.inf)
    for step in range(rule.steps):
        inverse = _float32(float(rule.levels[-1]) + rule.nudge(step)) / span
        weight, level, square, value, product = _sums(rule, tile, weights, low, inverse)
        determinant = weight * square - level * level
        candidate = (weight * product - value * level) / determinant
        offset = (square * value - level * product) / determinant
        if not rule.flat:
            above = offset > 0
            candidate = torch.where(above, product / square, candidate)
            offset = torch.where(above, 0.0, offset)
        error = -(candidate * product + offset * value)
        better = (error < best) & (determinant > 0) & (span > 0)
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
        minus = torch.where(better, -offset, minus)
    return scale, minus


def _without(rule: Rule, tile: torch.Tensor, weights: torch.Tensor) -> Pair:
    span = tile.abs().amax(-1)
    none = torch.zeros_like(span)
    scale, best = none, torch.full_like(span, torch.inf)
    top = -float(rule.levels[0])
    for step in range(rule.steps):
        reach = _float32(top * _float32(1.0 + _float32(rule.nudge(step) * _float32(2.0 / len(rule.levels)))))
        for side in (-reach, reach):
            _, _, square, _, product = _sums(rule, tile, weights, none, side / span)
            candidate = product / square
            error = -(candidate * product)
            better = (error < best) & (square > 0) & (span > 0)
            best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    return scale, none


def _half(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value.abs() > 2.0**-25, stored(value, torch.float16), 0.0)


def _whole(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.where(value.isnan(), low, value).clamp(low, high).round()


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The first of largest magnitude, [N, B]."""
    found = torch.zeros_like(values[..., 0])
    for index in range(values.shape[-1]):
        found = torch.where(values[..., index].abs() > found.abs(), values[..., index], found)
    return found


def _to_integers(rule: Rule, tile: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor,
                 minus: torch.Tensor) -> Blocks:
    largest = _largest(scale)
    d = _half(largest / (rule.scale_low if rule.scale_low < 0 else rule.scale_high))
    lost = (d == 0) & (largest != 0)
    dmin = torch.where(lost, 0.0, _half(_largest(minus) / rule.mins)) if rule.mins else torch.zeros_like(d)
    integers = _whole(scale / d[..., None], rule.scale_low, rule.scale_high)
    minima = torch.zeros_like(integers)
    if rule.mins:
        minima = _whole(minus / dmin[..., None], 1.0 if rule.mins == 1 else 0.0, rule.mins)
    return Blocks(tile, weights, d, dmin, integers, minima)


def _error(rule: Rule, blocks: Blocks, scale: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """[N, B, S] for integers scale and minus [N, B, S]."""
    step, offset = (blocks.d[..., None] * scale)[..., None], (blocks.dmin[..., None] * minus)[..., None]
    off = blocks.tile - (rule.nearest((blocks.tile + offset) * (1.0 / step)) * step - offset)
    return _in_order(blocks.weights * (off * off))


def _try_neighbours(rule: Rule, blocks: Blocks) -> Blocks:
    if rule.flat:
        return blocks
    scale, minus, best = blocks.scale, blocks.minus, torch.full_like(blocks.scale, torch.inf)
    for move in MOVES:
        candidate = _whole(blocks.scale + move, rule.scale_low, rule.scale_high)
        for other in MOVES if rule.mins else MOVES[:1]:
            minimum = _whole(blocks.minus + other, 0.0, rule.mins)
            error = _error(rule, blocks, candidate, minimum)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
            minus = torch.where(better, minimum, minus)
    return blocks._replace(scale=scale, minus=minus)


def _refit(rule: Rule, blocks: Blocks) -> Blocks:
    step, offset = (blocks.d[..., None] * blocks.scale)[..., None], (blocks.dmin[..., None] * blocks.minus)[..., None]
    a = rule.nearest((blocks.tile + offset) * (1.0 / step)) * blocks.scale[..., None]
    b = blocks.minus[..., None].expand(a.shape)
    tile, weights = blocks.tile, blocks.weights
    terms = (a * a, a * b, b * b, tile * a, tile * b)
    aa, ab, bb, xa, xb = (_in_order((weights * term).flatten(-2)) for term in terms)
    determinant = aa * bb - ab * ab
    both = determinant > 0
    dmin = torch.where(both, _half((ab * xa - aa * xb) / determinant), blocks.dmin)
    d = _half(torch.where(both, (bb * xa - ab * xb) / determinant, (xa + blocks.dmin * ab) / aa))
    other = blocks._replace(d=d, dmin=dmin)
    better = (_total(rule, other) < _total(rule, blocks)) & ~d.isnan()
    return blocks._replace(d=torch.where(better, d, blocks.d), dmin=torch.where(better, dmin, blocks.dmin))


def _total(rule: Rule, blocks: Blocks) -> torch.Tensor:
    return _in_order(_error(rule, blocks, blocks.scale, blocks.minus))


def pack_fields(parts: torch.Tensor, fields: torch.Tensor, size: int) -> torch.Tensor:
    part, first, bits, byte, at = fields.long().unbind(1)
    taken = ((parts[:, part].int() >> first) & ((1 << bits) - 1)) << at
    packed = torch.zeros((parts.shape[0], size), dtype=torch.int64, device=parts.device)
    return packed.index_add_(1, byte, taken).to(torch.uint8)


def unpack_fields(packed: torch.Tensor, fields: torch.Tensor, width: int) -> torch.Tensor:
    part, first, bits, byte, at = fields.long().unbind(1)
    taken = ((packed[:, byte].int() >> at) & ((1 << bits) - 1)) << first
    parts = torch.zeros((packed.shape[0], width), dtype=torch.int64, device=packed.device)
    return parts.index_add_(1, part, taken).to(torch.uint8)
