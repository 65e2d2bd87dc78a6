"""Linears whose 4-bit codes lie in other words in another format, and in no others: they go over as words.

Everything but these words is read, packed and compared as ever, with codes that have a shape and no data (on the device
meta). A byte for each code would take most of the time of an export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from qtool.formats._stored import Read
from qtool.ops import int4
from qtool.recipe import Scheme


@dataclass(frozen=True)
class Route:
    """The tensors with the codes of one linear of this shape [N, K], and their layouts (ops/int4.py)."""

    source: str
    source_layout: int
    target: str
    target_layout: int
    shape: tuple[int, int]

    def repacked(self, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The words of the target, as `dtype`, for those of the source."""
        return int4.repack(words.view(torch.int32), self.shape, self.source_layout, self.target_layout).view(dtype)

    def same(self, words: torch.Tensor, made: torch.Tensor) -> bool:
        """Whether the words of the source and of the target hold the same codes."""
        return int4.same_codes(words.view(torch.int32), made.view(torch.int32), self.shape, self.source_layout,
                               self.target_layout)


def route(linear_name: str, scheme: Scheme, shape: tuple[int, ...], source: ModuleType | None, target: ModuleType,
          config: Mapping[str, Any]) -> Route | None:
    """How the codes of a linear [N, K] go from one format to another as words; None where they cannot.

    config: what the source says of its layout.
    """
    if scheme.grid != "affine" or scheme.bits != 4 or scheme.activations or any(side % int4.PER_WORD for side in shape):
        return None
    if source is None or not hasattr(source, "int4") or not hasattr(target, "int4"):
        return None
    (read, before), (written, after) = source.int4(linear_name, config), target.int4(linear_name)
    return Route(read, before, written, after, (shape[0], shape[1]))


def without(tensors: Mapping[str, torch.Tensor], name: str | None) -> Read:
    """Reads from `tensors`; the one called `name` is there without its data."""
    return lambda wanted: torch.empty_like(tensors[wanted], device="meta") if wanted == name else tensors[wanted]
