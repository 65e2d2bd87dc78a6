"""AWQ: scale input channels by how large their activations are, so that weights that matter are rounded finer.

s = mean|x|^a, normalised to sqrt(max s * min s) = 1, with `a` on a grid of [0, 1]. The values with the least error
|(Q(W diag s) diag(1/s) - W) x|² over some calibration tokens are then tried on the block: the one whose rounding
changes the block's output least is taken.
W diag(s) is quantized by the steps that follow, and 1/s goes into the norm or linear that x comes from. Clipping is the
search of the step that fits the grid.
Source: arXiv 2306.00978.
"""

from __future__ import annotations

import torch
from pydantic import Field

from qtool import found
from qtool.layer import Layer, Survey
from qtool.quality import finite_or_worst
from qtool.recipe import Strict

CALIBRATED = True
SCALES_INPUTS = True


class Options(Strict):
    """samples: sequences that the inputs are surveyed on.  steps: values of `a` that are tried beside 0.

    tokens: how many of them measure the error.  shrink_steps: how the grid is fitted while searching.  tries: values
    that are tried on the block.
    """

    samples: int = Field(32, ge=1)
    tokens: int = Field(1024, ge=64)
    steps: int = Field(20, ge=1, le=100)
    shrink_steps: int = Field(1, ge=1, le=200)
    tries: int = Field(3, ge=1, le=20)


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is left to do for single layers: the scales are in the weights by now."""
    return layer


def input_scales(layer: Layer, survey: Survey, options: Options) -> list[tuple[torch.Tensor, dict[str, float]]]:
    """Scales of the input channels [K] that come into question, and what the manifest should tell of each.

    The best for these linears alone comes first.
    """
    mean = survey.mean
    candidates = {0.0: torch.ones_like(mean)}
    for step in range(1, options.steps + 1):
        scale = mean.clamp_min(1e-8).pow(step / options.steps).clamp_min(1e-4)
        candidates[step / options.steps] = scale / (scale.max() * scale.min()).sqrt()
    errors = {power: _error(layer, scale, survey.sample, options) for power, scale in candidates.items()}
    best = sorted(candidates, key=lambda power: (errors[power], power))[:options.tries]
    return [(candidates[power], {"awq": power}) for power in best]


def _error(layer: Layer, scale: torch.Tensor, sample: torch.Tensor, options: Options) -> float:
    grid = found.load("grids", layer.scheme.grid)
    scaled = layer.weight * scale
    fitted = grid.fit(scaled, layer.scheme, layer.scale_dtype, None, options.shrink_steps)
    off = grid.decode(grid.encode(scaled, fitted)) / scale - layer.weight
    return finite_or_worst(float(torch.linalg.vector_norm(sample @ off.T, dtype=torch.float64)))
