"""From the flags of `qtool quantize` to a recipe."""

from __future__ import annotations

from typing import Any

from qtool.errors import RecipeError


def bits_or_budget(bits: float | None, budget: str | None) -> tuple[int | float | None, str | None]:
    """(bits of a code, budget): bits with a fraction are a budget."""
    if bits is not None and budget is not None:
        raise RecipeError(f"--bits {bits:g} and --budget {budget} both say how many bits; give one of them")
    return (bits, budget) if bits is None else (int(bits), None) if bits.is_integer() else (None, f"{bits}")


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


def to_recipe(method: str | None, name: str | None, typed: dict[str, tuple[str, Any]], settings: list[str]) -> Any:
    """Method preset or recipe, then the flags, then --set."""
    from qtool import recipe

    if method and name:
        raise RecipeError(f"--method {method} and --recipe {name} both say how to quantize; give one of them")
    made = recipe.load(name) if name else recipe.preset(method or "gptq")
    for flag, (key, value) in typed.items():
        if value is not None:
            made = recipe.override(made, {key: value}, flag)
    changes = dict(recipe.parse_setting(setting) for setting in settings)
    made = recipe.override(made, changes) if changes else made
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
