"""Round to nearest: every weight goes to the closest value of its grid. Needs no data.

With `search: true` the grid of each group is shrunk as far as that lowers its squared error.
"""

from __future__ import annotations

from pydantic import Field

from qtool import found
from qtool.layer import Layer
from qtool.recipe import Strict

CALIBRATED = False
CODEBOOKS = True


class Options(Strict):
    """search: fit the scales to the least squared error, not to the largest weight. signed: full-range symmetric."""

    search: bool = True
    signed: bool = True
    shrink_steps: int = Field(24, ge=1, le=200)
    rounds: int = Field(2, ge=0, le=10)


def run(layer: Layer, options: Options) -> Layer:
    grid = found.load("grids", layer.scheme.grid)
    importance = None if layer.stats is None else layer.stats.hessian.diagonal()
    steps, rounds = (options.shrink_steps, options.rounds) if options.search else (1, 0)
    fitted = grid.fit(layer.weight, layer.scheme, layer.scale_dtype, importance, steps, options.signed, rounds)
    return layer.having(quantized=grid.encode(layer.target, fitted))
