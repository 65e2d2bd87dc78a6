"""The ops' schemas, their shape functions, and the kernels that were compiled for them.

Each op has one schema, a pure-torch default that runs everywhere (reference.py), and, where compiled, a CPU and a CUDA
kernel that PyTorch's dispatcher chooses by the device of the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qtool.ops import (
    checks,
    checks_codebooks,
    checks_int4,
    checks_packed,
    reference,
    reference_blocks,
    reference_codebooks,
    reference_int4,
    reference_levels,
    reference_packed,
)

SCHEMAS = {
    "fit_affine": "(Tensor weight, Tensor importance, int group, int bits, bool symmetric, int scale_type, int steps, "
                  "float shrink_min, bool signed_scale, int rounds) -> (Tensor, Tensor)",
    "round_affine": "(Tensor weight, Tensor scale, Tensor zero, int group, int bits) -> Tensor",
    "dequantize_affine": "(Tensor codes, Tensor scale, Tensor zero, int group) -> Tensor",
    "solve_columns": "(Tensor weight, Tensor shift, Tensor factor, Tensor scale, Tensor zero, Tensor group_index, "
                     "int bits) -> (Tensor, Tensor)",
    "refine_columns": "(Tensor gradient, Tensor hessian, Tensor old_codes, Tensor scale, Tensor zero, "
                      "Tensor group_index, int bits) -> (Tensor, Tensor)",
    "fit_levels": "(Tensor weight, Tensor importance, Tensor levels, Tensor edges, int group, int scale_type, "
                  "int steps, float shrink_min, float top, int rounds) -> Tensor",
    "round_levels": "(Tensor weight, Tensor scale, Tensor levels, Tensor edges, int group) -> Tensor",
    "dequantize_levels": "(Tensor codes, Tensor scale, Tensor levels, int group) -> Tensor",
    "solve_levels": "(Tensor weight, Tensor shift, Tensor factor, Tensor scale, Tensor levels, Tensor edges, "
                    "Tensor group_index) -> (Tensor, Tensor)",
    "refine_levels": "(Tensor gradient, Tensor hessian, Tensor old_codes, Tensor scale, Tensor levels, Tensor edges, "
                     "Tensor group_index) -> (Tensor, Tensor)",
    "fit_blocks": "(Tensor weight, Tensor importance, Tensor levels, Tensor edges, int super, int sub, int scale_low, "
                  "int scale_high, int mins, int steps, int rounds, float energy, bool uniform) "
                  "-> (Tensor, Tensor, Tensor, Tensor)",
    "pack_fields": "(Tensor parts, Tensor fields, int size) -> Tensor",
    "unpack_fields": "(Tensor packed, Tensor fields, int width) -> Tensor",
    "multiply_int8": "(Tensor left, Tensor right, Tensor left_scale, Tensor right_scale) -> Tensor",
    "multiply_packed": "(Tensor x, Tensor words, Tensor scale, Tensor offset, Tensor levels, int kind, int outputs, "
                       "int group, bool rounded) -> Tensor",
    "unpack_packed": "(Tensor words, Tensor scale, Tensor offset, Tensor levels, int kind, int columns, int group, "
                     "int begin, int end) -> Tensor",
    "decode_block": "(Tensor hidden, Tensor[] weights, int[] layout, Tensor cos, Tensor sin, Tensor(a!) keys, "
                    "Tensor(b!) values, int position, int window, float epsilon, float scaling, "
                    "bool rounded) -> Tensor",
    "refine_codebooks": "(Tensor gradient, Tensor hessian, Tensor old_codes, Tensor scale, Tensor codebooks, "
                        "Tensor roots, int beam) -> (Tensor, Tensor)",
    "dequantize_codebooks": "(Tensor codes, Tensor codebooks, Tensor scale) -> Tensor",
    "sum_codewords": "(Tensor values, Tensor codes, int words) -> Tensor",
    "repack_int4": "(Tensor words, int rows, int columns, int source, int target) -> Tensor",
    "compare_int4": "(Tensor one, Tensor other, int rows, int columns, int layout, int other_layout) -> Tensor",
    "pack_bits": "(Tensor codes, int bits, bool transposed) -> Tensor",
    "unpack_bits": "(Tensor words, int bits, int count, bool transposed) -> Tensor",
}


# The shapes of the results, for tracing without data
def _fit(weight, importance, group, *_):  # type: ignore[no-untyped-def]
    shape = (weight.shape[0], weight.shape[1] // group)
    return weight.new_empty(shape), weight.new_empty(shape, dtype=torch.uint8)


def _fit_levels(weight, importance, levels, edges, group, *_):  # type: ignore[no-untyped-def]
    return weight.new_empty((weight.shape[0], weight.shape[1] // group))


def _fit_blocks(weight, importance, levels, edges, super_, sub, *_):  # type: ignore[no-untyped-def]
    rows, columns = weight.shape
    d, parts = weight.new_empty((rows, columns // super_)), weight.new_empty((rows, columns // sub), dtype=torch.uint8)
    return d, parts, torch.empty_like(d), torch.empty_like(parts)


def _fields(source, fields, size):  # type: ignore[no-untyped-def]
    return source.new_empty((source.shape[0], size))


def _codes(weight, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight, dtype=torch.uint8)


def _values(codes, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(codes, dtype=torch.float32)


def _pair(weight, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)


def _product(left, right, *_):  # type: ignore[no-untyped-def]
    return left.new_empty((left.shape[0], right.shape[0]), dtype=torch.float32)


def _multiply_packed(x, words, scale, offset, levels, kind, outputs, *_):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], outputs))


def _unpack_packed(words, scale, offset, levels, kind, columns, group, begin, end):  # type: ignore[no-untyped-def]
    return words.new_empty((columns, (end - begin) * checks_packed.TILE), dtype=torch.float32)


def _hidden(hidden, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden)


def _refine_codebooks(gradient, hessian, old_codes, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(old_codes), torch.empty_like(gradient)


def _dequantize_codebooks(codes, codebooks, scale):  # type: ignore[no-untyped-def]
    return scale.new_empty((codes.shape[0], codes.shape[1] * checks_codebooks.VECTOR))


def _sum_codewords(values, codes, words):  # type: ignore[no-untyped-def]
    return values.new_empty((codes.shape[2], words, checks_codebooks.VECTOR))


def _repack_int4(words, rows, columns, source, target):  # type: ignore[no-untyped-def]
    return words.new_empty(checks_int4.shape_of(rows, columns, target))


def _compare_int4(one, other, rows, columns, *_):  # type: ignore[no-untyped-def]
    return one.new_empty((columns // checks_int4.PER_WORD,), dtype=torch.uint8)


def _pack(codes, bits, transposed):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    shape = (checks.words(rows, bits), columns) if transposed else (rows, checks.words(columns, bits))
    return codes.new_empty(shape, dtype=torch.int32)


def _unpack(packed, bits, count, transposed):  # type: ignore[no-untyped-def]
    shape = (count, packed.shape[1]) if transposed else (packed.shape[0], count)
    return packed.new_empty(shape, dtype=torch.uint8)


SHAPES: dict[str, Callable[..., Any]] = {
    "fit_affine": _fit, "round_affine": _codes, "dequantize_affine": _values, "solve_columns": _pair,
    "refine_columns": _pair, "fit_levels": _fit_levels, "round_levels": _codes, "dequantize_levels": _values,
    "solve_levels": _pair, "refine_levels": _pair, "fit_blocks": _fit_blocks, "pack_fields": _fields,
    "unpack_fields": _fields, "multiply_int8": _product, "multiply_packed": _multiply_packed,
    "unpack_packed": _unpack_packed, "decode_block": _hidden, "pack_bits": _pack, "unpack_bits": _unpack,
    "refine_codebooks": _refine_codebooks, "dequantize_codebooks": _dequantize_codebooks,
    "sum_codewords": _sum_codewords, "repack_int4": _repack_int4, "compare_int4": _compare_int4,
}


def _fake(name: str) -> Callable[..., Any]:
    """The op on tensors without data: the same check as before a real call, then the shapes."""
    modules = (checks_packed, checks_codebooks, checks_int4, checks)
    check = next(getattr(module, name) for module in modules if hasattr(module, name))
    shapes = SHAPES[name]

    def fake(*arguments: Any) -> Any:
        check(*arguments)
        return shapes(*arguments)

    return fake


LIBRARY = torch.library.Library("qtool", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _modules = (reference_levels, reference_blocks, reference_packed, reference_codebooks, reference_int4, reference)
    _default = next(getattr(module, _name) for module in _modules if hasattr(module, _name))
    LIBRARY.impl(_name, _default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtool::{_name}", _fake(_name), lib=LIBRARY)


def _load() -> ctypes.CDLL | None:
    """The compiled kernels beside this package, or None where they were not built or need another PyTorch."""
    for path in sorted(Path(__file__).parent.parent.glob("_native*.so")):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            return None
        native = ctypes.CDLL(str(path))
        native.qtool_instruction_set.restype = ctypes.c_char_p
        native.qtool_force_instruction_set.argtypes = [ctypes.c_char_p]
        return native
    return None


NATIVE = _load()
