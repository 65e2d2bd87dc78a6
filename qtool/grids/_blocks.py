"""Grids of GGUF's block types: value = d * scale * level - dmin * min, the scales and mins small integers.

Source: ggml's block layouts (formats.md 6.3). A block of `super` columns has d (and dmin) in float16; each sub-block of
`sub` columns in it an integer scale (and min). Where there are no sub-blocks the block has d alone, or d and dmin.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from qtool import ops
from qtool.grids._levels import midpoints
from qtool.recipe import Scheme
from qtool.tensors import NO_CODES, QuantizedTensor

HALF_MAX = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class BlockGrid:
    """One type. levels: float32 [L], what codes stand for.  scales: the least and largest integer; (1, 1): none.

    mins: the largest integer min; 0: there is no minimum; 1 without sub-blocks: dmin is minus the minimum itself.
    """

    name: str
    bits: int
    levels: torch.Tensor
    super: int
    sub: int
    scales: tuple[int, int] = (1, 1)
    mins: int = 0

    JOINT = True
    FREE_SCALES = False

    @functools.cached_property
    def edges(self) -> torch.Tensor:
        """float32 [L - 1]: above edge i a quotient is nearer to level i + 1."""
        return midpoints(self.levels)

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether the levels are all the integers that `bits` bits count."""
        whole = torch.arange(len(self.levels)) + self.levels[0]
        return len(self.levels) == 1 << self.bits and bool(torch.equal(self.levels, whole))

    @property
    def plain(self) -> bool:
        """Whether a block has one scale, for codes in equal steps."""
        return self.uniform and self.sub == self.super

    @property
    def scheme(self) -> Scheme:
        return Scheme(grid=self.name, bits=self.bits, group_size=self.super, symmetric=not self.mins)

    def check(self, scheme: Scheme) -> str | None:
        """Why the scheme cannot be this grid, or None."""
        if scheme != self.scheme:
            return f"the type {self.name} has its bits and groups; leave everything but the grid out"
        return None

    def width(self, scheme: Scheme, columns: int) -> int:
        """Columns per scale."""
        return self.sub

    def reach(self, scheme: Scheme, scale_dtype: torch.dtype) -> float:
        """The largest |weight| that the largest scale leaves representable."""
        return HALF_MAX * max(map(abs, self.scales)) * float(self.levels.abs().max()) / (2 if self.mins else 1)

    def fit(self, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype,
            importance: torch.Tensor | None = None, shrink_steps: int = 1, signed: bool = False,
            rounds: int = 0) -> QuantizedTensor:
        """Scales of weight [N, K] by least error weighted by importance [K]; the codes are still to be chosen.

        Without importance large weights count more, as their inputs are not known: sqrt(mean w^2 + w^2).
        """
        energy = 0.0 if importance is not None else 1.0
        importance = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
        levels = self.levels.to(weight.device)
        d, scales, dmin, mins = ops.fit_blocks(weight, importance, levels, self.edges.to(weight.device), self.super,
                                               self.sub, self.scales, self.mins, shrink_steps, rounds, energy)
        return self.fitted(d, scales, dmin, mins)

    def fitted(self, d: torch.Tensor, scales: torch.Tensor, dmin: torch.Tensor, mins: torch.Tensor,
               codes: torch.Tensor = NO_CODES) -> QuantizedTensor:
        """d, dmin: float32 [N, K / super]; scales (less the least), mins: uint8 [N, K / sub]."""
        per = self.super // self.sub
        scale = d.repeat_interleave(per, 1) * (scales.float() + self.scales[0])
        zero = torch.full_like(scales, -int(self.levels[0]) if self.uniform else 0)
        parts, offset = {"d": d, "scales": scales}, None
        if self.mins:
            parts |= {"dmin": dmin, "mins": mins}
            offset = -(dmin.repeat_interleave(per, 1) * mins.float())
        return QuantizedTensor(codes, scale, zero, self.bits, self.sub, not self.mins, grid=self.name, offset=offset,
                               parts=parts)

    def holding(self, tensor: QuantizedTensor) -> QuantizedTensor | None:
        """The values of an affine tensor [N, K] in blocks of this type; None where they are not exactly such.

        A type without sub-blocks has them when d, which is the scale, and the minimum, -zero point * scale, are
        float16 numbers and the type has all codes. Groups may be wider than its blocks, which then repeat the scale.
        """
        if not self.plain or tensor.grid != "affine" or tensor.group_size % self.super or tensor.offset is not None:
            return None
        per = tensor.group_size // self.super
        d, zero = tensor.scale.float().repeat_interleave(per, 1), tensor.zero_point.repeat_interleave(per, 1)
        minimum = zero.double() * d.double()  # its negative
        steps = tensor.codes if self.mins else self._without_zero(tensor)
        if steps is None or not _is_half(d) or (self.mins and not (tensor.bits <= self.bits and _is_half(minimum))):
            return None
        none = torch.zeros(d.shape, dtype=torch.uint8)
        return self.fitted(d, none, minimum.float(), torch.ones_like(none), steps)

    def as_affine(self, tensor: QuantizedTensor) -> QuantizedTensor | None:
        """The inverse, for a plain type: float16 scales; None where a minimum is no zero point times the scale."""
        scale = tensor.scale
        if tensor.offset is None:
            zero = torch.full(scale.shape, -float(self.levels[0]), dtype=torch.float64)
        else:
            zero = torch.where(scale == 0, 0.0, (-tensor.offset.double() / scale.double()).round())
            inside = (zero >= 0) & (zero < len(self.levels)) & (zero * scale.double() == -tensor.offset.double())
            if not bool(inside.all()):
                return None
        return QuantizedTensor(tensor.codes, scale.to(torch.float16), zero.to(torch.uint8), self.bits, self.sub,
                               tensor.offset is None)

    def _without_zero(self, tensor: QuantizedTensor) -> torch.Tensor | None:
        """uint8 codes of this type for code - zero point; None where one lies beside the levels."""
        tile = tensor.codes.view(*tensor.zero_point.shape, -1).short() - tensor.zero_point[..., None].short()
        codes = tile - int(self.levels[0])
        inside = bool((codes >= 0).all()) and bool((codes < len(self.levels)).all())
        return codes.to(torch.uint8).view_as(tensor.codes) if inside else None

    def encode(self, weight: torch.Tensor, fitted: QuantizedTensor) -> QuantizedTensor:
        """Every weight [N, K] at the nearest value."""
        weight = fitted.without_offset(weight)
        if self.uniform:
            codes = ops.round_affine(weight, fitted.scale, fitted.zero_point, self.sub, self.bits)
        else:
            levels, edges = self.levels.to(weight.device), self.edges.to(weight.device)
            codes = ops.round_levels(weight, fitted.scale, levels, edges, self.sub)
        return replace(fitted, codes=codes)

    def decode(self, tensor: QuantizedTensor) -> torch.Tensor:
        """float32 [N, K], the values that ggml computes."""
        if self.uniform:
            values = ops.dequantize_affine(tensor.codes, tensor.scale, tensor.zero_point, self.sub)
        else:
            values = ops.dequantize_levels(tensor.codes, tensor.scale, self.levels.to(tensor.codes.device), self.sub)
        if tensor.offset is not None:
            values.view(*tensor.offset.shape, self.sub).add_(tensor.offset[..., None])
        return values

    def steps(self, codes: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """The levels of codes [N, any], float32."""
        return self.levels.to(codes.device)[codes.long()]

    def solve_columns(self, weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, fitted: QuantizedTensor,
                      group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ops.solve_columns; weight is without the offsets."""
        if self.uniform:
            return ops.solve_columns(weight, shift, factor, fitted.scale, fitted.zero_point, group_index, self.bits)
        levels, edges = self.levels.to(weight.device), self.edges.to(weight.device)
        return ops.solve_levels(weight, shift, factor, fitted.scale, levels, edges, group_index)

    def refine_columns(self, gradient: torch.Tensor, hessian: torch.Tensor, part: QuantizedTensor,
                       group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ops.refine_columns."""
        if self.uniform:
            return ops.refine_columns(gradient, hessian, part.codes, part.scale, part.zero_point, group_index,
                                      self.bits)
        levels, edges = self.levels.to(gradient.device), self.edges.to(gradient.device)
        return ops.refine_levels(gradient, hessian, part.codes, part.scale, levels, edges, group_index)

    def refit(self, part: QuantizedTensor, error: torch.Tensor, hessian: torch.Tensor) -> None:
        """Least squares for d and dmin of each block, then for each integer, codes kept; in place, as is `error`.

        part: K a multiple of super.  error: E = D H [N, K].  hessian: [K, K]. Every change lowers the layer loss.
        """
        for block in range(part.parts["d"].shape[1]):
            here = slice(block * self.super, (block + 1) * self.super)
            groups = slice(block * (self.super // self.sub), (block + 1) * (self.super // self.sub))
            levels = self.steps(part.codes[:, here], part.zero_point)
            _refit_whole(part, block, groups, levels, error, hessian, here, self)
            if self.scales[0] != self.scales[1]:
                _refit_integers(part, block, groups, levels, error, hessian, here, self)
            d = part.parts["d"][:, block:block + 1]
            part.scale[:, groups] = d * (part.parts["scales"][:, groups].float() + self.scales[0])
            if part.offset is not None:
                dmin, mins = part.parts["dmin"][:, block:block + 1], part.parts["mins"][:, groups]
                part.offset[:, groups] = -(dmin * mins.float())


def _refit_whole(part: QuantizedTensor, block: int, groups: slice, levels: torch.Tensor, error: torch.Tensor,
                 hessian: torch.Tensor, here: slice, grid: BlockGrid) -> None:
    """The 2 x 2 problem of d and dmin: value = d a - dmin b."""
    d = part.parts["d"]
    a = levels * (part.parts["scales"][:, groups].float() + grid.scales[0]).repeat_interleave(grid.sub, 1)
    into = a @ hessian[here]
    aa, slope = (into[:, here] * a).sum(1), (error[:, here] * a).sum(1)
    if part.offset is None:
        move = _half(d[:, block] + slope / aa) - d[:, block]
        move = torch.where((aa > 0) & (2 * move * slope > move.square() * aa) & move.isfinite(), move, 0.0)
        d[:, block] += move
        error.addcmul_(into, move[:, None].expand_as(into), value=-1)
        return
    dmin = part.parts["dmin"]
    b = part.parts["mins"][:, groups].float().repeat_interleave(grid.sub, 1)
    other = b @ hessian[here]
    ab, bb, fall = (other[:, here] * a).sum(1), (other[:, here] * b).sum(1), -(error[:, here] * b).sum(1)
    determinant = aa * bb - ab * ab
    move = _half(d[:, block] + (slope * bb + fall * ab) / determinant) - d[:, block]
    lower = _half(dmin[:, block] + (fall * aa + slope * ab) / determinant) - dmin[:, block]
    gain = 2 * (move * slope + lower * fall) - (move.square() * aa - 2 * move * lower * ab + lower.square() * bb)
    taken = (determinant > 0) & (gain > 0) & move.isfinite() & lower.isfinite()
    move, lower = torch.where(taken, move, 0.0), torch.where(taken, lower, 0.0)
    d[:, block] += move
    dmin[:, block] += lower
    error.sub_(move[:, None] * into - lower[:, None] * other)


def _refit_integers(part: QuantizedTensor, block: int, groups: slice, levels: torch.Tensor, error: torch.Tensor,
                    hessian: torch.Tensor, here: slice, grid: BlockGrid) -> None:
    for index in range(groups.start, groups.stop):
        columns = slice(index * grid.sub, (index + 1) * grid.sub)
        rows, square = hessian[columns], hessian[columns, columns]
        steps = levels[:, columns.start - here.start:columns.stop - here.start]
        low, high = grid.scales
        _move(part.parts["scales"], part.parts["d"][:, block], index, steps, low, high, error, rows, square, columns)
        if part.offset is not None:
            least = -torch.ones_like(steps)
            _move(part.parts["mins"], part.parts["dmin"][:, block], index, least, 0, grid.mins, error, rows, square,
                  columns)


def _move(integers: torch.Tensor, unit: torch.Tensor, index: int, steps: torch.Tensor, low: int, high: int,
          error: torch.Tensor, rows: torch.Tensor, square: torch.Tensor, columns: slice) -> None:
    """The best integer of one sub-block, which stands for integer * unit * steps; stored less `low`."""
    slope = (error[:, columns] * steps).sum(1)
    curvature = ((steps @ square) * steps).sum(1)
    old = integers[:, index].float() + low
    wanted = (old + slope / (curvature * unit)).nan_to_num(0.0, 0.0, 0.0).clamp(low, high).round()
    move = (wanted - old) * unit
    taken = (curvature > 0) & (2 * move * slope > move.square() * curvature)
    integers[:, index] = torch.where(taken, wanted - low, old - low).to(torch.uint8)
    error.sub_((torch.where(taken, move, 0.0)[:, None] * steps) @ rows)


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float16).float()


def _is_half(value: torch.Tensor) -> bool:
    """Whether all are float16 numbers."""
    half = value.to(torch.float16)
    return bool(torch.isfinite(half).all()) and bool((half.double() == value.double()).all())
