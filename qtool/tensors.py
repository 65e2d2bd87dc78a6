"""The plain data that passes between grids, methods, formats, models and checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qtool.moments import HeldOut

# safetensors' names of the element types, https://github.com/huggingface/safetensors#format
DTYPE_NAMES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a tensor, known before its data.

    stack: the tensor in the file that it is a part of, and its number there (checkpoint/stacks.py).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stack: tuple[str, int] | None = None

    @property
    def stored(self) -> str:
        """The name in the file."""
        return self.stack[0] if self.stack is not None else self.name

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class QuantizedTensor:
    """A linear weight [N, K] as codes on a grid; value = scale * what the grid says that the code stands for.

    codes: uint8 [N, K] (of codebooks int32 [N, K / 8, M]); on an affine grid 0 .. 2^bits - 1, standing for code - zero
    point.  scale: [N, G] in the dtype that the format stores (may be negative on affine grids).  zero_point: uint8
    [N, G], an unsigned code; 2^(bits-1) everywhere when symmetric, not used by grids of levels.  G = K / group_size;
    group_size = K means one group per row (per-channel).  extra: what a grid keeps beside, about the whole matrix (a
    global scale, nested scales, codebooks).
    activations: whether the inputs will be rounded too, which some formats store in another way.
    strategy: what rows share scales, which stay as they were fitted then: "tensor", all; "block", 128; None, none.
    offset: float32 [N, G] or None, added to all values of a group (grids whose minimum is not a multiple of the scale).
    parts: what scale and offset are made of, where a format stores that instead; each [N, some part of K].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    grid: str = "affine"
    activations: bool = False
    strategy: str | None = None
    offset: torch.Tensor | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def unit(self) -> int:
        """The columns that share a scale, or a part of it."""
        columns = self.scale.shape[1] * self.group_size
        return max([self.group_size, *(columns // part.shape[1] for part in self.parts.values() if part.shape[1])])

    def without_offset(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [N, K] less the offsets, so that values are multiples of the scales; itself if there are none."""
        if self.offset is None:
            return weight
        tile = weight.reshape(*self.offset.shape, self.group_size)
        return (tile - self.offset[..., None]).reshape(weight.shape)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The quantized rows start .. stop, as when q, k and v were solved as one stacked matrix."""
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop],
                       zero_point=self.zero_point[start:stop],
                       offset=None if self.offset is None else self.offset[start:stop],
                       parts={name: part[start:stop] for name, part in self.parts.items()})

    def columns(self, here: slice) -> QuantizedTensor:
        """Some columns, with the groups that they touch; parts of the same tensors, so that writing changes those."""
        whole = self.scale.shape[1] * self.group_size

        def touched(part: torch.Tensor) -> torch.Tensor:
            width = whole // part.shape[1]
            return part[:, here.start // width:-(-here.stop // width)]

        return replace(self, codes=self.codes[:, here], scale=touched(self.scale), zero_point=touched(self.zero_point),
                       offset=None if self.offset is None else touched(self.offset),
                       parts={name: touched(part) for name, part in self.parts.items()})

    def own(self) -> QuantizedTensor:
        """With codes, scales, offsets and parts that may be changed without changing this one's."""
        return replace(self, codes=self.codes.clone(), scale=self.scale.clone(),
                       offset=None if self.offset is None else self.offset.clone(),
                       parts={name: part.clone() for name, part in self.parts.items()})

    def to(self, device: torch.device) -> QuantizedTensor:
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device),
                       zero_point=self.zero_point.to(device),
                       extra={name: tensor.to(device) for name, tensor in self.extra.items()},
                       offset=None if self.offset is None else self.offset.to(device),
                       parts={name: part.to(device) for name, part in self.parts.items()})


CHUNK_ELEMENTS = 1 << 22  # of what lies outside of the blocks, at a time; bounds the float32 temporaries
INPUT_SCALE = "input_scale"  # in extra: the one scale of a linear's inputs, where that is calibrated, [1]
NO_CODES = torch.empty(0, 0, dtype=torch.uint8)  # of a grid that has been fitted, before codes are chosen


@dataclass
class CalibrationStats:
    """What calibration knows about the inputs x [T, K] of one set of linears that share them.

    hessian: float32 [K, K], mean of x xᵀ over the `tokens` fitting tokens.  held_out: what measures an answer.
    cross: float32 [K, K] or None, mean of (x~ - x) xᵀ with x~ the input in the unquantized model (frontier: C - H),
    over those fitting tokens that also ran through the unquantized model.  paired: the mean of x xᵀ over these tokens,
    None when they are all.  residual: float32 [N, K] or None, mean of (r~ - r) xᵀ over the tokens of `cross`, with r
    what the outputs are added to.  A step that is the only one to need these three takes them out: they are large.
    """

    hessian: torch.Tensor
    held_out: HeldOut
    tokens: int
    cross: torch.Tensor | None = None
    paired: torch.Tensor | None = None
    pooled: bool = False
    residual: torch.Tensor | None = None


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite: the ends of the range tell, in one pass and without a mask of its size."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors on the CPU hold the same bytes, read as the widest integers that fit: comparing single bytes
    takes several times as long."""
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    if left.numel() != right.numel():
        return False
    whole = left.numel() // 8 * 8
    wide = [tensor[:whole] for tensor in (left, right)]
    if all(tensor.data_ptr() % 8 == 0 and tensor.storage_offset() % 8 == 0 for tensor in wide):
        wide = [tensor.view(torch.int64) for tensor in wide]
    return torch.equal(wide[0], wide[1]) and torch.equal(left[whole:], right[whole:])


def any_number(name: str) -> str:
    """The name of a tensor with * for the numbers of blocks and experts."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def group_count(columns: int, group_size: int) -> int:
    """Number of groups along K; group_size -1 is one group per row."""
    return 1 if group_size == -1 else columns // group_size
