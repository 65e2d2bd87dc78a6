"""Lists the outlier features of each linear: input columns that LLM.int8() takes apart. Changes no weight.

A column is listed when one of its values reaches the scheme's outlier_threshold on calibration text. Few columns do,
in nearly all layers and for most tokens; their number tells what the products in floating point will cost.
Source: arXiv 2208.07339, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from qtool.layer import Layer
from qtool.recipe import Strict

CALIBRATED = True
LISTS_OUTLIERS = True


class Options(Strict):
    """samples: sequences that the inputs are surveyed on.  top: columns of a linear that are listed one by one."""

    samples: int = Field(128, ge=1)
    top: int = Field(64, ge=0)


def run(layer: Layer, options: Options) -> Layer:
    """Nothing is done to single layers."""
    return layer


def features(largest: torch.Tensor, share: torch.Tensor, options: Options) -> dict[str, Any]:
    """What the manifest should tell: how many columns are outliers, and the `top` of them with the largest values.

    largest: of |x| per input column [K].  share: of the tokens, how many are outliers there [K].
    """
    count = int((share > 0).sum())
    order = torch.where(share > 0, largest, -1.0).argsort(descending=True, stable=True)[:min(count, options.top)]
    listed = [{"column": column, "largest": float(f"{largest[column]:.6g}"), "share": float(f"{share[column]:.6g}")}
              for column in order.tolist()]
    return {"outlier_features": count, "outliers": listed}
