"""Grids given by a table of levels: value = level[code] * scale, one positive scale per group of input columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qtool import ops
from qtool.recipe import Scheme
from qtool.tensors import NO_CODES, QuantizedTensor


@dataclass(frozen=True)
class LevelGrid:
    """levels: float32 [L], ascending.  edges: float32 [L - 1], above edge i a quotient becomes level i + 1.

    groups: the group sizes that there are (empty: any).  scale_dtype: of the scales, None for the format's.
    shrink: the other end of the range that a search tries, in units of the absmax.  nests: its scales may be kept in
    8 bits.  shares: rows may share scales.
    """

    name: str
    bits: int
    levels: torch.Tensor
    edges: torch.Tensor
    groups: tuple[int, ...] = ()
    scale_dtype: torch.dtype | None = None
    shrink: float = 0.5
    nests: bool = False
    shares: bool = False

    def check(self, scheme: Scheme) -> str | None:
        """Why the scheme cannot be this grid, or None."""
        if scheme.bits != self.bits:
            return f"the {self.name} grid has {self.bits} bits, not {scheme.bits}; leave --bits out"
        if scheme.double_quant and not self.nests:
            return (f"the {self.name} grid keeps its scales as they are; leave --double-quant out (it is for nf4 and "
                    "fp4)")
        if not scheme.symmetric:
            return f"the {self.name} grid has no zero points; leave --asymmetric out"
        if scheme.strategy and not self.shares:
            return shared_refusal(self.name)
        if self.groups and scheme.group_size not in self.groups:
            sizes = ", ".join("-1 (per channel)" if size == -1 else str(size) for size in self.groups)
            return f"the {self.name} grid has groups of {sizes}, not {scheme.group_size}"
        return None

    def width(self, scheme: Scheme, columns: int) -> int:
        """Columns per group; -1 is one group per row."""
        return columns if scheme.group_size == -1 else int(scheme.group_size)

    def reach(self, scheme: Scheme, scale_dtype: torch.dtype) -> float:
        """The largest |weight| that the largest scale leaves representable."""
        return float(torch.finfo(self.scale_dtype or scale_dtype).max) * float(self.levels.abs().max())

    def fit(self, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype,
            importance: torch.Tensor | None = None, shrink_steps: int = 1, signed: bool = False,
            rounds: int = 0) -> QuantizedTensor:
        """The scale of each group of weight [N, K], absmax or searched as in affine.fit; the codes are to be chosen."""
        columns, dtype = weight.shape[1], self.scale_dtype or scale_dtype
        group = self.width(scheme, columns)
        importance = torch.ones(columns, device=weight.device) if importance is None else importance
        levels, edges = self.levels.to(weight.device), self.edges.to(weight.device)
        scale = ops.fit_levels(weight, importance, group, levels, edges, dtype, shrink_steps, self.shrink, rounds)
        return self.fitted(scale.to(torch.float32 if dtype.itemsize == 1 else dtype), group)

    def fitted(self, scale: torch.Tensor, group: int, codes: torch.Tensor = NO_CODES,
               strategy: str | None = None) -> QuantizedTensor:
        """Scales [N, G], with the codes if there are any yet."""
        return QuantizedTensor(codes, scale, torch.zeros_like(scale, dtype=torch.uint8), self.bits, group, True,
                               grid=self.name, strategy=strategy)

    def encode(self, weight: torch.Tensor, fitted: QuantizedTensor) -> QuantizedTensor:
        """Every weight [N, K] at the nearest level."""
        levels, edges = self.levels.to(weight.device), self.edges.to(weight.device)
        codes = ops.round_levels(weight, fitted.scale.float(), levels, edges, fitted.group_size)
        return replace(fitted, codes=codes)

    def decode(self, tensor: QuantizedTensor) -> torch.Tensor:
        """float32 [N, K]."""
        levels = self.levels.to(tensor.codes.device)
        return ops.dequantize_levels(tensor.codes, tensor.scale.float(), levels, tensor.group_size)

    def steps(self, codes: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """The levels of codes [N, any], float32."""
        return self.levels.to(codes.device)[codes.long()]

    def solve_columns(self, weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, fitted: QuantizedTensor,
                      group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ops.solve_columns."""
        levels, edges = self.levels.to(weight.device), self.edges.to(weight.device)
        return ops.solve_levels(weight, shift, factor, fitted.scale.float(), levels, edges, group_index)

    def refine_columns(self, gradient: torch.Tensor, hessian: torch.Tensor, part: QuantizedTensor,
                       group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ops.refine_columns."""
        levels, edges = self.levels.to(gradient.device), self.edges.to(gradient.device)
        return ops.refine_levels(gradient, hessian, part.codes, part.scale.float(), levels, edges, group_index)


def shared_refusal(name: str) -> str:
    """Of a strategy, on a grid that has none."""
    return f"the {name} grid has scales per channel or group; leave strategy out (tensor and block are for fp8)"


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """Edges halfway between the levels; a value on an edge goes to the lower level."""
    return (levels[1:] + levels[:-1]) / 2


def small_float(exponent_bits: int, mantissa_bits: int, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and edges of a small floating-point type: magnitudes up to `top`, both signs, one zero; ties to even."""
    bias, count = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    magnitudes = [(code % count + (count if code >= count else 0))
                  * 2.0 ** (max(code // count, 1) - bias - mantissa_bits)
                  for code in range(2 ** (exponent_bits + mantissa_bits))]
    magnitudes = [value for value in magnitudes if value <= top]
    positive = torch.tensor(magnitudes)
    levels = torch.cat([-positive[1:].flip(0), positive])
    edges = midpoints(levels)
    # level i of zero's right has bit pattern i - zero: of two neighbours, the even one takes what lies on their edge
    zero = len(magnitudes) - 1
    up = (torch.arange(1, len(levels)) - zero) % 2 == 0
    return levels, torch.where(up, torch.nextafter(edges, torch.tensor(-torch.inf)), edges)
