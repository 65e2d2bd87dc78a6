"""AWQ, from autoawq's WQLinear_GEMM (eight output columns a word, shuffled) and WQLinear_GEMV."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.independent.store import Reader, Store, each_column, expect, stream

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble in which column j of eight lies


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    version = str(quantization.get("version", "gemm")).lower()
    size = quantization.get("group_size", quantization.get("q_group_size", 128))
    decoders = {"gemm": _gemm, "gemv": _gemv}
    return {name: partial(decoders[version], store, name, size) if version in decoders
            else f"version {version} is not on the page" for name in store.stems("qweight")}


def _unshuffled(words: np.ndarray) -> np.ndarray:
    """uint8 [any, 8 W] of uint32 [any, W]."""
    columns = [words >> np.uint32(4 * place) & np.uint32(15) for place in PLACES]
    return np.stack(columns, -1).astype(np.uint8).reshape(len(words), -1)


def _gemm(store: Store, name: str, group_size: int) -> np.ndarray:
    words = store.words(f"{name}.qweight")
    columns, rows = len(words), 8 * words.shape[1]
    groups = 1 if group_size == -1 else columns // group_size
    zeros, scale = store.words(f"{name}.qzeros"), store.floats(f"{name}.scales")
    expect(name, "qzeros", zeros.shape, (groups, rows // 8))
    expect(name, "scales", scale.shape, (groups, rows))
    codes = np.ascontiguousarray(_unshuffled(words).T, np.float32)
    codes -= each_column(name, _unshuffled(zeros).T.astype(np.float32), columns)
    codes *= each_column(name, scale.T, columns)
    return codes


def _gemv(store: Store, name: str, group_size: int) -> np.ndarray:
    words, zeros = store.words(f"{name}.qweight"), store.words(f"{name}.qzeros")
    rows, columns = len(words), 8 * words.shape[1]
    groups = 1 if group_size == -1 else columns // group_size
    scale = store.floats(f"{name}.scales")[:, :groups]
    expect(name, "scales", scale.shape, (rows, groups))
    codes = stream(words, 4, columns).astype(np.float32)
    codes -= each_column(name, stream(zeros, 4, groups).astype(np.float32), columns)
    codes *= each_column(name, scale, columns)
    return codes
