"""GPTQ, from GPTQModel's torch kernels: everything lies transposed, and version 1 stores zero points less one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.errors import CheckpointError
from qtool.independent.store import Reader, Store, each_column, expect, stream


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    form = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()
    found: dict[str, Reader] = {}
    for name in store.stems("qweight"):
        said: dict[str, Any] | None = dict(quantization)
        for pattern, change in (quantization.get("dynamic") or {}).items():
            if re.match(re.sub(r"^[+-]:", "", pattern), name):
                said = None if pattern.startswith("-:") else {**quantization, **change}
                break
        if said is None:
            raise CheckpointError(f"{name} is stored quantized, but 'dynamic' in config.json leaves it out")
        known = form in ("gptq", "gptq_v2") and said["bits"] in (2, 3, 4, 8)
        found[name] = (partial(_decoded, store, name, said["bits"], said["group_size"], form == "gptq") if known
                       else f"{form} with {said['bits']} bits is not on the page")
    return found


def _decoded(store: Store, name: str, bits: int, group_size: int, less_one: bool) -> np.ndarray:
    words = store.words(f"{name}.qweight")
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    groups = 1 if group_size == -1 else -(-columns // group_size)
    scale, packed = store.floats(f"{name}.scales"), store.words(f"{name}.qzeros")
    expect(name, "scales", scale.shape, (groups, rows))
    expect(name, "qzeros", packed.shape, (groups, -(-rows * bits // 32)))
    zeros = stream(packed, bits, rows)
    if less_one:
        zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
    codes = stream(words.T, bits, columns).astype(np.float32)
    order = store.words(f"{name}.g_idx").view("<i4") if f"{name}.g_idx" in store else None
    codes -= each_column(name, zeros.T.astype(np.float32), columns, order)
    codes *= each_column(name, scale.T, columns, order)
    return codes
