"""SmoothQuant: move the difficulty of large activations into the weights, where inputs are rounded as well.

s_j = max|x_j|^a / max|W_j|^(1 - a) per input channel; x / s is easier to round per token, W diag(s) a little harder.
1/s goes into the norm or linear that x comes from. `strength` is a, or "search": the one with the least output error
with both sides rounded. Source: arXiv 2211.10438.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from qtool import found
from qtool.activations import round_inputs, static_scale
from qtool.layer import Layer, Survey
from qtool.quality import finite_or_worst
from qtool.recipe import Strict

CALIBRATED = True
SCALES_INPUTS = True
TRIED = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Options(Strict):
    """strength: a, or search.  samples: sequences that the inputs are surveyed on.  tokens: of them, measure errors."""

    strength: float | Literal["search"] = "search"
    samples: int = Field(32, ge=1)
    tokens: int = Field(1024, ge=64)


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is left to do for single layers: the scales are in the weights by now."""
    return layer


def input_scales(layer: Layer, survey: Survey, options: Options) -> list[tuple[torch.Tensor, dict[str, float]]]:
    """The scale of each input channel [K], and what the manifest should tell."""
    weights = layer.weight.abs().amax(0).clamp_min(1e-8)
    tried = TRIED if options.strength == "search" else (float(options.strength),)
    candidates = {power: _scale(survey.largest, weights, power) for power in tried}
    if options.strength == "search":
        candidates[0.0] = torch.ones_like(survey.largest)  # as it is
    chosen = min(candidates, key=lambda power: (_error(layer, candidates[power], survey.sample), power))
    return [(candidates[chosen], {"smoothquant": chosen})]


def _scale(largest: torch.Tensor, weights: torch.Tensor, power: float) -> torch.Tensor:
    scale = largest.clamp_min(1e-5).pow(power) / weights.pow(1 - power)
    return scale.clamp_min(1e-5) / (scale.clamp_min(1e-5).log().mean().exp())


def _error(layer: Layer, scale: torch.Tensor, sample: torch.Tensor) -> float:
    grid = found.load("grids", layer.scheme.grid)
    scaled, x = layer.weight * scale, sample / scale
    rounded = x
    if layer.scheme.activations:
        rounded = round_inputs(x, layer.scheme, static_scale(x.abs(), x, layer.scheme, layer.scale_dtype))
    decoded = grid.decode(grid.encode(scaled, grid.fit(scaled, layer.scheme, layer.scale_dtype)))
    return finite_or_worst(float(torch.linalg.vector_norm(rounded @ decoded.T - sample @ layer.weight.T,
                                                          dtype=torch.float64)))
