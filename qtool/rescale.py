"""Steps that scale the input channels of linears before these are solved (AWQ, SmoothQuant), on one block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool import found
from qtool.layer import Layer, Survey
from qtool.models import folds
from qtool.plan import Plan
from qtool.quality import finite_or_worst
from qtool.stages import LinearPlan, Stage
from qtool.stream import Stream

SHRINK_STEPS = 12  # of the grids that are tried on the block
Notes = dict[str, dict[str, Any]]


def rescale(plan: Plan, stage: Stage, block: torch.nn.Module, stream: Stream,
            weights: dict[str, torch.Tensor]) -> tuple[Notes, list[folds.Scaling]]:
    """Apply the scaling steps of the recipe to a block and to its `weights` (by name in the checkpoint).

    The block computes what it did before. Returns what the manifest should tell of each linear whose weight changed,
    and what was done to the weights of linears, by name and in order.
    """
    notes: Notes = {}
    scalings: list[folds.Scaling] = []
    for step, options in found.having("SCALES_INPUTS", plan.steps):
        surveys = stream.survey(block, stage, options.samples, getattr(options, "tokens", 0),
                                moments=getattr(step, "SURVEYS_MOMENTS", False))
        trial = Trial(block, functools.partial(stream.trial, block, stage))
        for fold in stream.folds(block, stage, surveys):
            scalings += _scale(plan, stage, trial, fold, surveys[fold.consumers], step, options, weights, notes)
    return notes, scalings


@dataclass
class Trial:
    """A block whose output can be looked at. Folds do not change it, so one output is what all changes are held to."""

    block: torch.nn.Module
    run: Callable[[], torch.Tensor]
    expected: torch.Tensor | None = None

    def moved(self, weights: dict[str, torch.Tensor]) -> float:
        """|y - y0|² of the block's output with these parameters, by path, in place of its own."""
        if self.expected is None:
            self.expected = self.run()
        with folds.replaced(self.block, weights):
            return finite_or_worst(float((self.run() - self.expected).double().square().sum()))


def _scale(plan: Plan, stage: Stage, trial: Trial, fold: folds.Fold, survey: Survey, step: Any, options: Any,
           weights: dict[str, torch.Tensor], notes: Notes) -> list[folds.Scaling]:
    block = trial.block
    prefix = plan.skeleton.blocks[stage.block or 0] + "."
    stored = {path: plan.skeleton.source(prefix + path) for path, _ in block.named_parameters()}
    linears = {linear.name: linear for linear in stage.linears}
    group = [linears[prefix + path] for path in fold.consumers]

    def read(path: str) -> torch.Tensor:
        return weights[stored[path]].to(plan.device)

    layer = _stacked(plan, group, read, prefix)
    candidates = [(folds.tied(fold, scale), told)
                  for scale, told in step.input_scales(layer, folds.tied_survey(fold, survey), options)]
    scale, told = candidates[0]
    if len(candidates) > 1:
        scale, told = min(candidates, key=lambda one: trial.moved(_rounded(block, fold, layer, survey, one[0])))
    changed, scalings = folds.apply(block, fold, scale, read, plan.model_dtype)
    for path, tensor in changed.items():
        weights[stored[path]] = tensor.cpu()
    for linear in group:
        notes.setdefault(linear.name, {}).update(told, rescaled=True)
    if fold.linear and prefix + fold.source in linears:
        notes.setdefault(prefix + fold.source, {})["rescaled"] = True
    return [replace(one, linear=prefix + one.linear) for one in scalings if prefix + one.linear in linears]


def _rounded(block: torch.nn.Module, fold: folds.Fold, layer: Layer, survey: Survey,
             scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of a fold's consumers, by path, rounded at this scale; the fold changes nothing and stays out."""
    grid = found.load("grids", layer.scheme.grid)
    importance = (survey.sample / scale).square().mean(0)
    weight = layer.weight * scale
    fitted = grid.fit(weight, layer.scheme, layer.scale_dtype, importance, SHRINK_STEPS, True, 1)
    paths = [f"{path}.weight" for path in fold.consumers]
    rows = (grid.decode(grid.encode(weight, fitted)) / scale).split([len(block.get_parameter(path)) for path in paths])
    return dict(zip(paths, rows, strict=True))


def _stacked(plan: Plan, group: list[LinearPlan], read: Callable[[str], torch.Tensor], prefix: str) -> Layer:
    weight = torch.cat([read(linear.name.removeprefix(prefix) + ".weight").float() for linear in group])
    return Layer(group[0].name, weight, weight, group[0].scheme, plan.format.scale_dtype(plan.model_dtype))
