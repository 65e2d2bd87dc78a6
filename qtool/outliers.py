"""What the step `outliers` finds out about a block before it is solved."""

from __future__ import annotations

from typing import Any

import torch

from qtool import found
from qtool.plan import Plan
from qtool.stages import Stage
from qtool.stream import Stream


def outlier_notes(plan: Plan, stage: Stage, block: torch.nn.Module, stream: Stream) -> dict[str, dict[str, Any]]:
    """What the manifest should tell of the inputs of each linear, by name; nothing without such a step.

    Channels should be scaled by now, for these are the inputs that the quantized model will see. An expert that no
    token reached is left out.
    """
    notes: dict[str, dict[str, Any]] = {}
    prefix = plan.skeleton.blocks[stage.block or 0] + "."
    for step, options in found.having("LISTS_OUTLIERS", plan.steps):
        surveys = stream.survey(block, stage, options.samples, 0, plan.recipe.scheme.outlier_threshold)
        for paths, survey in surveys.items():
            notes |= dict.fromkeys((prefix + path for path in paths),
                                   step.features(survey.largest, survey.outliers, options))
    return notes
