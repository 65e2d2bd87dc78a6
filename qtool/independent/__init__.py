"""Reads what lies in quantized checkpoints a second time, with code that has nothing in common with the first.

Written in numpy from the pages that describe the formats (docs/formats.md and the sources that it names), not from
qtool/formats, qtool/grids or qtool/ops, none of which is imported: a mistake that packing and unpacking share shows.
It is slower and reads only what the pages describe; for the rest it says so. One linear is held at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qtool.independent import aqlm, awq, bitsandbytes, compressed_tensors, fp8, gptq, mlx, modelopt
from qtool.independent.store import Reader, Store

__all__ = ["linears", "values_sha256"]
FORMATS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes, "fp8": fp8,
    "mlx": mlx, "modelopt": modelopt, "aqlm": aqlm,
}


def linears(folder: Path, quantization: Mapping[str, Any], format_: str) -> dict[str, Reader]:
    """Every quantized linear of a safetensors directory: what gives its weight, float32 [N, K], or why nothing does.

    quantization: the quantization_config.  A reader raises CheckpointError where its tensors contradict each other.
    """
    found: dict[str, Reader] = FORMATS[format_].linears(quantization, Store(folder))
    return found


def values_sha256(weight: np.ndarray) -> str:
    """sha256 of a weight [N, K] as float32, row by row, little end first, with -0 as 0 (docs/json.md)."""
    digest = hashlib.sha256()
    for row in range(0, len(weight), 64):
        digest.update(np.ascontiguousarray(weight[row:row + 64] + np.float32(0), "<f4").data)
    return digest.hexdigest()
