"""quant_method "fp8", from transformers' finegrained_fp8 and vLLM's fp8: a scale multiplies, whatever it is called."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.independent.store import Reader, Store, blocks_of_128, expect


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    blocks = quantization.get("weight_block_size")
    if blocks not in (None, [128, 128]) or quantization.get("scale_fmt") not in (None, "float"):
        return dict.fromkeys(store.stems("weight_scale_inv"), f"blocks of {blocks} are not on the page")
    found: dict[str, Reader] = {}
    for suffix in ("weight_scale", "weight_scale_inv"):
        found |= {name: partial(_decoded, store, name, suffix, blocks is not None) for name in store.stems(suffix)}
    return found


def _decoded(store: Store, name: str, suffix: str, blocks: bool) -> np.ndarray:
    values, scale = store.floats(f"{name}.weight"), store.floats(f"{name}.{suffix}")
    rows, columns = values.shape
    if blocks:
        expect(name, suffix, scale.shape, (-(-rows // 128), -(-columns // 128)))
        return values * blocks_of_128(scale, (rows, columns))
    expect(name, suffix, scale.shape, (), (1,), (1, 1), (rows,), (rows, 1))
    return values * scale.reshape(-1, 1)
