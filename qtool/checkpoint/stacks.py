"""Tensors that lie in a file as one: the linears of all experts of a kind as [experts, ...], as mlx-lm runs them.

Everywhere but in the files each expert has a tensor of its own, whose spec names the stack and its number there. What
lies in a stack lies there one after the other, so a part is written, read and compared at its own place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby

import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import CheckpointError, PlanError
from qtool.tensors import TensorSpec

MAX_PARTS = 1 << 19
Members = Callable[[TensorSpec], list[str]]  # of a tensor in a file: the names of its parts; none if it is no stack


def units(specs: Iterable[TensorSpec]) -> list[list[TensorSpec]]:
    """What must lie together: the parts of a stack by their numbers, where its first one is; others alone.

    Raises PlanError for a stack with parts missing, twice, or of several dtypes or shapes.
    """
    found: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        found.setdefault(spec.stored, []).append(spec)
    for name, unit in found.items():
        unit.sort(key=_number)
        if unit[0].stack is not None and [_number(one) for one in unit] != list(range(len(unit))):
            raise PlanError(f"'{name}' would hold the experts {[_number(one) for one in unit][:8]}, not all of them or "
                            "some twice; give all experts of a layer one scheme")
        if len({(one.dtype, one.shape) for one in unit}) > 1:
            raise PlanError(f"'{name}' would hold experts of several types or shapes; give all experts of a layer one "
                            "scheme")
    return list(found.values())


def entries(specs: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    """The tensors as the header of a file names them, of their parts in the order of the file."""
    for name, group in groupby(specs, key=lambda one: one.stored):
        unit = list(group)
        stacked = unit[0].stack is not None
        yield TensorSpec(name, unit[0].dtype, (len(unit), *unit[0].shape)) if stacked else unit[0]


def parts(spec: TensorSpec, members: Members) -> list[TensorSpec]:
    """The parts of a tensor in a file; itself if it is no stack, or an empty one, which may claim any number."""
    names = members(spec) if spec.nbytes else []
    return [TensorSpec(name, spec.dtype, spec.shape[1:], (spec.name, number)) for number, name in enumerate(names)] \
        or [spec]


def unstacked(checkpoint: Checkpoint, members: Members) -> Checkpoint:
    """The checkpoint with the parts of its stacks as tensors of their own; itself where it has none.

    Of a part all rows are read, also for a few. Raises CheckpointError for one that is there twice, and for too many.
    """
    specs: dict[str, TensorSpec] = {}
    for one in (one for spec in checkpoint.specs.values() for one in parts(spec, members)):
        if len(specs) >= MAX_PARTS:
            raise CheckpointError(f"{checkpoint.origin}: its tensors claim to hold more than {MAX_PARTS} parts, more "
                                  "than any model has; fetch the model again")
        if one.name in specs:
            raise CheckpointError(f"{checkpoint.origin}: '{one.name}' is there twice, in '{specs[one.name].stored}' "
                                  f"and in '{one.stored}'; fetch the model again")
        specs[one.name] = one
    if all(one.stack is None for one in specs.values()):
        return checkpoint

    def fetch(name: str, start: int | None, stop: int | None) -> torch.Tensor:
        stack = specs[name].stack
        if stack is None:
            return checkpoint.fetch(name, start, stop)
        return checkpoint.fetch(stack[0], stack[1], stack[1] + 1)[0][start:stop]

    return replace(checkpoint, specs=dict(sorted(specs.items())), fetch=fetch)


def _number(spec: TensorSpec) -> int:
    return spec.stack[1] if spec.stack is not None else 0
