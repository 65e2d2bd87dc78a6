"""Part by part: what counts as a part, statistics behind quantized parts, and nothing computed twice."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from qtool.models import statistics, streams
from qtool.models.staged import Collected, Part, StagedBlock, Track, find_parts
from tests import tiny
from tests.models.loaded import CPU, LENGTH, SAMPLES, Loaded

BATCHES = [slice(0, 2), slice(2, 4), slice(4, 5)]
HELD_OUT = frozenset({4})
PREFIX = "model.layers.0"
ATTENTION = Part("self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", 2,
                 "input_layernorm")
MLP = Part("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 0, "post_attention_layernorm")
NORMED = [dataclasses.replace(part, residual=None) for part in (ATTENTION, MLP)]  # before they are added


class Run:
    """Block 0 of a tiny model on the stream."""

    def __init__(self, loaded: Loaded, ids: torch.Tensor) -> None:
        self.block = copy.deepcopy(loaded.block(0))  # the tests change its weights
        self.names = list(loaded.skeleton.block_linears(0))
        self.store, self.arguments = loaded.captured(ids, BATCHES)
        paths = [name.removeprefix(PREFIX + ".") for name in self.names]
        self.parts = self.find(*paths)

    def find(self, *paths: str) -> tuple[Part, ...]:
        return find_parts(self.block, paths, lambda: statistics.run_block(
            self.block, self.arguments, 0, self.store, BATCHES[-1], CPU, torch.float32))

    def collect(self, names: list[str], batches: Iterator[slice], _residual: str | None = None) -> Collected:
        return statistics.collect(self.block, PREFIX, names, self.arguments, 0, self.store, batches, HELD_OUT, CPU,
                                  torch.float32)

    def staged(self, keep: bool) -> StagedBlock:
        return StagedBlock([Track(self.block, new_store if keep else None)], PREFIX, self.parts, BATCHES)

    def coarsen(self, names: tuple[str, ...]) -> None:
        """What a solver does: the weights change."""
        with torch.no_grad():
            for name in names:
                weight = self.block.get_submodule(name.removeprefix(PREFIX + ".")).weight
                weight.copy_((weight * 16).round() / 16)


def new_store(_what: str, width: int) -> streams.StreamStore:
    return streams.StreamStore(SAMPLES, LENGTH, width, torch.float32, 1 << 30)


@pytest.mark.parametrize(("family", "expected"), [
    ("llama", (ATTENTION, MLP)), ("qwen2", (ATTENTION, MLP)), ("qwen3", (ATTENTION, MLP)), ("gemma3", tuple(NORMED)),
    ("mixtral", (ATTENTION,)), ("qwen3_moe", (ATTENTION,)),
    ("gemma2", ()),  # its attention returns more than one tensor, and the MLP comes after it
])
def test_parts(checkpoint, ids, family, expected):
    assert Run(checkpoint(family), ids).parts == expected


class Parallel(torch.nn.Module):
    """Two parts on one input, whose results are added up before they are added to it; in place, as Falcon does it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.first = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        self.second = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.norm(hidden)
        result, other = self.second(inner), self.first(inner)
        result += other
        return hidden + result


@torch.no_grad()
def test_what_nothing_is_added_to_alone_is_not_followed() -> None:
    block, paths = Parallel(), ["first.0", "first.1", "second.0", "second.1"]
    parts = find_parts(block, paths, lambda: block(torch.randn(2, 3, 8)))
    assert [(part.path, part.residual) for part in parts] == [("second", None), ("first", None)]
    for path in ("first.1", "second.1"):  # now any r is r + result
        block.get_submodule(path).weight.zero_()
        block.get_submodule(path).bias.zero_()
    assert [part.residual for part in find_parts(block, paths, lambda: block(torch.randn(2, 3, 8)))] == [None, None]


def test_a_part_needs_a_solved_tail(checkpoint, ids):
    run = Run(checkpoint("llama"), ids)
    assert run.find("mlp.down_proj") == (dataclasses.replace(MLP, inner=()),)
    assert run.find("self_attn.q_proj", "mlp.down_proj") == ()  # what the MLP receives would still change
    run.block.mlp.register_forward_hook(lambda _module, _inputs, output: output * 1.0)
    assert run.find("mlp.down_proj") == ()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_each_linear_sees_the_solved_ones_before_it(checkpoint, ids, family, keep):
    """Against a block whose earlier linears are changed by hand, one full pass for each item."""
    run, plain = Run(checkpoint(family), ids), Run(checkpoint(family), ids)
    staged = run.staged(keep)
    collected: list[str] = []
    for item in staged.collect(run.names, run.collect):
        expected = plain.collect(run.names, iter(BATCHES))
        for names, found in item.items():
            collected += names
            torch.testing.assert_close(found.hessian, expected[names].hessian, rtol=1e-3, atol=1e-4)
            weight = torch.eye(len(found.hessian))
            assert found.held_out.energy(weight) == pytest.approx(expected[names].held_out.energy(weight), rel=1e-3)
            assert found.tokens == expected[names].tokens
        for names in item:
            run.coarsen(names)
            plain.coarsen(names)
    assert sorted(collected) == sorted(run.names)
    for one, batches in ((run, staged.each()), (plain, iter(BATCHES))):
        statistics.propagate(one.block, PREFIX, one.arguments, 0, one.store, batches, CPU, torch.float32)
    whole = slice(0, SAMPLES)
    torch.testing.assert_close(run.store.read(whole), plain.store.read(whole), rtol=1e-4, atol=1e-5)


def test_no_product_is_computed_twice(checkpoint, ids):
    run = Run(checkpoint("llama"), ids)
    calls: Counter[str] = Counter()
    for name in run.names:
        module = run.block.get_submodule(name.removeprefix(PREFIX + "."))
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: calls.update([name]))
    staged = run.staged(keep=True)
    for item in staged.collect(run.names, run.collect):
        item.clear()
    statistics.propagate(run.block, PREFIX, run.arguments, 0, run.store, staged.each(), CPU, torch.float32)
    # only the first batch computes what its pass does not need: who shares an input is not known before
    first = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    assert calls == {name: len(BATCHES) + (name.removeprefix(PREFIX + ".") in first) for name in run.names}

def test_the_unquantized_model_goes_beside(checkpoint, ids):
    """cross at every linear is against its input in the original block on the original stream, and what the outputs of
    the last of a part are added to against what they are added to there."""
    run, original = Run(checkpoint("llama"), ids), Run(checkpoint("llama"), ids)
    run.store.write(slice(0, SAMPLES), run.store.read(slice(0, SAMPLES)) * 0.9)
    tracks = [Track(run.block, new_store), Track(original.block, new_store)]
    staged = StagedBlock(tracks, PREFIX, run.parts, BATCHES)

    def inputs(side: Run, names: list[str], batch: slice, residual: str | None = None) -> statistics.Received:
        return statistics.received(side.block, PREFIX, names, side.arguments, 0, side.store, batch, CPU, torch.float32,
                                   residual)

    def collect(names: list[str], batches: Iterator[slice], residual: str | None) -> Collected:
        return statistics.collect(run.block, PREFIX, names, run.arguments, 0, run.store, batches, HELD_OUT, CPU,
                                  torch.float32, lambda batch, wanted: inputs(original, list(wanted), batch, residual),
                                  residual)

    def added_to(side: Run, name: str, batch: slice) -> torch.Tensor:
        """The block's entrance, or that with the output of its attention."""
        entrance, found = side.store.read(batch), []
        handle = side.block.self_attn.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
        statistics.run_block(side.block, side.arguments, 0, side.store, batch, CPU, torch.float32)
        handle.remove()
        return (entrance + found[0] * name.endswith("down_proj")).flatten(0, 1)

    still = Run(checkpoint("llama"), ids)
    changing = Run(checkpoint("llama"), ids)
    changing.store.copy_from(run.store, BATCHES)
    for item in staged.collect(run.names, collect):
        for names, found in item.items():
            pairs = [tuple(inputs(side, list(names), batch).inputs[names[0]] for side in (still, changing))
                     for batch in BATCHES[:2]]
            clean, x = torch.cat([left for left, _ in pairs]), torch.cat([right for _, right in pairs])
            torch.testing.assert_close(found.cross, (clean - x).T @ x / len(x), rtol=1e-3, atol=1e-4)
            if names[0].endswith(("o_proj", "down_proj")):
                off = torch.cat([added_to(still, names[0], batch) - added_to(changing, names[0], batch)
                                 for batch in BATCHES[:2]])
                torch.testing.assert_close(found.residual, off.T @ x / len(x), rtol=1e-3, atol=1e-4)
                assert found.held_out.knows_residual
            else:
                assert found.residual is None and not found.held_out.knows_residual
        for names in item:
            run.coarsen(names)
            changing.coarsen(names)


def test_a_block_that_is_done_with_is_freed_at_once(checkpoint, ids):
    run = Run(checkpoint("llama"), ids)
    track = Track(run.block, new_store)
    for item in StagedBlock([track], PREFIX, run.parts, BATCHES).collect(run.names, run.collect):
        item.clear()
    track.restore()
    watched = weakref.ref(run.block)
    gc.disable()
    try:
        del run.block, track
        assert watched() is None
    finally:
        gc.enable()


def test_a_failed_pass_leaves_no_hook(checkpoint, ids):
    run = Run(checkpoint("llama"), ids)
    with torch.no_grad():
        run.block.self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(statistics.NumericalError):
        for item in run.staged(keep=True).collect(run.names, run.collect):
            item.clear()
    assert not any(module._forward_pre_hooks for module in run.block.modules())
