"""The tensors of one quantized linear as the programs that load a format look for them.

Written from the loaders' own sources, not from what qtool packs, so that one can be held against the other:
compressed-tensors 0.17 and 0.20, vLLM 0.32, GPTQModel 7, optimum 2.3, bitsandbytes 0.50, transformers 5.23, mlx-lm,
aqlm 1.1.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

from qtool.recipe import Scheme

HALF = ("BF16", "F16")
FLOATS = (*HALF, "F32")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """<linear>.<suffix> in one of these dtypes (safetensors' names) and shapes (None in one: any length)."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    needed: bool = True


def keys(format_: str, scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    """What loaders of a format want of a linear [N, K]. there: the suffixes that it has, where that tells variants."""
    return FORMATS[format_](scheme, shape, there)


def groups(scheme: Scheme, columns: int) -> int:
    return 1 if scheme.group_size == -1 else math.ceil(columns / int(scheme.group_size))


def _words(count: int, bits: int) -> tuple[int, ...]:
    """int32 words of `count` codes: a dense stream, or (older compressed-tensors) whole codes in each word."""
    return tuple(dict.fromkeys((math.ceil(count * bits / 32), math.ceil(count / (32 // bits)))))


def _scales(scheme: Scheme, shape: tuple[int, int]) -> tuple[Shape, ...]:
    """One for the tensor, for each block of 128 x 128, or for each group of a row."""
    rows, columns = shape
    if scheme.strategy == "block":
        return ((math.ceil(rows / 128), math.ceil(columns / 128)),)
    return ((1,), (), (1, 1)) if scheme.strategy == "tensor" else ((rows, groups(scheme, columns)),)


def _compressed_tensors(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    rows, columns = shape
    static = [Key("input_scale", FLOATS, ((1,), ()))] if scheme.activations == "tensor" else []
    if scheme.grid == "fp8":
        return [Key("weight", ("F8_E4M3",), (shape,)), Key("weight_scale", FLOATS, _scales(scheme, shape)), *static]
    if scheme.grid in ("nvfp4", "mxfp4"):
        nv = scheme.grid == "nvfp4"
        return [Key("weight_packed", ("U8",), ((rows, columns // 2),)),
                Key("weight_scale", ("F8_E4M3",) if nv else ("U8",), ((rows, columns // (16 if nv else 32)),)),
                *([Key("weight_global_scale", ("F32",), ((1,),)),
                   Key("input_global_scale", ("F32",), ((1,),), needed=False)] if nv else [])]
    count = groups(scheme, columns)
    if "weight" in there:
        return [Key("weight", ("I8",), (shape,)), Key("weight_scale", FLOATS, ((rows, count), (1,))),
                Key("weight_zero_point", ("I8",), ((rows, count), (1,)), needed=not scheme.symmetric), *static]
    zeros = tuple((words, count) for words in _words(rows, scheme.bits))
    return [Key("weight_packed", ("I32",), tuple((rows, words) for words in _words(columns, scheme.bits))),
            Key("weight_scale", FLOATS, ((rows, count), (1,))), Key("weight_shape", ("I64", "I32"), ((2,),)),
            Key("weight_zero_point", ("I32",), zeros, needed=not scheme.symmetric),
            Key("weight_g_idx", ("I32",), ((columns,),), needed=False), *static]


def _gptq(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    (rows, columns), bits = shape, scheme.bits
    count = groups(scheme, columns)
    return [Key("qweight", ("I32",), ((math.ceil(columns * bits / 32), rows),)),
            Key("qzeros", ("I32",), ((count, math.ceil(rows * bits / 32)),)),
            Key("scales", FLOATS, ((count, rows),)), Key("g_idx", ("I32",), ((columns,),))]


def _awq(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    (rows, columns), count = shape, groups(scheme, shape[1])
    return [Key("qweight", ("I32",), ((columns, rows // 8),)), Key("qzeros", ("I32",), ((count, rows // 8),)),
            Key("scales", HALF, ((count, rows),))]


def _bitsandbytes(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    if "SCB" in there:
        return [Key("weight", ("I8",), (shape,)), Key("SCB", ("F32",), ((shape[0],),)),
                Key("weight_format", ("U8", "I64"), ((),), needed=False)]
    count = shape[0] * shape[1]
    blocks, nested = math.ceil(count / int(scheme.group_size)), scheme.double_quant
    return [Key("weight", ("U8",), ((math.ceil(count / 2), 1),)),
            Key("weight.absmax", ("U8",) if nested else ("F32",), ((blocks,),)),
            Key("weight.quant_map", ("F32",), ((16,),)),
            Key("weight.nested_absmax", ("F32",), ((math.ceil(blocks / 256),),), needed=nested),
            Key("weight.nested_quant_map", ("F32",), ((256,),), needed=nested),
            Key(f"weight.quant_state.bitsandbytes__{scheme.grid}", ("U8",), ((None,),))]


def _fp8(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    scale = next((name for name in ("weight_scale_inv", "weight_scale") if name in there), "weight_scale_inv")
    return [Key("weight", ("F8_E4M3",), (shape,)), Key(scale, FLOATS, _scales(scheme, shape)),
            Key("input_scale", FLOATS, ((1,), ()), needed=False),
            Key("activation_scale", FLOATS, ((1,), ()), needed=False)]


def _mlx(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    (rows, columns), count = shape, groups(scheme, shape[1])
    return [Key("weight", ("U32",), ((rows, columns * scheme.bits // 32),)), Key("scales", FLOATS, ((rows, count),)),
            Key("biases", FLOATS, ((rows, count),))]


def _modelopt(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    rows, columns = shape
    one = ((), (1,))
    if scheme.grid == "fp8":
        return [Key("weight", ("F8_E4M3",), (shape,)), Key("weight_scale", ("F32",), one),
                Key("input_scale", ("F32",), one)]
    return [Key("weight", ("U8",), ((rows, columns // 2),)),
            Key("weight_scale", ("F8_E4M3",), ((rows, columns // 16),)),
            Key("weight_scale_2", ("F32",), one), Key("input_scale", ("F32",), one, needed=False)]


def _aqlm(scheme: Scheme, shape: tuple[int, int], there: Container[str]) -> list[Key]:
    """aqlm-MxB: M codebooks of B bits, each for 8 columns; lloyd4: pairs of columns."""
    said, _, bits = scheme.grid.removeprefix("aqlm-").partition("x")
    books, wide, width = (int(said), int(bits), 8) if bits else (1, 8, 2)
    return [Key("codes", ("I8",) if wide <= 8 else ("I16",), ((shape[0], shape[1] // width, books),)),
            Key("codebooks", FLOATS, ((books, 1 << wide, 1, width),)), Key("scales", FLOATS, ((shape[0], 1, 1, 1),))]


FORMATS: dict[str, Callable[[Scheme, tuple[int, int], Container[str]], list[Key]]] = {
    "compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes, "fp8": _fp8,
    "mlx": _mlx, "modelopt": _modelopt, "aqlm": _aqlm,
}
