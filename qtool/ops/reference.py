"""Pure-torch versions of the ops: the specification, the oracle of the tests, and what runs where nothing is compiled.

All work on any device. Sums run over columns in order, as in the kernels, wherever that is affordable.
"""

from __future__ import annotations

import torch

from qtool.ops.checks import SCALE_TYPES

LIMIT = 4096.0  # a quotient is clamped to this before rounding; beyond it every code saturates anyway
Pair = tuple[torch.Tensor, torch.Tensor]


def stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest value that dtype has, never zero and never infinite; float32."""
    smallest = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny
    size = scale.abs().to(dtype).float().clamp(smallest, torch.finfo(dtype).max)
    return torch.where(torch.signbit(scale), -size, size)


def fit_affine(weight: torch.Tensor, importance: torch.Tensor, group: int, bits: int, symmetric: bool, scale_type: int,
               steps: int, shrink_min: float, signed_scale: bool, rounds: int) -> Pair:
    dtype, top, middle = SCALE_TYPES[scale_type], 2.0**bits - 1, 2.0 ** (bits - 1)
    tile = weight.reshape(weight.shape[0], weight.shape[1] // group, group)
    low, high = tile.amin(-1), tile.amax(-1)
    span = torch.maximum(low.abs(), high.abs()) if symmetric else high.clamp(min=0) - low.clamp(max=0)
    flat = ~(span > 0)
    best = [torch.full_like(low, torch.inf), torch.ones_like(low), torch.full_like(low, middle if symmetric else 0)]
    search = _Search(tile, importance.reshape(1, -1, group), top, best)
    one = torch.ones_like(low)
    side = torch.where(high.abs() > low.abs(), -one, one) if symmetric and signed_scale else one
    # a tensor, because CUDA divides by a number with a multiplication
    parts = one * (middle if symmetric and signed_scale else top / 2 if symmetric else top)
    for step in range(steps):
        shrink = 1.0 if steps == 1 else _float32(1 + _float32(_float32(shrink_min - 1) * _float32(step / (steps - 1))))
        scale = torch.where(flat, one, stored(span * shrink / parts * side, dtype))
        if symmetric:
            search.consider(scale, one * middle)
            if signed_scale and steps > 1:
                search.consider(-scale, one * middle)
            continue
        zero = (-(low.clamp(max=0) * shrink) / scale).clamp(-LIMIT, LIMIT).round()
        for move in (0.0, -1.0, 1.0) if steps > 1 else (0.0,):
            search.consider(scale, (zero + move).clamp(0, top))
    for _ in range(rounds):
        search.refit(dtype)
    scale = torch.where(flat, one, best[1])
    zero = torch.where(flat, one * (middle if symmetric else 0), best[2])
    return scale, zero.to(torch.uint8)


class _Search:
    """The best grid of each group so far: [error, scale, zero], each [N, G]."""

    def __init__(self, tile: torch.Tensor, importance: torch.Tensor, top: float, best: list[torch.Tensor]) -> None:
        self.tile, self.importance, self.top, self.best = tile, importance, top, best

    def steps(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes less the zero point, [N, G, group]."""
        quotient = (self.tile * (1.0 / scale)[..., None]).nan_to_num(-LIMIT).clamp(-LIMIT, LIMIT).round()
        return (quotient + zero[..., None]).clamp(0, self.top) - zero[..., None]

    def consider(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        off = self.tile - self.steps(scale, zero) * scale[..., None]
        error = torch.zeros_like(scale)
        for column in range(self.tile.shape[-1]):
            error = error + self.importance[..., column] * (off[..., column] * off[..., column])
        better = error < self.best[0]
        for place, value in enumerate((error, scale, zero)):
            self.best[place][better] = value[better]

    def refit(self, dtype: torch.dtype) -> None:
        steps = self.steps(self.best[1], self.best[2])
        above, below = torch.zeros_like(self.best[0]), torch.zeros_like(self.best[0])
        for column in range(steps.shape[-1]):
            weight, step = self.importance[..., column], steps[..., column]
            above = above + weight * (self.tile[..., column] * step)
            below = below + weight * (step * step)
        ratio = above / below
        usable = (below > 0) & (ratio.abs() > 0)
        self.consider(torch.where(usable, stored(ratio, dtype), self.best[1]), self.best[2])


def round_affine(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    return _codes(weight, _wide(scale, group), _wide(zero.float(), group), bits).to(torch.uint8)


def dequantize_affine(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int) -> torch.Tensor:
    return (codes.float() - _wide(zero.float(), group)) * _wide(scale, group)


def solve_columns(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor,
                  zero: torch.Tensor, group_index: torch.Tensor, bits: int) -> Pair:
    target = weight + shift
    codes, residual = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    groups = group_index.long()
    for j in range(weight.shape[1]):
        step, offset = scale[:, groups[j]], zero[:, groups[j]].float()
        code = _codes(target[:, j], step, offset, bits)
        off = weight[:, j] - (code - offset) * step
        target[:, j + 1:] += off[:, None] * factor[j, j + 1:]
        codes[:, j], residual[:, j] = code.to(torch.uint8), off
    return codes, residual


def refine_columns(gradient: torch.Tensor, hessian: torch.Tensor, old_codes: torch.Tensor, scale: torch.Tensor,
                   zero: torch.Tensor, group_index: torch.Tensor, bits: int) -> Pair:
    slope, codes, delta = gradient.clone(), old_codes.clone(), torch.zeros_like(gradient)
    groups = group_index.long()
    for j in range(gradient.shape[1]):
        step, offset, curvature = scale[:, groups[j]], zero[:, groups[j]].float(), hessian[j, j]
        value = (codes[:, j].float() - offset) * step
        code = _codes(value + slope[:, j] / curvature, step, offset, bits)
        move = (code - offset) * step - value
        taken = (2.0 * move * slope[:, j] - move * move * curvature > 0) & (curvature > 0)
        change = torch.where(taken, move, 0.0)
        slope[:, j + 1:] -= change[:, None] * hessian[j, j + 1:]
        codes[:, j] = torch.where(taken, code, codes[:, j].float()).to(torch.uint8)
        delta[:, j] = change
    return codes, delta


def multiply_int8(left: torch.Tensor, right: torch.Tensor, left_scale: torch.Tensor,
                  right_scale: torch.Tensor) -> torch.Tensor:
    sums = left.double() @ right.double().T  # float64 holds sums of such products exactly
    return sums.float() * (left_scale[:, None] * right_scale)


def pack_bits(codes: torch.Tensor, bits: int, transposed: bool) -> torch.Tensor:
    if transposed:
        return pack_bits(codes.t(), bits, False).t().contiguous()
    stream = ((codes.int()[..., None] >> torch.arange(bits, device=codes.device)) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32))
    words = stream.reshape(codes.shape[0], stream.shape[1] // 32, 32).long() << torch.arange(32, device=codes.device)
    return words.sum(-1).to(torch.int32)  # wraps as two's complement


def unpack_bits(words: torch.Tensor, bits: int, count: int, transposed: bool) -> torch.Tensor:
    if transposed:
        return unpack_bits(words.t(), bits, count, False).t().contiguous()
    stream = ((words[..., None] >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1).flatten(1)
    codes = stream[:, :count * bits].reshape(words.shape[0], count, bits)
    return (codes << torch.arange(bits, device=words.device, dtype=torch.int32)).sum(-1).to(torch.uint8)


def _codes(value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """clamp(round(value / scale) + zero, 0, 2^bits - 1), half to even; a value that is no number becomes code 0."""
    code = ((value / scale).clamp(-LIMIT, LIMIT).round() + zero).clamp(0, 2**bits - 1)
    return code.nan_to_num(0.0)


def _wide(per_group: torch.Tensor, group: int) -> torch.Tensor:
    return per_group.repeat_interleave(group, 1)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
