"""Group sizes: what `auto` becomes, and those that do not divide an input width."""

from __future__ import annotations

from dataclasses import replace

from qtool.errors import PlanError
from qtool.recipe import Recipe
from qtool.stages import LinearPlan

AUTO_GROUPS = (128, 64, 32)


def settle(recipe: Recipe, linears: list[LinearPlan]) -> tuple[Recipe, list[LinearPlan]]:
    """Replace group_size auto, and refuse sizes that do not divide an input width."""
    if recipe.mixture is not None:  # the types have their blocks
        return recipe, linears
    auto = [linear for linear in linears if linear.scheme.group_size == "auto"]
    if auto:
        size = next((g for g in AUTO_GROUPS if all(linear.shape[1] % g == 0 for linear in auto)), None)
        if size is None:
            worst = next(linear for linear in auto if linear.shape[1] % AUTO_GROUPS[-1])
            raise PlanError(f"--group-size auto: none of 128, 64, 32 divides the {worst.shape[1]} input columns of "
                            f"{worst.name}; use --group-size -1 (per channel) or a rule for it")
        if recipe.scheme.group_size == "auto":
            recipe = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"group_size": size})})
        linears = [replace(one, scheme=one.scheme.model_copy(update={"group_size": size}))
                   if one.scheme.group_size == "auto" else one for one in linears]
    wrong = [one for one in linears if one.scheme.group_size != -1 and one.shape[1] % int(one.scheme.group_size)
             and one.scheme.strategy != "block"]  # of blocks, the format tells more
    if wrong:
        widths = sorted({one.shape[1] for one in linears})
        fits = [g for g in (256, 128, 64, 32, 16, 8) if all(width % g == 0 for width in widths)]
        raise PlanError(
            f"group size {wrong[0].scheme.group_size} does not divide the {wrong[0].shape[1]} input columns of "
            f"{wrong[0].name} ({len(wrong)} of {len(linears)} linears); sizes that fit every layer: "
            f"{', '.join(map(str, [*fits, -1]))} (-1 is per channel); or give --group-size auto")
    return recipe, linears
