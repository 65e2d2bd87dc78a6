"""A block solved part by part, each part on the outputs of the quantized parts before it.

Attention ends in a linear (o_proj), an MLP too (down_proj). Such a *part* is done in two passes of the block: one that
ends when its inner linears have their input, and, with these solved, one that ends at its last linear, whose inputs
are kept. From then on the part needs no more computing than that linear: its forward is replaced by the kept inputs
times the solved weight. So every product is computed once, with quantized weights, and the statistics of each linear
see the error of all linears before it, also of its own block. Linears outside such parts (experts) are collected
at the end, in one pass with their original weights; a part that comes after one of them is treated likewise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qtool.models.experts import SplitExperts
from qtool.models.streams import StreamStore, refuse_overflow
from qtool.tensors import CalibrationStats

Collected = dict[tuple[str, ...], CalibrationStats]
Collect = Callable[[Sequence[str], Iterator[slice], str | None], Collected]  # linears, batches, a part's residual
NewStore = Callable[[str, int], StreamStore]  # what for, width -> a store that may be used again for the next block


@dataclass(frozen=True)
class Part:
    """A submodule (path in the block) that returns what its linear `tail` gives, in a tuple of `results` if not 0.

    inner: its other linears that are quantized. All of them are called once, with inputs [samples, tokens, width].
    residual: the module outside of the part that receives just what the block adds the part's result to, if one does.
    """

    path: str
    inner: tuple[str, ...]
    tail: str
    results: int
    residual: str | None = None


def find_parts(block: nn.Module, linears: Sequence[str], run: Callable[[], Any]) -> tuple[Part, ...]:
    """Watch one forward pass, `run()`, of a block; `linears` are the paths in it that will be quantized."""
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    returned: dict[str, list[Any]] = {}
    results: dict[str, torch.Tensor] = {}  # of linears
    entered: list[tuple[str, Any]] = []  # each module when it is called, with its first argument

    def watch_linear(path: str) -> Callable[..., None]:
        def add(_module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            calls.append((path, inputs[0], output))
            results[path] = output.clone()  # a block may add to it in place
        return add

    def watch_entry(path: str) -> Callable[..., None]:
        def add(_module: nn.Module, inputs: Any) -> None:
            tensor = inputs[0] if inputs else None
            entered.append((path, tensor.clone() if isinstance(tensor, torch.Tensor) else None))
        return add

    def watch_module(path: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: returned.setdefault(path, []).append(output)

    handles = [module.register_forward_hook((watch_linear if isinstance(module, nn.Linear) else watch_module)(path))
               for path, module in block.named_modules() if path]
    handles += [module.register_forward_pre_hook(watch_entry(path))
                for path, module in block.named_modules() if path]
    try:
        entered.append(("", run()))
    finally:
        for handle in handles:
            handle.remove()
    parts: dict[str, Part] = {}
    for path, outputs in returned.items():  # inner modules return first
        part = _part(path, block.get_submodule(path), calls, outputs, linears)
        if part is not None:
            part = replace(part, residual=_residual(part, results[part.tail], entered))
            parts = {name: one for name, one in parts.items() if not name.startswith(path + ".")} | {path: part}
    return _in_order(list(parts.values()), [path for path, _, _ in calls if path in linears])


def _in_order(parts: list[Part], calls: list[str]) -> tuple[Part, ...]:
    """The parts as they follow each other, up to the first that depends on a linear outside all parts.

    What a part keeps is right only if nothing before it changes any more.
    """
    accepted: list[Part] = []
    members: set[str] = set()
    for part in sorted(parts, key=lambda part: calls.index(part.tail)):
        members |= {*part.inner, part.tail}
        if not members.issuperset(calls[:calls.index(part.tail)]):
            break
        accepted.append(part)
    return tuple(accepted)


def _part(path: str, module: nn.Module, calls: list[tuple[str, torch.Tensor, torch.Tensor]], outputs: list[Any],
          wanted: Sequence[str]) -> Part | None:
    inside = [call for call in calls if call[0].startswith(path + ".")]
    members = [f"{path}.{name}" for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if (len(outputs) != 1 or not inside or sorted(members) != sorted(name for name, _, _ in inside)
            or any(isinstance(part, SplitExperts) for part in module.modules())):
        return None
    tail, x, y = inside[-1]
    output = outputs[0]
    results = len(output) if isinstance(output, tuple) else 0
    first = output[0] if results else output
    if tail not in wanted or first is not y or x.dim() != 3 or any(one is not None for one in output[1:] if results):
        return None
    return Part(path, tuple(name for name in wanted if name in members and name != tail), tail, results)


def _residual(part: Part, result: torch.Tensor, entered: Sequence[tuple[str, Any]]) -> str | None:
    """The first module that receives an r such that r + result is what a later one receives, or the block returns.

    None also where the result is zero, so that nothing can be told from sums.
    """
    if not bool(result.any()):
        return None
    place = next(index for index, (path, _) in enumerate(entered) if path == part.tail)
    alike = [(index, path, one) for index, (path, one) in enumerate(entered)
             if isinstance(one, torch.Tensor) and one.shape == result.shape and one.dtype == result.dtype]
    sums = [one for index, _, one in alike if index > place]
    inside = (part.path, part.path + ".")
    for index, path, one in alike:
        if index < place and path != inside[0] and not path.startswith(inside[1]) \
                and any(torch.equal(one + result, other) for other in sums):
            return path
    return None


class Track:
    """A block on its way through its parts: those that are done need only what was kept of them."""

    def __init__(self, block: nn.Module, new_store: NewStore | None) -> None:
        self.block = block
        self.new_store = new_store  # None: keep nothing, compute again; right where products are cheaper than copies
        self.now = slice(0, 0)
        self.done: list[_Done] = []

    @contextlib.contextmanager
    def keeping(self, part: Part, name: str) -> Iterator[None]:
        """For a pass up to the last linear of a part, called `name`: keeps its inputs; afterwards the part's forward is
        replaced."""
        if self.new_store is None:
            yield
            return
        tail = self.block.get_submodule(part.tail)
        assert isinstance(tail, nn.Linear)
        inputs = self.new_store("inputs of " + part.path, tail.in_features)

        def keep(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            refuse_overflow(f"{name}: its input", args[0], inputs.dtype, self.now)
            inputs.write(self.now, args[0])

        handle = tail.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()
        done = _Done(self, part, tail, inputs)
        self.block.get_submodule(part.path).forward = done.forward  # type: ignore[method-assign]
        self.done.append(done)

    def restore(self) -> None:
        """Give the parts their own forward back; without it a block that is done with would refer to itself."""
        for one in self.done:
            del self.block.get_submodule(one.part.path).forward
        self.done.clear()


class StagedBlock:
    """Takes a block through its parts, on one track or, with the unquantized model beside it, on two.

    The caller solves the linears of the first track between the items of `collect`.
    """

    def __init__(self, tracks: Sequence[Track], prefix: str, parts: Sequence[Part], batches: Sequence[slice]) -> None:
        self.tracks, self.prefix, self.parts, self.batches = tracks, prefix, parts, batches

    def collect(self, linears: Sequence[str], collect: Collect) -> Iterator[Collected]:
        """Statistics of `linears` (full names), part by part; each item must be solved before the next is asked for."""
        rest = list(linears)
        for part in self.parts:
            tail = f"{self.prefix}.{part.tail}"
            inner = [f"{self.prefix}.{name}" for name in part.inner]
            if inner:
                yield self._pass(inner, collect)
            with contextlib.ExitStack() as stack:
                for track in self.tracks:
                    stack.enter_context(track.keeping(part, tail))
                stats = self._pass([tail], collect, part.residual)
            yield stats
            del stats
            rest = [name for name in rest if name != tail and name not in inner]
        if rest:
            yield self._pass(rest, collect)

    def each(self, batches: Sequence[slice] | None = None) -> Iterator[slice]:
        """The batches (or those given), for the pass that is beginning."""
        for batch in self.batches if batches is None else batches:
            for track in self.tracks:
                track.now = batch
            yield batch

    def _pass(self, names: Sequence[str], collect: Collect, residual: str | None = None) -> Collected:
        done = [one for track in self.tracks for one in track.done]
        for one in done:
            one.save = True
        stats = collect(names, self.each(), residual)
        for one in done:
            one.saved, one.save = True, False
        return stats


class _Done:
    """Stands in for the forward of a part whose linears are all solved."""

    def __init__(self, track: Track, part: Part, tail: nn.Linear, inputs: StreamStore) -> None:
        self.track, self.part, self.tail, self.inputs = track, part, tail, inputs
        self.outputs = inputs if tail.in_features == tail.out_features else None
        self.save = self.saved = False

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        result = self._result()
        return (result, *[None] * (self.part.results - 1)) if self.part.results else result

    def _result(self) -> torch.Tensor:
        batch, weight = self.track.now, self.tail.weight
        if self.saved and self.outputs is not None:
            return self.outputs.read(batch).to(device=weight.device, dtype=weight.dtype, copy=True)
        result = self.tail(self.inputs.read(batch).to(device=weight.device, dtype=weight.dtype))
        if self.save:
            if self.outputs is None and self.track.new_store is not None:
                self.outputs = self.track.new_store("outputs of " + self.part.path, self.tail.out_features)
            if self.outputs is not None:
                self.outputs.write(batch, result)
        return result
