"""Initializers from the tensors of a checkpoint: the blocks of MatMulNBits, and tensors kept as they are.

MatMulNBits (com.microsoft, onnxruntime docs/ContribOperators.md) computes A x dequant(B)ᵀ with
    B            uint8 [N, K / block, block bits / 8]   codes of a block as one little-endian bit stream
    scales       in the dtype of A [N, K / block]
    zero_points  uint8 [N, ceil(K / block bits / 8)]    packed like the codes; without them 2^(bits - 1)
A group that is longer than a block is several blocks with the same scale; codes of 3 bits take 4, of 5 to 7 take 8.
So what a graph stands for is equal to the checkpoint's weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qtool import found
from qtool.checkpoint.reader import refuse_non_finite
from qtool.decode import Source
from qtool.errors import CheckpointError, InputError
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor, TensorSpec, group_count

BLOCK_SIZES = (128, 64, 32, 16)
STORED_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
DENSE_FIRST = "write dense weights first (qtool export --to hf) and export those"
CHECKED_ROWS = 4096


@dataclass(frozen=True)
class Part:
    """Initializers that are written together, made of one tensor of the source.

    load: the tensors of specs.  check: whether what was read back from the file stands for what the source holds (all
    parts are also compared byte by byte).
    """

    tensor: str
    specs: tuple[TensorSpec, ...]
    load: Callable[[], tuple[torch.Tensor, ...]]
    check: Callable[[Sequence[torch.Tensor]], bool] = lambda tensors: True


@dataclass(frozen=True)
class Blocks:
    """How MatMulNBits holds a linear. size: columns of a block.  dtype: of the scales."""

    bits: int
    size: int
    zero_points: bool
    dtype: torch.dtype = torch.float32

    def specs(self, name: str, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        rows, count = shape[0], shape[1] // self.size
        specs = [TensorSpec(f"{name}.qweight", torch.uint8, (rows, count, self.size * self.bits // 8)),
                 TensorSpec(f"{name}.scales", self.dtype, (rows, count))]
        if self.zero_points:
            specs.append(TensorSpec(f"{name}.qzeros", torch.uint8, (rows, -(-count * self.bits // 8))))
        return tuple(specs)


def refusal(scheme: Scheme, linear: str, shape: tuple[int, int]) -> str | None:
    """Why MatMulNBits cannot hold a linear [N, K], and what to do; None when it can."""
    if scheme.grid != "affine":
        return (f"MatMulNBits of ONNX holds integers, not the {scheme.grid} grid of {linear}; quantize the original "
                f"to integers (qtool quantize MODEL --method gptq), or {DENSE_FIRST}")
    if scheme.activations:
        return (f"MatMulNBits of ONNX holds weights only, but {linear} has activations: {scheme.activations}; quantize "
                f"the original without that, or {DENSE_FIRST}")
    columns = _columns(scheme, shape)
    if shape[1] % columns or _block_size(columns) is None:
        sizes, what = ", ".join(map(str, sorted(BLOCK_SIZES))), "rows" if scheme.group_size == -1 else "groups"
        return (f"MatMulNBits of ONNX has blocks of {sizes} columns, which do not fit the {what} of {columns} columns "
                f"of {linear}; quantize the original with --group-size 32, or {DENSE_FIRST}")
    return None


def blocks(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Blocks:
    """The blocks of a linear [N, K] that `refusal` lets pass; the largest that fit its groups."""
    size = _block_size(_columns(scheme, shape))
    assert size is not None
    return Blocks(STORED_BITS[scheme.bits], size, not scheme.symmetric, dtype)


def quantized(source: Source, linear: str, name: str, dtype: torch.dtype) -> tuple[Part, Blocks]:
    """The initializers NAME.qweight, .scales and perhaps .qzeros of a quantized linear. Raises InputError."""
    shape = shape_of(source, linear)
    reason = refusal(source.schemes[linear], linear, shape)
    if reason:
        raise InputError(reason)
    form = blocks(source.schemes[linear], shape, dtype)

    def check(tensors: Sequence[torch.Tensor]) -> bool:
        meant = source.read_quantized(linear)
        again = unpack(tensors, form)
        decode = found.load("grids", "affine").decode
        return all(torch.equal(decode(again.rows(start, start + CHECKED_ROWS)),
                               decode(meant.rows(start, start + CHECKED_ROWS)))
                   for start in range(0, shape[0], CHECKED_ROWS))

    def load() -> tuple[torch.Tensor, ...]:
        tensor = source.read_quantized(linear)
        if not (form.zero_points or tensor.symmetric):
            raise CheckpointError(f"{linear}: {source.origin} calls it symmetric, but its zero points are not in the "
                                  f"middle; {DENSE_FIRST}")
        return pack(tensor, form)

    return Part(f"{linear}.weight", form.specs(name, shape), load, check), form


def shape_of(source: Source, linear: str) -> tuple[int, int]:
    """(N, K)"""
    rows, columns = source.specs[linear + ".weight"].shape
    return rows, columns


def pack(tensor: QuantizedTensor, form: Blocks) -> tuple[torch.Tensor, ...]:
    """The tensors of Blocks.specs. Blocks without zero points are for symmetric tensors."""
    rows, columns = tensor.codes.shape
    repeats = columns // group_count(columns, tensor.group_size) // form.size
    scale = tensor.scale.to(form.dtype).repeat_interleave(repeats, 1)
    zero = tensor.zero_point.repeat_interleave(repeats, 1)
    codes, middle = tensor.codes, 1 << (form.bits - 1)
    if not form.zero_points:
        codes = codes + (middle - (1 << (tensor.bits - 1)))
    packed = pack_rows(codes, form.bits).view(rows, columns // form.size, -1)
    return (packed, scale, pack_rows(zero, form.bits)) if form.zero_points else (packed, scale)


def unpack(tensors: Sequence[torch.Tensor], form: Blocks) -> QuantizedTensor:
    """The codes of `form` that the tensors of Blocks.specs hold."""
    packed, scale = tensors[:2]
    rows, count = scale.shape
    codes = unpack_rows(packed.reshape(rows, -1), form.bits, count * form.size)
    zero = (unpack_rows(tensors[2], form.bits, count) if form.zero_points
            else torch.full((rows, count), 1 << (form.bits - 1), dtype=torch.uint8))
    return QuantizedTensor(codes, scale, zero, form.bits, form.size, not form.zero_points)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] of `bits` bits (a divisor of 8) -> uint8 [N, ceil(K bits / 8)], the first code lowest."""
    each = 8 // bits
    padded = functional.pad(codes, (0, -codes.shape[1] % each)).view(codes.shape[0], -1, each)
    result = padded[..., 0].clone()
    for place in range(1, each):
        result |= padded[..., place] << (bits * place)
    return result


def unpack_rows(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse: uint8 [N, columns]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(packed.shape[0], -1)[:, :columns].contiguous()


def plain(source: Source, tensor: str, name: str, transposed: bool = False) -> Part:
    """A tensor of the source in its own dtype; one that is quantized there, or float64, becomes float32."""
    dtype = kept_dtype(source, tensor)
    shape = source.specs[tensor].shape
    order = tuple(reversed(shape)) if transposed else shape

    def load() -> tuple[torch.Tensor]:
        dense = read_dense(source, tensor).to(dtype)
        return ((dense.T if transposed else dense).contiguous(),)

    return Part(tensor, (TensorSpec(name, dtype, order),), load)


def vector(source: Source, tensor: str, name: str, dtype: torch.dtype, offset: float = 0.0) -> Part:
    """A bias, or the weight of a norm, plus offset."""
    spec = TensorSpec(name, dtype, source.specs[tensor].shape)
    return Part(tensor, (spec,), lambda: ((_read(source, tensor).float() + offset).to(dtype).contiguous(),))


def kept_dtype(source: Source, tensor: str) -> torch.dtype:
    stored = source.specs[tensor].dtype
    exact = tensor.removesuffix(".weight") not in source.schemes and stored in (torch.bfloat16, torch.float16)
    return stored if exact else torch.float32


def read_dense(source: Source, tensor: str) -> torch.Tensor:
    """As stored; a quantized tensor in float32, not rounded to the dtype of the model."""
    linear = tensor.removesuffix(".weight")
    if linear == tensor or linear not in source.schemes:
        return _read(source, tensor)
    decode: Any = found.load("grids", source.schemes[linear].grid).decode
    return decode(source.read_quantized(linear))


def _columns(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Columns that share a scale."""
    return shape[1] if scheme.group_size == -1 else int(scheme.group_size)


def _block_size(columns: int) -> int | None:
    return next((size for size in BLOCK_SIZES if columns % size == 0), None)


def _read(source: Source, name: str) -> torch.Tensor:
    return refuse_non_finite(source.origin, name, source.read(name))
