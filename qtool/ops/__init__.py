"""The arithmetic that is worth a kernel: fitting grids, choosing codes, packing bits, multiplying 8-bit integers.

These wrappers are the only way in: they bring tensors into the form of the ops (float32, contiguous), check them
(checks.py, ValueError) and call torch.ops.qtool. Scales are float32 here, whatever the file stores. The kernels run on
the tensors' device; on the CPU with torch.get_num_threads() threads, whose number changes no bit.
"""

from __future__ import annotations

import torch

from qtool.ops import _library, checks, extremes
from qtool.ops.checks import MAX_BLOCK, MAX_PRODUCTS, SCALE_TYPES

__all__ = ["MAX_BLOCK", "MAX_PRODUCTS", "SCALE_TYPES", "backend", "dequantize_affine", "dequantize_levels",
           "fit_affine", "fit_blocks", "fit_levels", "force_instruction_set", "multiply_int8",
           "native_available", "pack_bits", "pack_fields", "refine_columns", "refine_levels",
           "round_affine", "round_levels", "solve_columns", "solve_levels", "unpack_bits", "unpack_fields"]
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
    A group of zeros, or with a value that is not finite, gets scale 1 and zero point 2^(bits-1) (symmetric) or 0.
    """
    checks.require(scale_dtype in SCALE_TYPES[:3], f"scale_dtype {scale_dtype}")
    arguments = (_float("weight", weight), _float("importance", importance), group_size, bits, symmetric,
                 SCALE_TYPES.index(scale_dtype), shrink_steps, shrink_min, signed, rounds)
    checks.fit_affine(*arguments)
    weight, power = extremes.in_range(arguments[0], group_size, scale_dtype)
    scale, zero_point = _ops.fit_affine(weight, extremes.weighing(arguments[1]), *arguments[2:])
    return extremes.back(scale, power, scale_dtype), zero_point


def round_affine(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_size: int,
                 bits: int) -> torch.Tensor:
    """Codes uint8 [N, K]: clamp(round(w / s) + z, 0, 2^bits - 1), half to even; code 0 for a NaN.

    weight [N, K], scale [N, G], zero_point uint8 [N, G].
    """
    arguments = (_float("weight", weight), _float("scale", scale), zero_point.contiguous(), group_size, bits)
    checks.round_affine(*arguments)
    return _ops.round_affine(*arguments)


def dequantize_affine(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor,
                      group_size: int) -> torch.Tensor:
    """float32 [N, K]: (code - zero point) * scale. codes uint8 [N, K], scale [N, G], zero_point uint8 [N, G]."""
    arguments = (codes.contiguous(), _float("scale", scale), zero_point.contiguous(), group_size)
    checks.dequantize_affine(*arguments)
    return _ops.dequantize_affine(*arguments)


def solve_columns(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor,
                  zero_point: torch.Tensor, group_index: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ within B <= 256 columns, left to right: codes uint8 [N, B] and D = weight - value, float32 [N, B].

    t_j = weight_j + shift_j + Σ_{i<j} D_i factor_ij; code_j is nearest to t_j. weight, shift [N, B]; factor [B, B]
    (only what lies above the diagonal is read); scale, zero_point [N, G]; group_index int32 [B]: each column's group.
    """
    arguments = (_float("weight", weight), _float("shift", shift), _float("factor", factor), _float("scale", scale),
                 zero_point.contiguous(), group_index.contiguous(), bits)
    checks.solve_columns(*arguments)
    checks.group_values(group_index, scale)
    return _ops.solve_columns(*arguments)


def refine_columns(gradient: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor,
                   zero_point: torch.Tensor, group_index: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One coordinate-descent sweep over B <= 256 columns: new codes uint8 [N, B] and change of value float32 [N, B].

    gradient: (D H) [N, B] for D = target - value; hessian [B, B]; the rest as in solve_columns. A code moves to the
    grid value nearest to value_j + gradient_j / H_jj if that lowers the loss; ties keep it, and so does H_jj <= 0.
    """
    arguments = (_float("gradient", gradient), _float("hessian", hessian), codes.contiguous(), _float("scale", scale),
                 zero_point.contiguous(), group_index.contiguous(), bits)
    checks.refine_columns(*arguments)
    checks.group_values(group_index, scale)
    return _ops.refine_columns(*arguments)


def fit_levels(weight: torch.Tensor, importance: torch.Tensor, group_size: int, levels: torch.Tensor,
               edges: torch.Tensor, scale_dtype: torch.dtype, shrink_steps: int = 24, shrink_min: float = 0.4,
               rounds: int = 2) -> torch.Tensor:
    """Scales of weight [N, K] by least error weighted by importance [K], on a grid of levels: float32 [N, G].

    levels: float32 [L], ascending.  edges: float32 [L - 1]: a quotient above edge i is nearer to level i + 1.
    As fit_affine: ranges from the whole (the largest weight at the largest level) down to shrink_min of it, then closed
    forms s = Σ h w v / Σ h v². A group of zeros gets scale 1. float8_e8m0fnu scales are powers of two.
    """
    checks.require(scale_dtype in SCALE_TYPES, f"scale_dtype {scale_dtype}")
    arguments = (_float("weight", weight), _float("importance", importance), _float("levels", levels),
                 _float("edges", edges), group_size, SCALE_TYPES.index(scale_dtype), shrink_steps, shrink_min,
                 float(levels.abs().max()), rounds)
    checks.fit_levels(*arguments)
    weight, power = extremes.in_range(arguments[0], group_size, scale_dtype)
    return extremes.back(_ops.fit_levels(weight, extremes.weighing(arguments[1]), *arguments[2:]), power, scale_dtype)


def round_levels(weight: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor, edges: torch.Tensor,
                 group_size: int) -> torch.Tensor:
    """Codes uint8 [N, K], the index of the level nearest to w / s; code 0 for a NaN. weight [N, K], scale [N, G]."""
    arguments = (_float("weight", weight), _float("scale", scale), _float("levels", levels), _float("edges", edges),
                 group_size)
    checks.round_levels(*arguments)
    return _ops.round_levels(*arguments)


def dequantize_levels(codes: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor, group_size: int) -> torch.Tensor:
    """float32 [N, K]: level[code] * scale. codes uint8 [N, K], scale [N, G]."""
    arguments = (codes.contiguous(), _float("scale", scale), _float("levels", levels), group_size)
    checks.dequantize_levels(*arguments)
    checks.code_values(codes, levels)
    return _ops.dequantize_levels(*arguments)


def solve_levels(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor,
                 levels: torch.Tensor, edges: torch.Tensor,
                 group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """solve_columns on a grid of levels (fit_levels): value = scale * level."""
    arguments = (_float("weight", weight), _float("shift", shift), _float("factor", factor), _float("scale", scale),
                 _float("levels", levels), _float("edges", edges), group_index.contiguous())
    checks.solve_levels(*arguments)
    checks.group_values(group_index, scale)
    return _ops.solve_levels(*arguments)


def refine_levels(gradient: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor,
                  levels: torch.Tensor, edges: torch.Tensor,
                  group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """refine_columns on a grid of levels (fit_levels): value = scale * level."""
    arguments = (_float("gradient", gradient), _float("hessian", hessian), codes.contiguous(), _float("scale", scale),
                 _float("levels", levels), _float("edges", edges), group_index.contiguous())
    checks.refine_levels(*arguments)
    checks.group_values(group_index, scale)
    checks.code_values(codes, levels)
    return _ops.refine_levels(*arguments)


def fit_blocks(weight: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, edges: torch.Tensor, super_: int,
               sub: int, scale_range: tuple[int, int], mins: int, steps: int = 19, rounds: int = 2,
               energy: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scales of GGUF's blocks: value = d * scale * level - dmin * min, of least error weighted by importance [K].

    weight [N, K]. One d and dmin (float32 [N, K / super], values of float16) per `super` columns; per `sub` columns one
    scale and one min: uint8 [N, K / sub], the scale less scale_range[0], the min up to `mins` (0: there is none).
    A scale_range of one number, 1: the block has d alone (and dmin, if mins is 1, of any sign).
    steps: ranges tried in each sub-block.  rounds: of neighbours of the integers and closed forms for d and dmin.
    energy: not 0: weighted also by sqrt(energy * mean of w^2 in the block + w^2).
    """
    uniform = bool(torch.equal(levels, levels[0] + torch.arange(len(levels), device=levels.device)))
    arguments = (_float("weight", weight), _float("importance", importance), _float("levels", levels),
                 _float("edges", edges), super_, sub, *scale_range, mins, steps, rounds, energy, uniform)
    checks.fit_blocks(*arguments)
    checks.require(mins > 0 or float(levels[0]) < 0, "without a minimum the lowest level is negative")
    importance = extremes.levelled(extremes.weighing(arguments[1]), sub)
    return _ops.fit_blocks(arguments[0], importance, *arguments[2:])


def pack_fields(parts: torch.Tensor, fields: torch.Tensor, size: int) -> torch.Tensor:
    """Bit fields put together: parts uint8 [blocks, P] -> uint8 [blocks, size].

    fields: int32 [F, 5], each {part, lowest bit taken from it, bits, byte, where in the byte they begin}.
    """
    arguments = (parts.contiguous(), fields.contiguous(), size)
    checks.pack_fields(*arguments)
    checks.field_values(fields, parts.shape[1], size)
    return _ops.pack_fields(*arguments)


def unpack_fields(packed: torch.Tensor, fields: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of pack_fields: uint8 [blocks, width]."""
    arguments = (packed.contiguous(), fields.contiguous(), width)
    checks.unpack_fields(*arguments)
    checks.field_values(fields, width, packed.shape[1])
    return _ops.unpack_fields(*arguments)


def multiply_int8(left: torch.Tensor, right: torch.Tensor, left_scale: torch.Tensor,
                  right_scale: torch.Tensor) -> torch.Tensor:
    """float32 [T, N]: left times the transposed right, summed as int32 (exact), times the scales of both rows.

    left int8 [T, K], right int8 [N, K], left_scale [T], right_scale [N]; K below 2^17.
    """
    arguments = (left.contiguous(), right.contiguous(), _float("left_scale", left_scale),
                 _float("right_scale", right_scale))
    checks.multiply_int8(*arguments)
    return _ops.multiply_int8(*arguments)


def pack_bits(codes: torch.Tensor, bits: int, transposed: bool = False) -> torch.Tensor:
    """Dense little-endian bit stream: uint8 [N, K] -> int32 [N, ceil(K bits / 32)], unused bits zero.

    transposed packs along the first dimension: [K, N] -> int32 [ceil(K bits / 32), N], as GPTQ's qweight.
    Codes must be below 2^bits: larger ones would run into their neighbours.
    """
    arguments = (codes.contiguous(), bits, transposed)
    checks.pack_bits(*arguments)
    return _ops.pack_bits(*arguments)


def unpack_bits(words: torch.Tensor, bits: int, count: int, transposed: bool = False) -> torch.Tensor:
    """The inverse of pack_bits: uint8 [N, count], or [count, N] when transposed."""
    arguments = (words.contiguous(), bits, count, transposed)
    checks.unpack_bits(*arguments)
    return _ops.unpack_bits(*arguments)


def _float(name: str, tensor: torch.Tensor) -> torch.Tensor:
    checks.require(tensor.dtype.is_floating_point, f"{name} is {tensor.dtype}, not floating point")
    return tensor.to(torch.float32).contiguous()
