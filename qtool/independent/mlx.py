"""MLX's affine mode, from mlx's dequantize: scale times code plus bias."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.errors import CheckpointError
from qtool.independent.store import Reader, Store, each_column, expect, stream


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    return {name: _reader(quantization, store, name) for name in store.stems("scales")}


def _reader(quantization: Mapping[str, Any], store: Store, name: str) -> Reader:
    own = quantization.get(name)
    if own is False:
        raise CheckpointError(f"{name} is stored quantized, but config.json says that it is not")
    said = {**quantization, **(own if isinstance(own, Mapping) else {})}
    if said.get("mode", "affine") != "affine":
        return f"mode {said['mode']} is not on the page"
    return partial(_decoded, store, name, said["bits"], said["group_size"])


def _decoded(store: Store, name: str, bits: int, group_size: int) -> np.ndarray:
    words, scale, bias = (store.words(f"{name}.weight"), store.floats(f"{name}.scales"), store.floats(f"{name}.biases"))
    rows, columns = len(words), words.shape[1] * 32 // bits
    for what, found in (("scales", scale), ("biases", bias)):
        expect(name, what, found.shape, (rows, columns // group_size))
    values = stream(words, bits, columns).astype(np.float32)
    values *= each_column(name, scale, columns)
    values += each_column(name, bias, columns)
    return values
