"""From the flags of `qtool quantize` to a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import RecipeError

if TYPE_CHECKING:
    from qtool.recipe import Recipe


def bits_or_budget(bits: float | None, budget: str | None) -> tuple[int | float | None, str | None]:
    """(bits of a code, budget): bits with a fraction are a budget."""
    if bits is not None and budget is not None:
        raise RecipeError(f"--bits {bits:g} and --budget {budget} both say how many bits; give one of them")
    return (bits, budget) if bits is None else (int(bits), None) if bits.is_integer() else (None, f"{bits}")


def refuse_imatrix(model: str, method: str | None, given: Path | None) -> None:
    """An importance matrix, if it was given, stands in place of text, and quantize has text."""
    if given is not None:
        raise RecipeError(f"--imatrix {given} fits block types without text, which export does: qtool export {model} "
                          f"--to gguf --type {method or 'q4_k_m'} --imatrix {given}; quantize measures more than such "
                          "a file holds, on --calibration TEXT")


def group_size(given: str | None) -> int | str | None:
    """A number of columns, or auto."""
    if given is None or given == "auto":
        return given
    try:
        return int(given)
    except ValueError:
        raise RecipeError(f"--group-size {given}: give a number of columns, -1 (a whole row) or auto") from None


def symmetric(symmetric: bool, asymmetric: bool) -> bool | None:
    """What --symmetric and --asymmetric say together; None for neither."""
    if symmetric and asymmetric:
        raise RecipeError("--symmetric and --asymmetric exclude each other; give one of them, or neither")
    return True if symmetric else False if asymmetric else None


@dataclass(frozen=True)
class Given:
    """What was said about the recipe. typed: flag -> (key of the recipe, value or None)."""

    method: str | None
    recipe: str | None
    typed: dict[str, tuple[str, Any]]
    settings: list[str]


def named(given: Given) -> Recipe | None:
    """The recipe that --method or --recipe names; None: neither was given."""
    from qtool import recipe

    if given.method and given.recipe:
        raise RecipeError(f"--method {given.method} and --recipe {given.recipe} both say how to quantize; give one "
                          "of them")
    return recipe.load(given.recipe) if given.recipe else recipe.preset(given.method) if given.method else None


def changes(given: Given) -> dict[str, Any]:
    """Key of the recipe -> value, of the flags and then of --set."""
    from qtool import recipe

    told = {key: value for key, value in given.typed.values() if value is not None}
    return told | dict(recipe.parse_setting(setting) for setting in given.settings)


def to_recipe(given: Given) -> Recipe:
    """Method preset or recipe, then the flags, then --set."""
    from qtool import recipe

    typed, made = given.typed, named(given) or recipe.preset("gptq")
    for flag, (key, value) in typed.items():
        if value is not None:
            made = recipe.override(made, {key: value}, flag)
    settings = dict(recipe.parse_setting(setting) for setting in given.settings)
    made = recipe.override(made, settings) if settings else made
    meaningless = [flag for flag in ("--bits", "--group-size", "--symmetric", "--double-quant")
             if typed[flag][1] is not None and made.mixture]
    if meaningless:
        told = "--symmetric or --asymmetric" if meaningless[0] == "--symmetric" else meaningless[0]
        raise RecipeError(f"{told} means nothing with the GGUF types of {made.mixture}, which have their own bits; "
                          "leave it out, or choose another mixture")
    idle = [flag for flag in ("--bits", "--group-size") if typed[flag][1] is not None]
    if idle and made.budget is not None and not made.budget.schemes:
        raise RecipeError(f"{idle[0]} means nothing with a budget, which chooses bits and groups for each linear; "
                          "leave it out, or list what may be chosen under budget.schemes in a recipe")
    return made
