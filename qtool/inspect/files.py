"""What the files of a checkpoint say without any weight: the manifest, the format, bytes of each linear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qtool import footprint, manifest
from qtool.decode import Source

SCHEMA = 1
Step = Callable[[int, int, str], None]  # done, total, what is at hand


def no_steps(done: int, total: int, text: str) -> None:
    """For callers that show no progress."""


def record_of(source: Source) -> dict[str, Any] | None:
    """The manifest beside the weights; None where qtool did not write them. Raises CheckpointError for a bad one."""
    folder = folder_of(source)
    if not (folder / manifest.NAME).is_file():
        return None
    record = manifest.load(folder)
    return record if source.kind != "gguf" or Path(source.origin).name in record.get("outputs", {}) else None


def folder_of(source: Source) -> Path:
    """Where the files lie; the config and tokenizer of a GGUF file are elsewhere."""
    return Path(source.origin).parent if source.kind == "gguf" else source.directory


def stored_name(source: Source) -> str | None:
    """The format of the files: compressed-tensors, gguf with its block types, ...; None for plain weights."""
    if source.kind == "gguf":
        sizes = footprint.gguf_bytes(source)
        return "gguf " + ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))
    return source.format.NAME if source.format else None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bits_per_weight(source: Source) -> float:
    """Bits of a quantized weight, its share of scales and zero points included; without any, of a parameter."""
    sizes = linear_bytes(source)
    if sizes:
        weights = sum(spec.elements for name, spec in source.specs.items() if name.removesuffix(".weight") in sizes)
        return round(8 * sum(sizes.values()) / max(weights, 1), 4)
    parameters = sum(spec.elements for spec in source.specs.values())
    return round(8 * footprint.stored_bytes(source) / max(parameters, 1), 4)


def linear_bytes(source: Source) -> dict[str, int]:
    """Bytes of every quantized linear, its scales and zero points included."""
    if source.checkpoint.block_types:
        return {name.removesuffix(".weight"): size for name, (_, size) in source.checkpoint.block_types.items()}
    suffixes = source.format.SUFFIXES if source.format else ()
    return {linear: sum(source.checkpoint.specs[name].nbytes for suffix in suffixes
                        if (name := f"{linear}.{suffix}") in source.checkpoint.specs) for linear in source.schemes}


def rotation_of(record: dict[str, Any] | None) -> dict[str, list[str]]:
    """What a manifest says of rotated tensors; empty lists where none were."""
    return (record or {}).get("rotation") or {"tensors": [], "untied": []}
