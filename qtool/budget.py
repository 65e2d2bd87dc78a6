"""A budget of bits or bytes: which schemes each linear may take, what each costs, and what can be reached at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from qtool import allocate, found
from qtool.errors import PlanError
from qtool.formats import fused_sets, stored_bytes
from qtool.recipe import Overrides, Recipe, Scheme
from qtool.units import size

if TYPE_CHECKING:
    from qtool.stages import LinearPlan

WIDTHS = (2, 3, 4, 8)
GROUPS = (128, 64, 32)
MEASURED = 0.25  # of the sequences of a search: what the losses are taken from, the rest is for the solver


@dataclass(frozen=True)
class Choice:
    """Linears that share a scheme, because engines fuse them; `bytes` of all of them with each of `schemes`."""

    linears: tuple[str, ...]
    weights: int
    schemes: tuple[Scheme, ...]
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """What is to be decided. limit, fixed: bytes that all quantized linears may take; those of them with a rule."""

    choices: tuple[Choice, ...]
    limit: int
    fixed: int
    weights: int

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that may be chosen somewhere, by bits and then from large groups to small ones."""
        every = dict.fromkeys(scheme for choice in self.choices for scheme in choice.schemes)
        return tuple(sorted(every, key=lambda scheme: (scheme.bits, -(int(scheme.group_size) % (1 << 30)))))

    @property
    def most_candidates(self) -> int:
        """The most schemes that one linear may take."""
        return max(len(choice.schemes) for choice in self.choices)

    @property
    def least(self) -> int:
        return self.fixed + sum(min(choice.bytes) for choice in self.choices)

    @property
    def most(self) -> int:
        return self.fixed + sum(max(choice.bytes) for choice in self.choices)

    def choose(self, losses: Mapping[str, Mapping[str, float]]) -> dict[str, Scheme]:
        """The scheme of each linear with the least total of losses[linear][label of a scheme]."""
        groups = [[(count, sum(losses[name][scheme.label] for name in choice.linears))
                   for scheme, count in zip(choice.schemes, choice.bytes, strict=True)] for choice in self.choices]
        picked = allocate.choose(groups, self.limit, self.fixed)
        return {name: choice.schemes[index] for choice, index in zip(self.choices, picked, strict=True)
                for name in choice.linears}

    def guess(self) -> dict[str, Scheme]:
        """An allocation for the plan, as if all weights were equally sensitive: an error of 4^-bits."""
        return self.choose({name: {scheme.label: choice.weights * 4.0 ** (-8 * count / choice.weights)
                                   for scheme, count in zip(choice.schemes, choice.bytes, strict=True)}
                            for choice in self.choices for name in choice.linears})

    def to_json(self) -> dict[str, Any]:
        return {"schemes": [scheme.label for scheme in self.schemes], "limit_bytes": self.limit,
                "least_bits": _bits(self.least, self.weights), "most_bits": _bits(self.most, self.weights)}


def pose(recipe: Recipe, format_: ModuleType, model_dtype: torch.dtype, linears: Sequence[LinearPlan],
         other_bytes: int) -> Problem:
    """The problem that the recipe's budget sets; other_bytes: of all tensors but those of `linears`.

    Raises PlanError where the budget cannot be met, with what can.
    """
    budget = recipe.budget
    assert budget is not None
    free = [one for one in linears if recipe.scheme_for(one.name)[1] is None]
    if not free:
        raise PlanError("budget: every linear has its scheme from a rule, so there is nothing to choose; remove the "
                        "budget or a rule")
    weights = _weights(linears)
    limit = int(budget.bits * weights / 8) if budget.bits is not None else (budget.size or 0) - other_bytes
    settled = [one for one in linears if recipe.scheme_for(one.name)[1] is not None]
    _refuse_auto([one.scheme for one in settled])
    fixed = sum(stored_bytes(format_, one.stored, one.shape, one.scheme, model_dtype) for one in settled)
    schemes = _candidates(recipe, format_, 8 * (limit - fixed) / _weights(free))
    _refuse_auto(schemes)
    by_name = {one.name: one for one in free}
    sets = [[by_name[name] for name in names] for names in fused_sets(by_name)]
    choices = tuple(_choice(members, schemes, format_, model_dtype, bool(budget.schemes)) for members in sets)
    problem = Problem(choices, limit, fixed, weights)
    _refuse_unused(problem, schemes, format_, free, bool(budget.schemes))
    _refuse_out_of_reach(problem, recipe, other_bytes)
    return problem


def _refuse_auto(schemes: Sequence[Scheme]) -> None:
    if any(scheme.group_size == "auto" for scheme in schemes):
        raise PlanError("budget: group_size auto has no size to count with; give numbers in schemes and rules")


def _candidates(recipe: Recipe, format_: ModuleType, bits: float) -> list[Scheme]:
    """The recipe's list, or integers of the width that fits `bits` and of the next ones, in all group sizes."""
    assert recipe.budget is not None
    listed: Sequence[Overrides] = recipe.budget.schemes
    if not listed:
        if recipe.scheme.grid != "affine":
            raise PlanError(f"budget: what may be chosen beside {recipe.scheme.label} is not obvious; list the schemes "
                            "under budget.schemes, e.g. schemes: [{grid: nvfp4, group_size: 16}, {grid: fp8}]")
        middle = max((place for place, width in enumerate(WIDTHS) if width + 16 / GROUPS[0] <= bits), default=0)
        listed = [Overrides(bits=width, group_size=group)
                  for width in WIDTHS[max(middle - 1, 0):middle + 2] for group in GROUPS]
    schemes = [one.apply(recipe.scheme) for one in listed]
    labels = [scheme.label for scheme in schemes]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise PlanError(f"budget.schemes has {twice} twice; leave one out")
    reason = next(filter(None, (found.load("grids", scheme.grid).check(scheme) for scheme in schemes)), None) \
        or format_.check_together(dict(zip(labels, schemes, strict=True)))
    if reason:
        raise PlanError(f"budget: {reason}")
    return schemes


def _choice(members: Sequence[LinearPlan], schemes: Sequence[Scheme], format_: ModuleType, model_dtype: torch.dtype,
            listed: bool) -> Choice:
    legal = [scheme for scheme in (_settled(one, members) for one in schemes)
             if all(_reason(scheme, one, format_) is None for one in members)]
    if not listed:  # of 8 bits the largest groups are enough
        legal = [scheme for place, scheme in enumerate(legal)
                 if scheme.bits < 8 or not any(before.bits == 8 for before in legal[:place])]
    if not legal:
        worst = next(one for one in members if _reason(_settled(schemes[0], members), one, format_))
        raise PlanError(f"budget: none of {', '.join(scheme.label for scheme in schemes)} fits {worst.name}: "
                        f"{_reason(_settled(schemes[0], members), worst, format_)}; add a scheme under budget.schemes, "
                        "or a rule for this linear")
    sizes = {scheme: sum(stored_bytes(format_, one.stored, one.shape, scheme, model_dtype) for one in members)
             for scheme in legal}
    ordered = sorted(sizes, key=lambda scheme: sizes[scheme])
    return Choice(tuple(one.name for one in members), _weights(members), tuple(ordered),
                  tuple(sizes[scheme] for scheme in ordered))


def _settled(scheme: Scheme, members: Sequence[LinearPlan]) -> Scheme:
    """group_size auto: the largest that divides the inputs of all; 32 where none does, to be refused as that."""
    if scheme.group_size != "auto":
        return scheme
    fits = [group for group in GROUPS if all(one.shape[1] % group == 0 for one in members)]
    return scheme.model_copy(update={"group_size": (fits or GROUPS[-1:])[0]})


def _reason(scheme: Scheme, linear: LinearPlan, format_: ModuleType) -> str | None:
    """Why a linear cannot be stored so; None when it can."""
    columns = linear.shape[1]
    if scheme.group_size != -1 and columns % int(scheme.group_size):
        return f"group size {scheme.group_size} does not divide its {columns} input columns"
    return linear.refused(format_, scheme)


def _refuse_unused(problem: Problem, schemes: Sequence[Scheme], format_: ModuleType, linears: Sequence[LinearPlan],
                   listed: bool) -> None:
    for scheme in schemes if listed else ():
        if scheme.group_size != "auto" and scheme not in problem.schemes:
            raise PlanError(f"budget.schemes: {scheme.label} fits no linear: {_reason(scheme, linears[0], format_)}; "
                            "leave it out")


def _refuse_out_of_reach(problem: Problem, recipe: Recipe, other_bytes: int) -> None:
    assert recipe.budget is not None
    if problem.least <= problem.limit <= problem.most / allocate.FILL:
        return
    labels = ", ".join(scheme.label for scheme in problem.schemes)
    if recipe.budget.bits is not None:
        wanted, unit = f"{recipe.budget.bits:g} bits", "bits per quantized weight, scales included"
        least, most = (f"{_bits(count, problem.weights):.4f}" for count in (problem.least, problem.most))
    else:
        wanted, unit = size(recipe.budget.size or 0), f"in all, {size(other_bytes)} of it for what is not quantized"
        least, most = (f"{(count + other_bytes) / 1e6:,.3f} MB" for count in (problem.least, problem.most))
    raise PlanError(f"budget: {wanted} cannot be met; with {labels} this model takes {least} to {most} {unit}; choose "
                    "a budget in that range, or other schemes under budget.schemes")


def _bits(count: int, weights: int) -> float:
    return round(8 * count / weights, 4)


def _weights(linears: Sequence[LinearPlan]) -> int:
    return sum(one.shape[0] * one.shape[1] for one in linears)
