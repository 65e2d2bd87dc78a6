"""Learning after the codes: scales, gains and, if asked, roundings of a block, against the unquantized block's output.

The codes of all linears of a block come from the steps before; then gradient descent moves what the format stores as
real numbers (frontier 1.9 and 1.12), and with `rounding` the codes too, by a bounded offset before rounding (SignRound,
arXiv 2309.05516) or by moving the weights themselves (EfficientQAT, arXiv 2407.11062). What is kept is what is best on
held-out tokens; a block that nothing improves stays as the solver left it. The engine is learning/tune.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qtool.layer import Layer
from qtool.recipe import Strict

CALIBRATED = True
NEEDS_FLOAT_STREAM = True
CODEBOOKS = True  # codes stay, whatever they are codes of
LEARNS = "block"


class Options(Strict):
    """share: of the fitting samples, how many are learned from.  epochs: passes over them.  tokens: of one step.

    scales, gains: whether they are learned.  rate, gain_rate: Adam's, in units of the scale or of the gains' size.
    rounding: "frozen" codes; "offset": SignSGD on an offset before rounding, at offset_rate steps of the grid;
    "weights": Adam on the weights before rounding, at weight_rate.  clip: see learning/block.py.
    """

    share: float = Field(1.0, gt=0.0, le=1.0)
    epochs: int = Field(2, ge=1, le=1000)
    tokens: int = Field(512, ge=1)
    scales: bool = True
    gains: bool = True
    rounding: Literal["frozen", "offset", "weights"] = "frozen"
    rate: float = Field(0.003, gt=0.0, le=1.0)
    gain_rate: float = Field(0.003, gt=0.0, le=1.0)
    offset_rate: float = Field(0.01, gt=0.0, le=1.0)
    weight_rate: float = Field(0.01, gt=0.0, le=1.0)
    patience: int = Field(4, ge=1)
    clip: float = Field(10.0, gt=0.0)


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is done to single layers: learning begins when all of the block are solved."""
    return layer
