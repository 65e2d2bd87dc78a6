"""Rotation: the weights in another basis, where no channel stands out, of a model that computes what it did.

Hadamard matrices R1 for the residual stream and R2 for the values of the heads, folded into the weights (rotate.py,
models/rotations.py); nothing is left to do when the model runs. Sources: QuaRot (arXiv 2404.00456), SpinQuant
(arXiv 2405.16406), of which these are the offline rotations, random and not trained.
"""

from __future__ import annotations

from qtool.layer import Layer
from qtool.recipe import Strict

CALIBRATED = False
CODEBOOKS = True
ROTATES = True


class Options(Strict):
    """residual: R1.  heads: R2.  untie: where the output head shares the embedding, write it as a tensor of its own."""

    residual: bool = True
    heads: bool = True
    untie: bool = False


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is left to do for single layers: the weights are read rotated."""
    return layer
