"""AQLM, from aqlm's _dequantize_weight: a sum of codewords, one of each codebook, times the scale of the row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.independent.store import Reader, Store, expect


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    return {name: _reader(quantization, store, name) for name in store.stems("codes")}


def _reader(quantization: Mapping[str, Any], store: Store, name: str) -> Reader:
    if quantization.get("out_group_size", 1) != 1:
        return f"out_group_size {quantization['out_group_size']} is not on the page"
    return partial(_decoded, store, name, quantization.get("num_codebooks", 1),
                   1 << quantization.get("nbits_per_codebook", 16), quantization.get("in_group_size", 8))


def _decoded(store: Store, name: str, books: int, words: int, width: int) -> np.ndarray:
    codes, codebooks = store.numbers(f"{name}.codes", "I8", "I16"), store.floats(f"{name}.codebooks")
    scale = store.floats(f"{name}.scales")
    rows, groups = codes.shape[:2]
    expect(name, "codes", codes.shape, (rows, groups, books))
    expect(name, "codebooks", codebooks.shape, (books, words, 1, width))
    expect(name, "scales", scale.shape, (rows, 1, 1, 1))
    total = codebooks[0, codes[..., 0].astype(np.int64) % words, 0]
    for book in range(1, books):
        total = total + codebooks[book, codes[..., book].astype(np.int64) % words, 0]
    made: np.ndarray = total.reshape(rows, groups * width) * scale.reshape(rows, 1)
    return made
