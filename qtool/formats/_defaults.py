"""Answers of the formats that have nothing of their own to say; a format imports those that it needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qtool.formats._stored import Read
from qtool.recipe import Scheme
from qtool.tensors import TensorSpec


def check_together(schemes: Mapping[str, Scheme], others: Collection[str] = ()) -> str | None:
    """Why these linears cannot share a checkpoint: they always can."""
    return None


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    """What to know about who can load it: nothing."""
    return []


def fused_conflicts(schemes: Mapping[str, Scheme]) -> list[str]:
    """Linears that a loader fuses and whose schemes differ: no loader of this format does."""
    return []


def extra_files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """No files beside config.json."""
    return {}


def recognises(config: Mapping[str, Any]) -> bool:
    """Never by its config.json: a GGUF file is told by its first bytes, and dense weights need no format."""
    return False


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    return {}
