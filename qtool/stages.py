"""What a run writes, in order: every tensor of the output, with the block that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from qtool import formats, found, grids
from qtool.models.skeleton import Skeleton
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, TensorSpec

Placed = Callable[[TensorSpec], TensorSpec]  # how a tensor that stays dense lies in the output


@dataclass(frozen=True)
class LinearPlan:
    """One linear [N, K] that will be quantized; `stored` is its name in the checkpoint and in the output.

    block: -1 of an embedding or the head, which lie outside of the blocks.
    """

    name: str
    stored: str
    shape: tuple[int, int]
    scheme: Scheme
    block: int

    def refused(self, format_: ModuleType, scheme: Scheme) -> str | None:
        """Why a format cannot hold it so, or None; it is called as rules call it."""
        reason = format_.check(scheme, self.stored, self.shape)
        return reason.replace(self.stored, self.name) if reason else None


@dataclass(frozen=True)
class Stage:
    """What is done and recorded as one: the tensors before the blocks, each block, the tensors after them.

    done: the linears, by name, whose codes are in the checkpoint already (redo.py); they are run, not solved.
    """

    name: str
    block: int | None
    linears: tuple[LinearPlan, ...]
    copied: tuple[str, ...]  # checkpoint tensors that go over as they are
    outputs: tuple[TensorSpec, ...]
    attention: str | None = None  # the module, by its stored name, whose keys and values get scales
    outside: tuple[LinearPlan, ...] = ()  # embeddings and head, where a format holds them quantized; without text
    done: frozenset[str] = frozenset()

    @property
    def todo(self) -> tuple[LinearPlan, ...]:
        return tuple(linear for linear in self.linears if linear.name not in self.done)


@dataclass(frozen=True)
class Layout:
    """How tensors are stored, whatever the schemes of the linears are.

    specs: of the checkpoint, by name.  dtype: the model's, in which tensors that stay dense are written if `convert`.
    attentions: for each block the stored name of the module whose keys and values get scales; empty: none do.
    """

    skeleton: Skeleton
    specs: Mapping[str, TensorSpec]
    format: ModuleType
    dtype: torch.dtype
    convert: bool
    attentions: tuple[str, ...]

    def stages(self, linears: Sequence[LinearPlan], outside: Sequence[LinearPlan] = ()) -> tuple[Stage, ...]:
        """Sort every parameter into before, block i, after; the order of the output file."""
        bones = self.skeleton
        by_block: list[list[LinearPlan]] = [[] for _ in bones.blocks]
        for linear in linears:
            by_block[linear.block].append(linear)
        quantized = {linear.name + ".weight" for linear in linears}
        apart = {linear.name + ".weight": linear for linear in outside}
        around: dict[int, list[LinearPlan]] = {-1: [], len(bones.blocks): []}
        copied: dict[int, list[str]] = {index: [] for index in range(-1, len(bones.blocks) + 1)}
        seen_block = False
        for name in bones.parameters:
            place = next((i for i, prefix in enumerate(bones.blocks) if name.startswith(prefix + ".")), None)
            seen_block = seen_block or place is not None
            if place is None:
                place = len(bones.blocks) if seen_block else -1
            if name in apart:
                around[place].append(apart[name])
            elif name not in quantized and name not in bones.tied:
                copied[place].append(bones.source(name))
        placed = formats.placing(self.format, [one.stored for here in by_block for one in here])
        stages = [self._around("before", copied[-1], around[-1], placed)]
        for index, here in enumerate(by_block):
            attention = self.attentions[index] if self.attentions else None
            specs = self._outputs(copied[index], here, attention, placed)
            stages.append(Stage(f"block {index}", index, tuple(here), tuple(copied[index]), specs, attention))
        return (*stages, self._around("after", copied[len(by_block)], around[len(by_block)], placed))

    def _around(self, name: str, copied: list[str], outside: list[LinearPlan], placed: Placed) -> Stage:
        outputs = self._outputs(copied, outside, None, placed)
        return Stage(name, None, (), tuple(copied), outputs, outside=tuple(outside))

    def bytes_beside(self, linears: Sequence[LinearPlan]) -> int:
        """Bytes in the output of all tensors but the weights of `linears`."""
        sizes = {spec.name: spec.nbytes for stage in self.stages([]) for spec in stage.outputs}
        return sum(sizes.values()) - sum(sizes[one.stored + ".weight"] for one in linears)

    def _outputs(self, names: list[str], linears: list[LinearPlan], attention: str | None,
                 placed: Placed) -> tuple[TensorSpec, ...]:
        specs = [spec for one in linears
                 for spec in self.format.layout(one.stored, one.shape, one.scheme, self.dtype)]
        specs += self.format.kv_scales(attention) if attention else []
        for name in names:
            spec = self.specs[name]
            dense = self.convert and spec.dtype in FLOATING
            specs.append(placed(TensorSpec(name, self.dtype, spec.shape) if dense else spec))
        return tuple(specs)


def same_scheme(linears: list[LinearPlan]) -> list[list[LinearPlan]]:
    """Linears that can be solved as one stacked matrix."""
    groups: dict[str, list[LinearPlan]] = {}
    for linear in linears:
        joint = found.load("grids", linear.scheme.grid).JOINT
        groups.setdefault(linear.scheme.model_dump_json() if joint else linear.name, []).append(linear)
    return list(groups.values())


def shared_inputs(stage: Stage) -> list[list[LinearPlan]]:
    """The linears that will probably share their input: those that engines run as one matrix. Which really do is found
    while running."""
    groups: dict[str, list[LinearPlan]] = {}
    for linear in stage.linears:
        groups.setdefault(formats.fused_name(linear.name), []).append(linear)
    return list(groups.values())


def one_scale(linears: Iterable[LinearPlan]) -> list[list[LinearPlan]]:
    """Without statistics each linear is solved alone, but those that engines run as one share a scale of the whole."""
    groups: dict[str, list[LinearPlan]] = {}
    for linear in linears:
        together = grids.has_whole_scale(linear.scheme)
        whole = formats.fused_name(linear.name) if together else linear.name
        groups.setdefault(f"{whole} {linear.scheme.label}", []).append(linear)
    return list(groups.values())
