"""Steps that scale the input channels of linears before these are solved (AWQ, SmoothQuant), on one block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qtool import found
from qtool.layer import Layer
from qtool.models import folds
from qtool.plan import Plan
from qtool.stages import LinearPlan, Stage
from qtool.stream import Stream

SHRINK_STEPS = 12  # of the grids that are tried on the block
Notes = dict[str, dict[str, Any]]


def rescale(plan: Plan, stage: Stage, block: torch.nn.Module, stream: Stream,
            weights: dict[str, torch.Tensor]) -> Notes:
    """Apply the scaling steps of the recipe to a block and to its `weights` (by name in the checkpoint).

    The block computes what it did before. Returns what the manifest should tell of each linear whose weight changed.
    """
    notes: Notes = {}
    for step, options in plan.steps:
        if getattr(step, "SCALES_INPUTS", False):
            surveys = stream.survey(block, stage, options.samples, options.tokens)
            for fold in stream.folds(block, stage, surveys):
                _scale(plan, stage, block, stream, fold, surveys[fold.consumers], step, options, weights, notes)
    return notes


def _scale(plan: Plan, stage: Stage, block: torch.nn.Module, stream: Stream, fold: folds.Fold, survey: folds.Survey,
           step: Any, options: Any, weights: dict[str, torch.Tensor], notes: Notes) -> None:
    prefix = plan.skeleton.blocks[stage.block or 0] + "."
    stored = {path: plan.skeleton.source(prefix + path) for path, _ in block.named_parameters()}
    linears = {linear.name: linear for linear in stage.linears}
    group = [linears[prefix + path] for path in fold.consumers]

    def read(path: str) -> torch.Tensor:
        return weights[stored[path]].to(plan.device)

    layer = _stacked(plan, group, read, prefix)
    mean, largest = folds.tied(fold, survey.mean), folds.tied(fold, survey.largest)
    found_scales = [(folds.tied(fold, scale), told)
                    for scale, told in step.input_scales(layer, mean, largest, survey.sample, options)]
    errors = [0.0]
    if len(found_scales) > 1:
        expected = stream.trial(block, stage)
        errors = [_moved(stage, block, stream, fold, layer, survey, scale, expected) for scale, _ in found_scales]
    scale, told = found_scales[min(range(len(errors)), key=errors.__getitem__)]
    changed = folds.apply(block, fold, scale, read, plan.model_dtype)
    for path, tensor in changed.items():
        weights[stored[path]] = tensor.cpu()
    for linear in group:
        notes.setdefault(linear.name, {}).update(told, rescaled=True)
    if fold.linear and prefix + fold.source in linears:
        notes.setdefault(prefix + fold.source, {})["rescaled"] = True


def _moved(stage: Stage, block: torch.nn.Module, stream: Stream, fold: folds.Fold, layer: Layer, survey: folds.Survey,
           scale: torch.Tensor, expected: torch.Tensor) -> float:
    """How far the block's output moves, |y - y0|², when the consumers of a fold are rounded at this scale."""
    grid = found.load("grids", layer.scheme.grid)
    importance = (survey.sample / scale).square().mean(0)
    weight = layer.weight * scale
    fitted = grid.fit(weight, layer.scheme, layer.scale_dtype, importance, SHRINK_STEPS, True, 1)
    rounded = grid.decode(grid.encode(weight, fitted)) / scale  # the fold itself changes nothing: it may stay out
    paths = [f"{path}.weight" for path in fold.consumers]
    rows = rounded.split([block.get_parameter(path).shape[0] for path in paths])
    with folds.replaced(block, dict(zip(paths, rows, strict=True))):
        moved = stream.trial(block, stage)
    return float((moved - expected).float().square().sum(dtype=torch.float64))


def _stacked(plan: Plan, group: list[LinearPlan], read: Callable[[str], torch.Tensor], prefix: str) -> Layer:
    weight = torch.cat([read(linear.name.removeprefix(prefix) + ".weight").float() for linear in group])
    return Layer(group[0].name, weight, weight, group[0].scheme, plan.format.scale_dtype(plan.model_dtype))
