"""The plain data that passes between grids, methods, formats, models and checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qtool.moments import HeldOut

# safetensors' names of the element types, https://github.com/huggingface/safetensors#format
DTYPE_NAMES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a tensor, known before its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class QuantizedTensor:
    """A linear weight [N, K] on an affine integer grid: value = (code - zero point) * scale.

    codes: uint8 [N, K], 0 .. 2^bits - 1.  scale: [N, G] in the dtype that the format stores (may be negative).
    zero_point: uint8 [N, G], an unsigned code; 2^(bits-1) everywhere when symmetric.
    G = K / group_size; group_size = K means one group per row (per-channel).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The quantized rows start .. stop, as when q, k and v were solved as one stacked matrix."""
        return QuantizedTensor(self.codes[start:stop], self.scale[start:stop], self.zero_point[start:stop],
                               self.bits, self.group_size, self.symmetric)


@dataclass
class CalibrationStats:
    """What calibration knows about the inputs x [T, K] of one set of linears that share them.

    hessian: float32 [K, K], mean of x xᵀ over the `tokens` fitting tokens.  held_out: what measures an answer.
    cross: float32 [K, K] or None, mean of (x~ - x) xᵀ with x~ the input in the unquantized model (frontier: C - H),
    over those fitting tokens that also ran through the unquantized model.  paired: the mean of x xᵀ over these tokens,
    None when they are all.  A step that is the only one to need `cross` and `paired` takes them out: they are large.
    """

    hessian: torch.Tensor
    held_out: HeldOut
    tokens: int
    cross: torch.Tensor | None = None
    paired: torch.Tensor | None = None
    pooled: bool = False


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite: the ends of the range tell, in one pass and without a mask of its size."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def group_count(columns: int, group_size: int) -> int:
    """Number of groups along K; group_size -1 is one group per row."""
    return 1 if group_size == -1 else columns // group_size
