"""AWQ: scale input channels by how large their activations are, so that weights that matter are rounded finer.

s = mean|x|^a, or mean|x|^a / mean|w|^(1-a) with w relative to the largest weight of its group (duo), normalised to
sqrt(max s * min s) = 1, with `a` on a grid of [0, 1]. Those with the least error |(Q(W diag s) diag(1/s) - W) x|² over
some calibration tokens are then tried on the block: the one whose rounding changes the block's output least is taken.
W diag(s) is quantized by the steps that follow, and 1/s goes into the norm or linear that x comes from. Clipping is the
search of the step that fits the grid.
Source: arXiv 2306.00978.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from qtool import found
from qtool.layer import Layer
from qtool.recipe import Strict

CALIBRATED = True
SCALES_INPUTS = True


class Options(Strict):
    """samples: sequences that the inputs are surveyed on.  steps: values of `a` that are tried.  duo: with w, too.

    tokens: how many of them measure the error.  shrink_steps: how the grid is fitted while searching.  tries: values
    that are tried on the block.
    """

    samples: int = Field(16, ge=1)
    tokens: int = Field(512, ge=64)
    steps: int = Field(20, ge=1, le=100)
    shrink_steps: int = Field(1, ge=1, le=200)
    tries: int = Field(3, ge=1, le=20)
    duo: bool = True


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is left to do for single layers: the scales are in the weights by now."""
    return layer


def input_scales(layer: Layer, mean: torch.Tensor, largest: torch.Tensor, sample: torch.Tensor,
                 options: Options) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Scales of the input channels [K] that come into question, and what the manifest should tell of each.

    mean, largest: of |x| per channel [K].  sample: some inputs [T, K].  The best for these linears alone comes first.
    """
    candidates = {(0.0, False): torch.ones_like(mean)}
    relative = _relative(layer)
    for step in range(options.steps + 1):
        power = step / options.steps
        large = mean.clamp_min(1e-8).pow(power)
        for duo in (False, True) if options.duo else (False,):
            if (power, duo) not in ((0.0, False), (1.0, True)):  # known already; the same as without w
                scale = (large / relative.pow(1 - power) if duo else large).clamp_min(1e-4)
                candidates[power, duo] = scale / (scale.max() * scale.min()).sqrt()
    errors = {key: _error(layer, scale, sample, options) for key, scale in candidates.items()}
    best = sorted(candidates, key=lambda key: (errors[key], key))[:options.tries]
    return [(candidates[power, duo], {"awq": power, **({"awq_duo": True} if duo else {})}) for power, duo in best]


def _relative(layer: Layer) -> torch.Tensor:
    """Mean over the outputs of |w| over the largest |w| of its group, per input channel [K]."""
    grid = found.load("grids", layer.scheme.grid)
    rows, columns = layer.weight.shape
    size = layer.weight.abs().reshape(rows, -1, grid.width(layer.scheme, columns))
    return (size / size.amax(-1, keepdim=True).clamp_min(1e-12)).reshape(rows, columns).mean(0).clamp_min(1e-4)


def _error(layer: Layer, scale: torch.Tensor, sample: torch.Tensor, options: Options) -> float:
    grid = found.load("grids", layer.scheme.grid)
    scaled = layer.weight * scale
    fitted = grid.fit(scaled, layer.scheme, layer.scale_dtype, None, options.shrink_steps)
    off = grid.decode(grid.encode(scaled, fitted)) / scale - layer.weight
    return float(torch.linalg.vector_norm(sample @ off.T, dtype=torch.float64))
