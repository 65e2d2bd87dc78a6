"""NVIDIA ModelOpt's unified checkpoints, from its qtensor classes: FP8 with one scale a matrix, NVFP4 with two."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from qtool.independent.store import E2M1, Reader, Store, expect, nibbles


def linears(quantization: Mapping[str, Any], store: Store) -> dict[str, Reader]:
    return {name: partial(_nvfp4 if f"{name}.weight_scale_2" in store else _fp8, store, name)
            for name in store.stems("weight_scale")}


def _fp8(store: Store, name: str) -> np.ndarray:
    scale = store.numbers(f"{name}.weight_scale", "F32")
    expect(name, "weight_scale", scale.shape, (), (1,))
    return store.floats(f"{name}.weight") * scale.reshape(())


def _nvfp4(store: Store, name: str) -> np.ndarray:
    codes = nibbles(store.numbers(f"{name}.weight", "U8"))
    scale = store.floats(f"{name}.weight_scale") * store.numbers(f"{name}.weight_scale_2", "F32").reshape(())
    expect(name, "weight_scale", scale.shape, (len(codes), codes.shape[1] // 16))
    return E2M1[codes] * np.repeat(scale, 16, 1)
