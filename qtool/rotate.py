"""The rotate step: a checkpoint whose tensors are rotated as they are read, so that everything else works as ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import RecipeError
from qtool.models import changes, rotations
from qtool.models.rotations import Rotated
from qtool.models.skeleton import Skeleton
from qtool.tensors import any_number


def wanted(steps: Sequence[tuple[ModuleType, Any]]) -> Any:
    """The options of the rotate step, None without one. Raises RecipeError."""
    rotating = [place for place, (module, _) in enumerate(steps) if getattr(module, "ROTATES", False)]
    if not rotating:
        return None
    if rotating != [0]:
        raise RecipeError("rotate changes the weights that all other steps see: put it first, and once, in steps")
    options = steps[0][1]
    if not (options.residual or options.heads):
        raise RecipeError("step rotate: residual and heads are both false, so nothing is rotated; leave the step out")
    return options


def find(skeleton: Skeleton, options: Any, seed: int) -> Rotated:
    """Raises ModelError where the architecture does not allow it."""
    return rotations.find(skeleton, options.residual, options.heads, options.untie, seed)


def view(checkpoint: Checkpoint, rotated: Rotated | None) -> Checkpoint:
    """The checkpoint with its tensors rotated when they are read; origin and hashes stay those of its files."""
    if rotated is None:
        return checkpoint

    def fetch(name: str, start: int | None, stop: int | None) -> torch.Tensor:
        if name not in rotated.changes:
            return checkpoint.fetch(name, start, stop)
        tensor = changes.apply(rotated.changes[name], checkpoint.read)
        return tensor if start is None else tensor[start:stop].clone()

    specs = dict(checkpoint.specs)
    for name in rotated.untied:
        specs[name] = replace(specs[rotated.changes[name].source], name=name)
    config = {**checkpoint.config, **({"tie_word_embeddings": False} if rotated.untied else {})}
    return replace(checkpoint, specs=dict(sorted(specs.items())), config=config, fetch=fetch)


def describe(rotated: Rotated | None) -> dict[str, Any] | None:
    """What the manifest tells: sizes of the factors, tensors that changed (numbers as *), tensors that are new."""
    if rotated is None:
        return None
    return {"residual": None if rotated.residual is None else str(rotated.residual),
            "heads": [str(one) for one in rotated.heads], "untied": list(rotated.untied),
            "tensors": sorted({any_number(name) for name in rotated.changes})}
