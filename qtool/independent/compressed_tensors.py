"""compressed-tensors, from its QuantizationArgs and compressors (0.20; 3 bits and zero points as in 0.17, too)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.errors import CheckpointError
from qtool.independent.store import E2M1, Reader, Store, blocks_of_128, each_column, expect, loose, nibbles, stream


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    groups, ignored = list((quantization.get("config_groups") or {}).values()), quantization.get("ignore") or []
    return {name: _reader(store, name, quantization, groups, ignored) for name in store.stems("weight_scale")}


def _reader(store: Store, name: str, quantization: Mapping[str, Any], groups: list[Mapping[str, Any]],
            ignored: list[str]) -> Reader:
    group = next((one for kind in (_exactly, _by_pattern, _by_class) for one in groups
                  if any(kind(target, name) for target in one.get("targets") or [])), None)
    if group is None:
        raise CheckpointError(f"{name} is stored quantized, but is a target of no config group in config.json")
    if any(_exactly(entry, name) or _by_pattern(entry, name) for entry in ignored):
        raise CheckpointError(f"{name} is stored quantized, but config.json says to ignore it")
    form, weights = group.get("format") or quantization.get("format"), group["weights"]
    kinds = {"pack-quantized": _packed, "int-quantized": _bytes, "float-quantized": _floats,
             "nvfp4-pack-quantized": _nvfp4, "mxfp4-pack-quantized": _mxfp4,
             "naive-quantized": _bytes if weights.get("type", "int") == "int" else _floats}
    return partial(kinds[form], store, name, weights) if form in kinds else f"format {form} is not on the page"


def _exactly(target: str, name: str) -> bool:
    return target == name


def _by_pattern(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], name) is not None


def _by_class(target: str, name: str) -> bool:
    return target == "Linear"


def _scales(store: Store, name: str, rows: int, groups: int) -> np.ndarray:
    scale = store.floats(f"{name}.weight_scale")
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), (rows, groups))
    expect(name, "weight_scale", scale.shape, (rows, groups))
    return scale


def _group_count(weights: Mapping[str, Any], columns: int) -> int:
    return -(-columns // weights["group_size"]) if weights.get("strategy") == "group" else 1


def _packed(store: Store, name: str, weights: Mapping[str, Any]) -> np.ndarray:
    bits = weights["num_bits"]
    rows, columns = (int(size) for size in store.numbers(f"{name}.weight_shape", "I64", "I32"))
    words, groups = store.words(f"{name}.weight_packed"), _group_count(weights, columns)
    dense, apart = (rows, -(-columns * bits // 32)), (rows, -(-columns // (32 // bits)))
    expect(name, "weight_packed", words.shape, dense, apart)
    codes = stream(words, bits, columns) if words.shape == dense else loose(words, bits, columns)
    centred = codes.astype(np.float32) - np.float32(1 << (bits - 1))
    order = store.words(f"{name}.weight_g_idx").view("<i4") if f"{name}.weight_g_idx" in store else None
    order = None if order is None or (order == -1).any() else order
    if not weights.get("symmetric", True):
        centred -= each_column(name, _zero_points(store, name, bits, rows, groups), columns, order)
    centred *= each_column(name, _scales(store, name, rows, groups), columns, order)
    return centred


def _zero_points(store: Store, name: str, bits: int, rows: int, groups: int) -> np.ndarray:
    """float32 [N, G], signed; packed along N."""
    where = f"{name}.weight_zero_point"
    if where in store and store.dtype(where) == "I8":
        signed = store.numbers(where, "I8").astype(np.float32)
        return np.broadcast_to(signed.reshape(1, 1), (rows, groups)) if signed.size == 1 else signed
    words = store.words(where)
    dense, apart = (-(-rows * bits // 32), groups), (-(-rows // (32 // bits)), groups)
    expect(name, "weight_zero_point", words.shape, dense, apart)
    unpacked = stream if words.shape == dense else loose
    return unpacked(words.T, bits, rows).T.astype(np.float32) - np.float32(1 << (bits - 1))


def _bytes(store: Store, name: str, weights: Mapping[str, Any]) -> np.ndarray:
    codes = store.numbers(f"{name}.weight", "I8").astype(np.float32)
    rows, columns = codes.shape
    groups = _group_count(weights, columns)
    if not weights.get("symmetric", True):
        zeros = store.numbers(f"{name}.weight_zero_point", "I8").astype(np.float32)
        zeros = np.broadcast_to(zeros.reshape(1, 1), (rows, groups)) if zeros.size == 1 else zeros
        codes -= each_column(name, zeros, columns)
    codes *= each_column(name, _scales(store, name, rows, groups), columns)
    return codes


def _floats(store: Store, name: str, weights: Mapping[str, Any]) -> np.ndarray:
    values = store.floats(f"{name}.weight")
    rows, columns = values.shape
    if weights.get("strategy") == "block":
        scale = store.floats(f"{name}.weight_scale")
        expect(name, "weight_scale", scale.shape, (-(-rows // 128), -(-columns // 128)))
        return values * blocks_of_128(scale, (rows, columns))
    return values * _scales(store, name, rows, 1)


def _nvfp4(store: Store, name: str, weights: Mapping[str, Any]) -> np.ndarray:
    """The scale of a group is divided by the matrix's first, as the library does; the order decides the last bit."""
    codes = nibbles(store.numbers(f"{name}.weight_packed", "U8"))
    scale = store.floats(f"{name}.weight_scale") / store.floats(f"{name}.weight_global_scale").reshape(())
    expect(name, "weight_scale", scale.shape, (len(codes), codes.shape[1] // 16))
    return E2M1[codes] * np.repeat(scale, 16, 1)


def _mxfp4(store: Store, name: str, weights: Mapping[str, Any]) -> np.ndarray:
    codes = nibbles(store.numbers(f"{name}.weight_packed", "U8"))
    exponents = store.numbers(f"{name}.weight_scale", "U8").astype(np.int32) - 127
    expect(name, "weight_scale", exponents.shape, (len(codes), codes.shape[1] // 32))
    return E2M1[codes] * np.repeat(np.ldexp(np.float32(1), exponents).astype(np.float32), 32, 1)
