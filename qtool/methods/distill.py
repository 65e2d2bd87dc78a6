"""Learning at the end: scales and gains of the whole model, against the logits of the unquantized one.

The loss is KL(original || quantized) of the predictions on calibration text, over all tokens of the vocabulary; what
moves are the numbers that the format stores beside the codes, and with `rounding: weights` the codes too:
quantization-aware training with a straight-through estimator (LSQ, arXiv 1902.08153; LLM-QAT, arXiv 2305.17888). What
is kept is what is best on held-out tokens. The engine is learning/whole.py: one block in memory, activations computed
again on the way back.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qtool.layer import Layer
from qtool.recipe import Strict

CALIBRATED = True
NEEDS_FLOAT_STREAM = True
CODEBOOKS = True  # codes stay, whatever they are codes of
LEARNS = "model"


class Options(Strict):
    """epochs: passes over the fitting samples.  tokens: of one step.  budget_tokens, minutes: when it ends before.

    scales, gains, rounding, rate, gain_rate, weight_rate: see the step tune.  warmup: the share of the steps on which
    the rates rise.  checks: in an epoch, how often the held-out samples are looked at and the state is saved.
    patience: how many checks without a gain end it.  A limit in minutes makes the bytes depend on the machine's speed.
    """

    share: float = Field(1.0, ge=1.0, le=1.0)
    epochs: int = Field(1, ge=1, le=1000)
    tokens: int = Field(1024, ge=1)
    budget_tokens: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    scales: bool = True
    gains: bool = True
    rounding: Literal["frozen", "weights"] = "frozen"
    rate: float = Field(0.002, gt=0.0, le=1.0)
    gain_rate: float = Field(0.002, gt=0.0, le=1.0)
    weight_rate: float = Field(0.003, gt=0.0, le=1.0)
    warmup: float = Field(0.05, ge=0.0, le=1.0)
    checks: int = Field(4, ge=1)
    patience: int = Field(4, ge=1)


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is done to single layers: learning begins when all blocks are solved."""
    return layer
