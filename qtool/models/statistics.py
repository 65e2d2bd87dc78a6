"""Running a block on the stream: what its linears receive, and what comes out.

The Hessian of a linear with inputs x [T, K] is the mean of x xᵀ. Linears that receive the same tensor (q/k/v, gate/up)
share one; which do is found while running, not looked up. Products are taken in the compute type and accumulated in
float32, lower triangle only, mirrored once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.errors import CalibrationError, NumericalError
from qtool.models.blocks import BlockArguments
from qtool.models.experts import SplitExperts
from qtool.models.streams import LOOK, StreamStore, refuse_overflow
from qtool.moments import HeldOut, add_gram, add_product, mirror, zeros
from qtool.tensors import CalibrationStats, all_finite

Floats = Callable[[slice, Sequence[str]], "Received | None"]
MIN_EXPERT_TOKENS = 32
EXPERT_COLUMNS_PER_TOKEN = 16  # an expert with fewer than K / 16 tokens has a Hessian of too low rank to be trusted


class _AllSeen(Exception):  # noqa: N818 - no error: every linear has received its input, the rest of the pass is not needed
    pass


@dataclass(frozen=True)
class Received:
    """What linears got on one batch. inputs: [tokens, K] by name.  residual: [tokens, N], what the output is added to
    of the linear whose residual was asked for."""

    inputs: Mapping[str, torch.Tensor]
    residual: torch.Tensor | None = None


@dataclass
class _Group:
    """Sums over the inputs of one set of linears; `names[0]` is the one that is measured.

    paired: over the fitting tokens whose input in the unquantized model is known, with their `cross` and `residual`;
    fit: the others.
    """

    names: list[str]
    fit: torch.Tensor
    held: HeldOut
    cross: torch.Tensor | None = None
    paired: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    tokens: int = 0
    paired_tokens: int = 0


class InputWatch:
    """Pre-hooks on the linears of a block that hand each new input to `measure`, once per shared input.

    beside: the path of another module, whose last input [tokens, width] is kept as `residual`.
    """

    def __init__(self, block: nn.Module, prefix: str, wanted: Sequence[str],
                 measure: Callable[[str, torch.Tensor], None], beside: str | None = None) -> None:
        self.residual: torch.Tensor | None = None
        self.leaders: dict[str, str] = {}  # linear -> the first linear that received the same tensor
        self.measure = measure
        self._wanted = set(wanted)
        self._seen: set[str] = set()
        self._inputs: dict[str, torch.Tensor] = {}
        self._handles = [module.register_forward_pre_hook(self._hook(f"{prefix}.{path}"))
                         for path, module in block.named_modules() if f"{prefix}.{path}" in self._wanted]
        if beside is not None:
            self._handles.append(block.get_submodule(beside).register_forward_pre_hook(self._keep))

    def run(self, *arguments: Any) -> None:
        """One forward pass, run_block(*arguments); it ends as soon as every linear has its input."""
        self._seen.clear()
        self._inputs.clear()
        self.residual = None
        with contextlib.suppress(_AllSeen):
            run_block(*arguments)

    def remove(self) -> None:
        self._inputs.clear()
        self.residual = None
        for handle in self._handles:
            handle.remove()
        del self.measure  # may refer to this watch, and in a circle its sums would be there until the collector comes

    def _all_seen(self) -> bool:
        """Whether every input has been measured; once it is known who shares one, the others need not be called."""
        if len(self.leaders) == len(self._wanted):
            return self._seen >= set(self.leaders.values())
        return len(self._seen) == len(self._wanted)

    def _keep(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.residual = inputs[0].reshape(-1, inputs[0].shape[-1])

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if name not in self.leaders:
                sharing = (other for other, known in self._inputs.items() if _same_input(x, known))
                self.leaders[name] = next(sharing, name)
            if self.leaders[name] == name:
                if len(self.leaders) < len(self._wanted):  # kept alive, so that no other tensor gets its address
                    self._inputs[name] = x
                if x.numel():
                    self.measure(name, x.reshape(-1, x.shape[-1]))
            self._seen.add(name)
            if self._all_seen():
                raise _AllSeen

        return hook


def _same_input(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or (left.data_ptr() == right.data_ptr() and left.shape == right.shape
                             and left.stride() == right.stride() and left.numel() > 0)


def collect(block: nn.Module, prefix: str, linears: Sequence[str], arguments: BlockArguments, index: int,
            store: StreamStore, batches: Iterable[slice], held_out: Iterable[int], device: torch.device,
            dtype: torch.dtype, floats: Floats | None = None,
            residual: str | None = None) -> dict[tuple[str, ...], CalibrationStats]:
    """Statistics of the inputs of `linears` (full names) of the block at path `prefix`, one per shared input.

    block: in `dtype` on `device`.  held_out: samples that are only measured, each batch is wholly of one kind.
    floats: gives what the same linears receive in the unquantized model for a batch (for some batches None); with it
    `cross` is measured too, and `residual` where it is known.  residual: the path in the block of the module whose
    input is what the output of the one linear is added to.
    Statistics are on `device`. Raises CalibrationError, NumericalError.
    """
    held_out = frozenset(held_out)
    held_tokens = len(held_out) * store.shape[1]
    experts = expert_prefixes(block, prefix)
    groups: dict[str, _Group] = {}
    clean: Received | None = None
    held = False

    def measure(name: str, x: torch.Tensor) -> None:
        if name not in groups:
            columns = x.shape[1]
            groups[name] = _Group([name], zeros(columns, x.device), HeldOut(columns, held_tokens < columns, x.device))
        off = None
        if clean is not None and clean.residual is not None and watch.residual is not None:
            off = clean.residual - watch.residual
        _add(groups[name], x, None if clean is None else clean.inputs.get(name), held, off)

    watch = InputWatch(block, prefix, linears, measure, residual)
    try:
        with torch.inference_mode():
            for batch in batches if linears else ():
                held = _is_held(batch, held_out)
                # of linears that share an input, one is enough; who does is known after the first batch
                leaders = sorted(set(watch.leaders.values())) or linears
                clean = floats(batch, leaders) if floats is not None else None
                watch.run(block, arguments, index, store, batch, device, dtype)
    finally:
        watch.remove()
    return _finish(groups, watch.leaders, linears, experts, device)


def received(block: nn.Module, prefix: str, linears: Sequence[str], arguments: BlockArguments, index: int,
             store: StreamStore, batch: slice, device: torch.device, dtype: torch.dtype,
             residual: str | None = None) -> Received:
    """What linears get on one batch; of those that share their input, only the first. Experts are left out.

    residual: see `collect`.
    """
    experts = expert_prefixes(block, prefix)
    found: dict[str, torch.Tensor] = {}
    wanted = [name for name in linears if not name.startswith(experts)] if experts else linears
    watch = InputWatch(block, prefix, wanted, found.__setitem__, residual)
    try:
        watch.run(block, arguments, index, store, batch, device, dtype)
        return Received(found, watch.residual)
    finally:
        watch.remove()


def expert_prefixes(block: nn.Module, prefix: str) -> tuple[str, ...]:
    """What the names of the linears inside experts begin with."""
    return tuple(f"{prefix}.{path}." for path, module in block.named_modules() if isinstance(module, SplitExperts))


def propagate(block: nn.Module, name: str, arguments: BlockArguments, index: int, store: StreamStore,
              batches: Iterable[slice], device: torch.device, dtype: torch.dtype) -> None:
    """Run the block on the stream and put its output in the stream's place. Raises NumericalError naming the block."""
    with torch.inference_mode():
        for batch in batches:
            output = run_block(block, arguments, index, store, batch, device, dtype)
            refuse_overflow(f"{name}: its output", output, store.dtype, batch)
            store.write(batch, output)


def run_block(block: nn.Module, arguments: BlockArguments, index: int, store: StreamStore, batch: slice,
              device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The hidden states [B, T, hidden] after block `index`, of the samples in `batch` as `store` has them before it."""
    # a copy, because what the block receives must not change when the stream is written
    return block_output(block, arguments, index, store.read(batch).to(device=device, dtype=dtype, copy=True))


def block_output(block: nn.Module, arguments: BlockArguments, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """The hidden states [B, T, hidden] after block `index`, whether it returns them alone or in a tuple."""
    args, kwargs = arguments.for_block(index, len(hidden))
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _is_held(batch: slice, held_out: frozenset[int]) -> bool:
    count = sum(sample in held_out for sample in range(batch.start, batch.stop))
    if count not in (0, batch.stop - batch.start):
        raise ValueError(f"batch {batch.start}..{batch.stop - 1} mixes held-out and fitting samples")
    return count > 0


def _add(group: _Group, x: torch.Tensor, x_float: torch.Tensor | None, held: bool,
         residual: torch.Tensor | None) -> None:
    """residual: r~ - r [T, N]."""
    if held:
        group.held.add(x, x_float, residual)
        return
    group.tokens += len(x)
    if x_float is None:
        add_gram(group.fit, x)
        return
    if group.paired is None or group.cross is None:
        group.paired, group.cross = zeros(x.shape[1], x.device), zeros(x.shape[1], x.device)
    group.paired_tokens += len(x)
    add_gram(group.paired, x)
    add_product(group.cross, x_float - x, x)
    if residual is not None:
        if group.residual is None:
            group.residual = zeros(x.shape[1], x.device, residual.shape[1])
        add_product(group.residual, residual, x)


def _finish(groups: dict[str, _Group], leaders: dict[str, str], linears: Sequence[str],
            experts: tuple[str, ...], device: torch.device) -> dict[tuple[str, ...], CalibrationStats]:
    """Means from sums; experts that saw too little get the statistics of all experts of their layer together."""
    routed = {name for name in linears if experts and name.startswith(experts)}
    missing = [name for name in linears if name not in leaders and name not in routed]
    if missing:
        raise CalibrationError(f"{missing[0]}: no calibration token reached this linear; leave it out with a rule "
                               f"(match: '{missing[0]}', skip: true)")
    for group in groups.values():
        _check_finite(group)
        group.names.clear()
    sharing = {_kind(name): _kind(leader) for name, leader in leaders.items() if name in routed}
    for name in linears:
        leader = leaders.get(name, name)
        if leader not in groups:  # an expert without tokens shares as the others of its layer do
            leader = name.removesuffix(_kind(name)) + sharing.get(_kind(name), _kind(name))
            groups.setdefault(leader, _Group([], torch.empty(0), HeldOut(0, True, device)))
        groups[leader].names.append(name)
    pools = {layer_kind: _pool(members) for layer_kind, members in _by_layer_and_kind(groups, routed).items()}
    return {tuple(group.names): _statistics(group, pools.get(_layer_kind(leader)) if leader in routed else None)
            for leader, group in groups.items()}


def _kind(name: str) -> str:
    """'...experts.3.up_proj' -> 'up_proj'."""
    return name.rpartition(".")[2]


def _layer_kind(name: str) -> tuple[str, str]:
    """'...experts.3.up_proj' -> ('...experts', 'up_proj'): the linears that may share pooled statistics."""
    expert, _, kind = name.rpartition(".")
    return expert.rpartition(".")[0], kind


def _by_layer_and_kind(groups: dict[str, _Group], routed: set[str]) -> dict[tuple[str, str], list[_Group]]:
    """The groups of experts to be pooled, for those layers and projections where one of them needs it."""
    members: dict[tuple[str, str], list[_Group]] = {}
    for leader, group in groups.items():
        if leader in routed:
            members.setdefault(_layer_kind(leader), []).append(group)
    any_held = any(group.held.tokens for group in groups.values())
    return {key: found for key, found in members.items()
            if any(_too_few(group) or (any_held and not group.held.tokens) for group in found)}


def _too_few(group: _Group) -> bool:
    return group.tokens < max(MIN_EXPERT_TOKENS, len(group.fit) // EXPERT_COLUMNS_PER_TOKEN)


def _check_finite(group: _Group) -> None:
    sums = [total.diagonal() for total in (group.fit, group.paired, group.cross) if total is not None]
    sums += [] if group.residual is None else [group.residual]
    if not (all(map(all_finite, sums)) and group.held.finite()):
        raise NumericalError(f"{group.names[0]}: its inputs on calibration text, or their squares, are not finite, "
                             f"though what enters the block is: a weight before it is too large; {LOOK[False]}")


def _pool(groups: list[_Group]) -> _Group:
    """The sums of several groups together. Raises CalibrationError when there is nothing to sum."""
    reached = [group for group in groups if group.tokens]
    if not reached:
        raise CalibrationError(f"{groups[0].names[0]}: no calibration token reached any expert of this layer; use more "
                               "calibration text")
    pool = _Group(["pool"], torch.zeros_like(reached[0].fit), reached[0].held.like())
    for group in groups:
        if group.tokens:
            pool.fit += group.fit
            pool.tokens += group.tokens
        pool.held.absorb(group.held)
    pool.fit = _mean(pool.fit, pool.tokens)
    pool.held.finish()
    return pool


def _statistics(group: _Group, pool: _Group | None) -> CalibrationStats:
    """Turns the sums of a group into means, in place; pooled matrices are shared between experts, never copied."""
    pooled = pool is not None and _too_few(group)
    paired = None
    if group.paired is not None:  # its tokens count as the others do; None again when there are no others
        group.fit += group.paired
        some = group.paired_tokens < group.tokens
        paired, group.paired = (_mean(group.paired, group.paired_tokens) if some else None), None
    hessian = pool.fit if pooled and pool is not None else _mean(group.fit, group.tokens)
    held_out = pool.held if pool is not None and (pooled or not group.held.tokens) else group.held.finish()
    return CalibrationStats(
        hessian=hessian, held_out=held_out, tokens=group.tokens, paired=paired, pooled=pooled,
        cross=None if group.cross is None else group.cross.div_(group.paired_tokens),
        residual=None if group.residual is None else group.residual.div_(group.paired_tokens))


def _mean(total: torch.Tensor, tokens: int) -> torch.Tensor:
    return mirror(total).div_(tokens)
