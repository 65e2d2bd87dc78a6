"""The arithmetic that is worth a kernel: fitting grids, choosing codes, packing bits.

These wrappers are the only way in: they check shapes and types once, make tensors contiguous, and call torch.ops.qtool.
A wrong argument is a bug in the caller and raises ValueError. Scales are float32 here, whatever the file stores.
"""

from __future__ import annotations

import torch

from qtool.ops import _library
from qtool.ops.reference import SCALE_TYPES

MAX_BLOCK = 256
_ops = torch.ops.qtool


def native_available() -> bool:
    """Are compiled kernels loaded?"""
    return _library.NATIVE is not None


def backend() -> str:
    """What the ops run on, for `inspect --system` and the manifest."""
    if _library.NATIVE is None:
        return "reference (no compiled extension)"
    cuda = torch._C._dispatch_has_kernel_for_dispatch_key("qtool::fit_affine", "CUDA")
    return f"cpu: {_library.NATIVE.qtool_instruction_set().decode()}, cuda: {'built' if cuda else 'not built'}"


def force_instruction_set(name: str) -> bool:
    """For tests: use "portable", "avx2" or "avx512" kernels ("" is the best); False where that cannot run."""
    return _library.NATIVE is not None and bool(_library.NATIVE.qtool_force_instruction_set(name.encode()))


def fit_affine(weight: torch.Tensor, importance: torch.Tensor, group_size: int, bits: int, symmetric: bool,
               scale_dtype: torch.dtype, shrink_steps: int = 24, shrink_min: float = 0.4, signed: bool = True,
               rounds: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of weight [N, K] by least error weighted by importance [K]: scale float32 [N, G], zero point uint8 [N, G].

    Tries shrink_steps ranges from the whole down to shrink_min of it (with zero points one off, or with both signs of
    the scale), then `rounds` of closed-form refits s = Σ h w c' / Σ h c'². Scales are values of scale_dtype.
    """
    _matrix("weight", weight)
    _groups(weight.shape[1], group_size)
    _range("bits", bits, 2, 8)
    _require(importance.shape == (weight.shape[1],), f"importance {_shape(importance)} for weight {_shape(weight)}")
    _require(scale_dtype in SCALE_TYPES, f"scale_dtype {scale_dtype}")
    _require(shrink_steps >= 1 and rounds >= 0, f"shrink_steps {shrink_steps}, rounds {rounds}")
    return _ops.fit_affine(_float(weight), _float(importance), group_size, bits, symmetric,
                           SCALE_TYPES.index(scale_dtype), shrink_steps, shrink_min, signed, rounds)


def round_affine(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_size: int,
                 bits: int) -> torch.Tensor:
    """Codes uint8 [N, K]: clamp(round(w / s) + z, 0, 2^bits - 1), half to even."""
    _matrix("weight", weight)
    _grid(weight.shape, scale, zero_point, group_size)
    _range("bits", bits, 2, 8)
    return _ops.round_affine(_float(weight), _float(scale), zero_point.contiguous(), group_size, bits)


def dequantize_affine(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor,
                      group_size: int) -> torch.Tensor:
    """float32 [N, K]: (code - zero point) * scale."""
    _matrix("codes", codes, torch.uint8)
    _grid(codes.shape, scale, zero_point, group_size)
    return _ops.dequantize_affine(codes.contiguous(), _float(scale), zero_point.contiguous(), group_size)


def solve_columns(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor,
                  zero_point: torch.Tensor, group_index: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ within B <= 256 columns, left to right: codes uint8 [N, B] and D = weight - value, float32 [N, B].

    t_j = weight_j + shift_j + Σ_{i<j} D_i factor_ij; code_j is nearest to t_j. weight, shift [N, B]; factor [B, B]
    (above the diagonal); scale, zero_point [N, G]; group_index int32 [B] names each column's group.
    """
    _matrix("weight", weight)
    _block(weight, shift, factor, scale, zero_point, group_index, bits)
    return _ops.solve_columns(_float(weight), _float(shift), _float(factor), _float(scale), zero_point.contiguous(),
                              group_index.contiguous(), bits)


def refine_columns(gradient: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor,
                   zero_point: torch.Tensor, group_index: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One coordinate-descent sweep over B <= 256 columns: new codes uint8 [N, B] and change of value float32 [N, B].

    gradient: (D H) [N, B] for D = target - value; hessian [B, B]. A code moves to the grid value nearest to
    value_j + gradient_j / H_jj if that lowers the loss; ties keep it.
    """
    _matrix("codes", codes, torch.uint8)
    _block(gradient, codes, hessian, scale, zero_point, group_index, bits)
    return _ops.refine_columns(_float(gradient), _float(hessian), codes.contiguous(), _float(scale),
                               zero_point.contiguous(), group_index.contiguous(), bits)


def pack_bits(codes: torch.Tensor, bits: int, transposed: bool = False) -> torch.Tensor:
    """Dense little-endian bit stream: uint8 [N, K] -> int32 [N, ceil(K bits / 32)], unused bits zero.

    transposed packs along the first dimension: [K, N] -> int32 [ceil(K bits / 32), N], as GPTQ's qweight.
    """
    _matrix("codes", codes, torch.uint8)
    _range("bits", bits, 2, 8)
    return _ops.pack_bits(codes.contiguous(), bits, transposed)


def unpack_bits(words: torch.Tensor, bits: int, count: int, transposed: bool = False) -> torch.Tensor:
    """The inverse of pack_bits: uint8 [N, count], or [count, N] when transposed."""
    _matrix("words", words, torch.int32)
    _range("bits", bits, 2, 8)
    have = words.shape[0 if transposed else 1]
    _require(count >= 0 and have == _library.words(count, bits),
             f"{have} words cannot hold {count} codes of {bits} bits")
    return _ops.unpack_bits(words.contiguous(), bits, count, transposed)


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32).contiguous()


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _require(right: bool, text: str) -> None:
    if not right:
        raise ValueError(f"qtool.ops: {text}")


def _range(name: str, value: int, low: int, high: int) -> None:
    _require(low <= value <= high, f"{name} is {value}, not {low} to {high}")


def _matrix(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    _require(tensor.dim() == 2, f"{name} has shape {_shape(tensor)}, not two dimensions")
    right = tensor.dtype == dtype if dtype else tensor.dtype.is_floating_point
    _require(right, f"{name} is {tensor.dtype}, not {dtype or 'floating point'}")


def _groups(columns: int, group_size: int) -> None:
    _require(group_size > 0 and columns % group_size == 0, f"group_size {group_size} does not divide {columns} columns")


def _grid(shape: torch.Size, scale: torch.Tensor, zero_point: torch.Tensor, group_size: int) -> None:
    _groups(shape[1], group_size)
    wanted = (shape[0], shape[1] // group_size)
    _require(scale.shape == wanted and zero_point.shape == wanted,
             f"scale {_shape(scale)} and zero point {_shape(zero_point)} should be {list(wanted)}")
    _require(zero_point.dtype == torch.uint8, f"zero point is {zero_point.dtype}, not uint8")


def _block(weight: torch.Tensor, second: torch.Tensor, square: torch.Tensor, scale: torch.Tensor,
           zero_point: torch.Tensor, group_index: torch.Tensor, bits: int) -> None:
    rows, columns = weight.shape
    _range("bits", bits, 2, 8)
    _require(columns <= MAX_BLOCK, f"{columns} columns are more than {MAX_BLOCK}")
    _require(second.shape == weight.shape and square.shape == (columns, columns),
             f"shapes {_shape(weight)}, {_shape(second)} and {_shape(square)} do not fit")
    _require(scale.dim() == 2 and scale.shape == zero_point.shape and scale.shape[0] == rows
             and zero_point.dtype == torch.uint8,
             f"scale {_shape(scale)}, zero point {_shape(zero_point)} for {rows} rows")
    _require(group_index.shape == (columns,) and group_index.dtype == torch.int32,
             f"group_index is {group_index.dtype} {_shape(group_index)}, not int32 [{columns}]")
    if columns and group_index.device.type == "cpu":
        low, high = int(group_index.min()), int(group_index.max())
        _require(low >= 0 and high < scale.shape[1], f"group_index {low}..{high} for {scale.shape[1]} groups")
