"""MLX's affine mode, from mlx's dequantize: scale times code plus bias."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.errors import CheckpointError
from qtool.independent.store import Reader, Store, each_column, expect, stream

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # what its checkpoints call them


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    found: dict[str, Reader] = {}
    for name in store.stems("scales"):
        block, _, kind = name.partition(".switch_mlp.")
        experts = store.shape(f"{name}.scales")
        if kind not in MIXTRAL or len(experts) != 3 or 0 in experts:
            found[name] = _reader(quantization, store, name, None)
            continue
        own = MIXTRAL[kind] if block.endswith("block_sparse_moe") else kind
        found |= {f"{block}.experts.{number}.{own}": _reader(quantization, store, name, number)
                  for number in range(experts[0])}
    return found


def _reader(quantization: Mapping[str, Any], store: Store, name: str, expert: int | None) -> Reader:
    own = quantization.get(name)
    if own is False:
        raise CheckpointError(f"{name} is stored quantized, but config.json says that it is not")
    said = {**quantization, **(own if isinstance(own, Mapping) else {})}
    if said.get("mode", "affine") != "affine":
        return f"mode {said['mode']} is not on the page"
    return partial(_decoded, store, name, said["bits"], said["group_size"], expert)


def _decoded(store: Store, name: str, bits: int, group_size: int, expert: int | None) -> np.ndarray:
    words, scale, bias = (store.words(f"{name}.weight", expert), store.floats(f"{name}.scales", expert),
                          store.floats(f"{name}.biases", expert))
    rows, columns = len(words), words.shape[1] * 32 // bits
    for what, found in (("scales", scale), ("biases", bias)):
        expect(name, what, found.shape, (rows, columns // group_size))
    values = stream(words, bits, columns).astype(np.float32)
    values *= each_column(name, scale, columns)
    values += each_column(name, bias, columns)
    return values
