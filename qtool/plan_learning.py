"""What a plan needs where steps learn (tune, distill): which they are, and what they cannot be used with."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from qtool import found
from qtool.errors import PlanError
from qtool.recipe import Recipe

if TYPE_CHECKING:
    from qtool.plan import Plan

Steps = tuple[tuple[ModuleType, Any], ...]
LOGITS = 128  # tokens whose logits are in memory while the whole model learns
BLOCK, MODEL = "block", "model"  # what a step's LEARNS says: on each block when it is solved, or on all at the end


def learning(steps: Steps, where: str) -> list[Any]:
    """The options of the steps that learn there, in order."""
    return [options for module, options in steps if getattr(module, "LEARNS", None) == where]


def size(plan: Plan) -> tuple[bool, bool, int]:
    """For the estimates: whether blocks learn, whether weights move before they are rounded, tokens of a last step."""
    every = [*plan.learning, *([plan.distilling] if plan.distilling else [])]
    return (bool(plan.learning), any(options.rounding != "frozen" for options in every),
            max(plan.distilling.tokens, plan.recipe.calibration.batch_tokens or 0) if plan.distilling else 0)


def name_of(recipe: Recipe, steps: Steps) -> str:
    """Of the first step that learns; "" where none does."""
    return next((next(iter(entry)) for entry, (module, _) in zip(recipe.steps, steps, strict=True)
                 if hasattr(module, "LEARNS")), "")


def refuse(plan: Plan) -> None:
    """Raise PlanError for a plan whose steps cannot learn, with what to do."""
    step = name_of(plan.recipe, plan.steps)
    if step:
        _refuse_order(plan, step)
        reason = _cannot(plan)
        if reason:
            raise PlanError(f"step {step}: {reason}")


def _refuse_order(plan: Plan, step: str) -> None:
    """Codes first, then the blocks, then the model."""
    names = [next(iter(entry)) for entry in plan.recipe.steps]
    ranks = [{BLOCK: 1, MODEL: 2}.get(getattr(module, "LEARNS", ""), 0) for module, _ in plan.steps]
    if ranks != sorted(ranks) or ranks.count(2) > 1:
        raise PlanError(f"step {step}: the steps that learn come last, and distill once, at the very end; the recipe "
                        f"has {', '.join(names)}")


def _cannot(plan: Plan) -> str:
    recipe = plan.recipe
    if recipe.outputs or plan.whole is not None or plan.others:
        return "it changes the weights that the other outputs were solved beside; make one output a run"
    if plan.gguf is not None:
        return "the scales of GGUF's blocks are made of parts that cannot be learned yet; use another --format"
    if recipe.keep_statistics:
        return "a --redo cannot change linears whose scales were learned together; leave --keep-statistics out"
    if recipe.calibration.held_out == 0:
        return "what is learned is judged on held-out samples; give calibration.held_out, such as 0.0625"
    if plan.samples < 2:
        return "it needs one sample to learn from and one that is held out; use calibration.samples >= 2"
    rounded = next((one for one in plan.linears if one.scheme.activations is not None), None)
    if rounded:
        return (f"the inputs of {rounded.name} are rounded when the model runs ({rounded.scheme.label}), which it does "
                "not learn with; leave activations out of the scheme")
    moving = any(getattr(options, "rounding", "frozen") != "frozen"
                 for where in (BLOCK, MODEL) for options in learning(plan.steps, where))
    fixed = next((one for one in plan.linears if not _moves(one.scheme.grid)), None)
    if moving and fixed:
        return (f"the roundings of grid {fixed.scheme.grid} ({fixed.name}) cannot be learned; use rounding: frozen, or "
                "the grids affine, nf4, fp4, fp8")
    return ""


def _moves(grid: str) -> bool:
    """Whether a weight's nearest level depends on its group's scale only."""
    module = found.load("grids", grid)
    return grid == "affine" or (hasattr(module, "GRID") and not getattr(module, "WHOLE_SCALE", False))
