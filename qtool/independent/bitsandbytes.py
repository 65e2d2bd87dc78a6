"""bitsandbytes, from its QuantState (NF4, FP4: blocks of the flattened matrix) and Int8Params (one scale a row)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.errors import CheckpointError
from qtool.independent.store import Reader, Store, expect, nibbles

STATE = "weight.quant_state.bitsandbytes__"


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    if quantization.get("load_in_8bit"):
        return {name: partial(_int8, store, name) for name in store.stems("SCB")}
    states = [name for name in store.places if f".{STATE}" in name]
    return {name.partition(f".{STATE}")[0]: partial(_four_bits, store, name, quantization) for name in states}


def _four_bits(store: Store, state_name: str, quantization: Mapping[str, Any]) -> np.ndarray:
    name, _, kind = state_name.partition(f".{STATE}")
    state = json.loads(store.bytes(state_name).tobytes())
    if state["quant_type"] != kind or quantization.get("bnb_4bit_quant_type", kind) != kind:
        raise CheckpointError(f"{name}: its tensors say {kind}, its quant_state {state['quant_type']} and config.json "
                              f"{quantization.get('bnb_4bit_quant_type')}")
    rows, columns = state["shape"]
    count, size = rows * columns, state["blocksize"]
    codes = nibbles(store.bytes(f"{name}.weight")[None], high_first=True)[0, :count]
    expect(name, "weight", codes.shape, (count,))
    absmax = _absmax(store, name, state)
    expect(name, "weight.absmax", absmax.shape, (-(-count // size),))
    values = store.numbers(f"{name}.weight.quant_map", "F32")[codes]
    values *= np.repeat(absmax, size)[:count]
    return values.reshape(rows, columns)


def _absmax(store: Store, name: str, state: Mapping[str, Any]) -> np.ndarray:
    """float32, one a block; of double quantization from codes of a table, in runs with a scale, less their mean."""
    where = f"{name}.weight.absmax"
    if "nested_offset" not in state:
        return store.numbers(where, "F32")
    codes, table = store.numbers(where, "U8"), store.numbers(f"{name}.weight.nested_quant_map", "F32")
    runs = np.repeat(store.numbers(f"{name}.weight.nested_absmax", "F32"), state["nested_blocksize"])[:len(codes)]
    expect(name, "weight.nested_absmax", runs.shape, codes.shape)
    made: np.ndarray = table[codes] * runs + np.float32(state["nested_offset"])
    return made


def _int8(store: Store, name: str) -> np.ndarray:
    codes, absmax = store.numbers(f"{name}.weight", "I8"), store.numbers(f"{name}.SCB", "F32")
    expect(name, "SCB", absmax.shape, (len(codes),))
    return codes.astype(np.float32) * (absmax / np.float32(127))[:, None]
