"""Grids of levels in [-1, 1] with one float32 scale per group, the absmax; perhaps in 8 bits (double quantization).

Double quantization (QLoRA, arXiv 2305.14314 section 3): the scales less their mean, in runs of 256 over the whole
matrix, as codes of a dynamic 8-bit table times one float32 each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qtool.grids._levels import LevelGrid, midpoints
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor

NESTED_RUN, POINTS = 256, 65_536


@dataclass(frozen=True)
class AbsmaxGrid(LevelGrid):
    """A LevelGrid as bitsandbytes fits it."""

    def fit(self, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype,
            importance: torch.Tensor | None = None, shrink_steps: int = 1, signed: bool = False,
            rounds: int = 0) -> QuantizedTensor:
        """As LevelGrid.fit; with double_quant scales are what their 8-bit codes stand for, and extra holds those."""
        if shrink_steps == 1:  # as bitsandbytes: a group of zeros has scale 0
            group = self.width(scheme, weight.shape[1])
            absmax = weight.reshape(weight.shape[0], weight.shape[1] // group, group).abs().amax(-1)
            fitted = self.fitted(absmax.float(), group)
        else:
            fitted = super().fit(weight, scheme, torch.float32, importance, shrink_steps, signed, rounds)
        if not scheme.double_quant:
            return fitted
        nested = nest(fitted.scale)
        first = {"first": fitted.scale} if shrink_steps == 1 else {}
        return replace(fitted, scale=unnest(nested, fitted.scale.shape), extra={**nested, **first})

    def encode(self, weight: torch.Tensor, fitted: QuantizedTensor) -> QuantizedTensor:
        """Every weight at the nearest level of w * (1 / scale), in this order of operations; a scale of 0 gives 0.

        After a plain fit the scale is that before double quantization, as bitsandbytes does it.
        """
        rows, groups = fitted.scale.shape
        scale = fitted.extra.get("first", fitted.scale)
        inverse = torch.where(scale != 0, (1 / scale).clamp_max(torch.finfo(torch.float32).max), 0.0)
        scaled = (weight.reshape(rows, groups, -1) * inverse[..., None]).clamp_(-1, 1).reshape(weight.shape)
        return replace(super().encode(scaled, replace(fitted, scale=torch.ones_like(fitted.scale))), scale=fitted.scale)


def dynamic_table() -> torch.Tensor:
    """The 256 values of the dynamic 8-bit type, ascending: 7 decades, each finer than the one below it."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def nest(scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales [N, G] as nested_codes uint8 [N G], nested_absmax float32 [ceil(N G / 256)], nested_offset float32 []."""
    offset = scale.mean()
    flat = (scale - offset).flatten()
    runs = torch.nn.functional.pad(flat, (0, -len(flat) % NESTED_RUN)).reshape(-1, NESTED_RUN)
    absmax = runs.abs().amax(-1)
    inverse = torch.where(absmax != 0, 1 / absmax, 0.0)
    edges = midpoints(dynamic_table()).to(scale.device)
    # bitsandbytes on a CPU looks the code up at 65,536 points between -1 and 1
    place = (((runs * inverse[:, None]).clamp(-1, 1) + 1) * 0.5 * (POINTS - 1) + 0.5).floor()
    codes = torch.bucketize(place / (POINTS - 1) * 2 - 1, edges).to(torch.uint8)
    return {"nested_codes": codes.flatten()[:len(flat)], "nested_absmax": absmax, "nested_offset": offset}


def unnest(nested: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """The scales that nested ones stand for, float32 in `shape`."""
    table = dynamic_table().to(nested["nested_codes"].device)
    runs = nested["nested_absmax"].repeat_interleave(NESTED_RUN)[:nested["nested_codes"].numel()]
    return (table[nested["nested_codes"].long()] * runs + nested["nested_offset"]).reshape(shape)
