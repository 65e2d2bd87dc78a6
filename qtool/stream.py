"""The calibration run seen from one block: the stream at its entrance, its statistics, the stream at its exit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtool.activations import static_scale
from qtool.errors import CalibrationError
from qtool.layer import Survey
from qtool.models import blocks, folds, inputs, kv, statistics
from qtool.models.calibration import CalibrationTokens
from qtool.models.staged import Collected, Part, StagedBlock, Track, find_parts
from qtool.models.streams import StreamStore, batches_for
from qtool.plan import Plan
from qtool.stages import Stage
from qtool.tensors import any_number
from qtool.workspace import Workspace

RANGE_TOKENS = 2048  # that a static scale of integers is chosen on
TRIAL_TOKENS = 1024  # that a change to a block is tried on


@dataclass(frozen=True)
class Ranges:
    """Calibrated scales of activations. inputs: [1] by the name of the linear.  kv: float32 [2], of keys and values."""

    inputs: dict[str, torch.Tensor]
    kv: torch.Tensor | None


@dataclass
class Stream:
    """The activations on their way through the blocks, quantized and (for an asymmetric target) unquantized."""

    plan: Plan
    folder: Path
    stores: list[StreamStore]
    arguments: blocks.BlockArguments
    batches: list[slice]
    held_out: frozenset[int]
    paired: frozenset[int]  # samples that run through the unquantized model too
    _kept: dict[tuple[str, str, int], StreamStore] = field(default_factory=dict)
    _parts: dict[tuple[tuple[str, str], ...], tuple[Part, ...]] = field(default_factory=dict)
    _folds: dict[Any, list[folds.Fold]] = field(default_factory=dict)
    _tracks: list[Track] = field(init=False)
    _staged: StagedBlock = field(init=False)

    @classmethod
    def open(cls, plan: Plan, read: blocks.Read, tokens: CalibrationTokens, work: Workspace) -> Stream:
        """Run the embeddings and note each block's arguments; then take up the stream where the journal stopped."""
        count = 2 if plan.float_stream else 1
        budget = int(plan.recipe.memory_budget_gb * 1e9) // count
        samples, length = tokens.ids.shape
        stores = [StreamStore(samples, length, plan.skeleton.hidden, plan.model_dtype, budget, work.folder)
                  for _ in range(count)]
        settings = plan.recipe.calibration
        batches, held_out = batches_for(plan.samples, settings.sequence_length, settings.batch_tokens or 0,
                                        settings.held_out)
        arguments = blocks.capture(plan.skeleton, read, tokens.ids, stores[0], plan.device,
                                   plan.compute_dtype, batches)
        ran = [stage for stage in plan.stages if stage.block is not None]
        done = [stage.block or 0 for stage in ran if stage.name in work.finished]
        fitting = [batch for batch in batches if batch.start not in held_out]
        paired = fitting[:math.ceil(len(fitting) * plan.float_share)]
        also = held_out.union(*(range(batch.start, batch.stop) for batch in paired)) if paired else frozenset()
        self = cls(plan, work.folder, stores, arguments, batches, held_out, also)
        for store, path in zip(stores, self._paths(max(done, default=-1) + 1), strict=True):
            if done and (len(done) < len(ran) or plan.distilling):
                store.load(path)
            elif store is not stores[0]:
                store.copy_from(stores[0], self._batches_of(store))
        for path in set(work.folder.glob("stream-*")).difference(self._paths(max(done, default=-1) + 1)):
            path.unlink()  # of a block that is done, or half written
        return self

    @property
    def fitting(self) -> list[slice]:
        """The batches that are not held out."""
        return [batch for batch in self.batches if batch.start not in self.held_out]

    def ranges(self, block: torch.nn.Module, stage: Stage, known: Mapping[str, torch.Tensor]) -> Ranges:
        """The scales of activations that the recipe wants calibrated, from the fitting samples.

        known: those of linears that are done.
        """
        index, plan = stage.block or 0, self.plan
        cached = None
        if stage.attention is not None:
            cached = kv.scales(block, plan.skeleton.blocks[index], self.arguments, index, self.stores[0], self.fitting,
                               plan.device, plan.compute_dtype)
        return Ranges({**(self._static(block, stage) if stage.todo else {}), **known}, cached)

    def _static(self, block: torch.nn.Module, stage: Stage) -> dict[str, torch.Tensor]:
        """Experts of one kind share the scale of the largest inputs, as engines have it."""
        plan, prefix = self.plan, self.plan.skeleton.blocks[stage.block or 0] + "."
        static = [one for one in stage.linears if one.scheme.activations == "tensor"]
        kinds: dict[str, list[Survey]] = {}
        for paths, look in (self.survey(block, stage, plan.samples, RANGE_TOKENS) if static else {}).items():
            for path in paths:
                kinds.setdefault(any_number(path), []).append(look)
        scales = {}
        for one in static:
            known = kinds.get(any_number(one.name.removeprefix(prefix)), [])
            if not known:
                raise CalibrationError(f"{one.name}: no calibration token reached it or its like, so its inputs have "
                                       "no scale; use more calibration text, or activations: token")
            largest = torch.stack([look.largest.max() for look in known])
            sample = torch.cat([look.sample for look in known])[:RANGE_TOKENS]
            scale = static_scale(largest, sample, one.scheme, plan.format.scale_dtype(plan.model_dtype))
            scales[one.name] = scale.cpu()
        return scales

    def survey(self, block: torch.nn.Module, stage: Stage, samples: int, tokens: int, threshold: float = 0.0,
               moments: bool = False) -> dict[tuple[str, ...], Survey]:
        """What the inputs of a stage's linears look like on the first samples, by their paths in the block."""
        index, plan = stage.block or 0, self.plan
        batches = [batch for batch in self.fitting if batch.start < samples]
        return folds.survey(block, plan.skeleton.blocks[index], [linear.name for linear in stage.linears],
                            self.arguments, index, self.stores[0], batches, plan.device, plan.compute_dtype, tokens,
                            threshold, moments)

    def trial(self, block: torch.nn.Module, stage: Stage) -> torch.Tensor:
        """The output of the block on the first fitting samples, TRIAL_TOKENS of them or a batch."""
        fitting, length = self.fitting, self.plan.recipe.calibration.sequence_length
        some = [batch for batch in fitting if (batch.stop - fitting[0].start) * length <= TRIAL_TOKENS] or fitting[:1]
        return self._outputs(block, stage.block or 0, some)

    def folds(self, block: torch.nn.Module, stage: Stage, groups: Iterable[tuple[str, ...]]) -> list[folds.Fold]:
        """Which of these groups can have their input channels scaled; looked for once for blocks of the same make, in
        the first that can tell."""
        wanted = tuple(groups)
        make = wanted, tuple((path, type(module).__name__) for path, module in block.named_modules())
        if make not in self._folds:
            found, sure = folds.find_folds(block, wanted, lambda: self._glance(block, stage.block or 0))
            if not sure:
                return found
            self._folds[make] = found
        return self._folds[make]

    def begin(self, block: torch.nn.Module, stage: Stage, static: Mapping[str, torch.Tensor],
              original: torch.nn.Module | None = None) -> None:
        """Take up a block. static: calibrated scales [1] of inputs, by the names of their linears.

        original: with the unquantized weights, where the block has not got them.
        """
        index, names = stage.block or 0, [linear.name for linear in stage.linears]
        parts = self._find_parts(block, index, names) if self.plan.solves_on_text else ()
        self._tracks = [self._track(block, "quantized")]
        if self.plan.float_stream:
            self._tracks.append(self._track(original or copy.deepcopy(block), "float"))
        prefix = self.plan.skeleton.blocks[index] + "."
        inputs.round_inputs(block, {one.name.removeprefix(prefix): one.scheme for one in stage.linears},
                            lambda path: static[prefix + path].to(self.plan.device))
        self._staged = StagedBlock(self._tracks, self.plan.skeleton.blocks[index], parts, self.batches)

    def collect(self, stage: Stage) -> Iterator[Collected]:
        """Statistics of the linears of a stage, in items that must be solved one after the other; those of linears that
        are done all the way are not measured."""
        def collect(names: Sequence[str], batches: Iterable[slice], residual: str | None) -> Collected:
            return self._pass(stage.block or 0, names, batches) if stage.done.issuperset(names) \
                else self._collect(stage.block or 0, names, batches, residual if self.plan.follows_residual else None)

        yield from self._staged.collect([linear.name for linear in stage.linears], collect)

    def propagate(self, index: int) -> None:
        """Run the block, its linears replaced by what was solved, and put its output in the stream's place."""
        for track, store in zip(self._tracks, self.stores, strict=False):
            self._propagate(index, track, store)

    def _propagate(self, index: int, track: Track, store: StreamStore) -> None:
        plan = self.plan
        statistics.propagate(track.block, plan.skeleton.blocks[index], self.arguments, index, store,
                             self._staged.each(self._batches_of(store)), plan.device, plan.compute_dtype)
        track.restore()

    def finish_original(self, index: int) -> None:
        """Take the unquantized stream to the exit of the block, where it is what the quantized block should give; the
        block computes from its entrance again."""
        self._propagate(index, self._tracks[1], self.stores[1])
        del self._tracks[1]
        self._tracks[0].restore()

    def ends(self, batch: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """After finish_original: the hidden states [B, T, hidden] at the entrance of the quantized block, and those
        that the unquantized model has at its exit."""
        entrance, target = (store.read(batch).to(device=self.plan.device, dtype=self.plan.compute_dtype, copy=True)
                            for store in self.stores)
        return entrance, target

    def learning_batches(self, share: float) -> tuple[list[slice], list[slice]]:
        """Of the samples that ran through the unquantized model too: those to learn from, a share of the fitting ones,
        and those that are held out."""
        fitting = self.fitting
        return fitting[:math.ceil(len(fitting) * share)], [one for one in self.batches if one.start in self.held_out]

    def _collect(self, index: int, names: Sequence[str], batches: Iterable[slice], residual: str | None) -> Collected:
        plan = self.plan
        prefix = plan.skeleton.blocks[index]

        def floats(batch: slice, wanted: Sequence[str]) -> statistics.Received | None:
            if batch.start not in self.paired:
                return None
            return statistics.received(self._tracks[1].block, prefix, wanted, self.arguments, index, self.stores[1],
                                       batch, plan.device, plan.compute_dtype, residual)

        return statistics.collect(self._tracks[0].block, prefix, names, self.arguments, index, self.stores[0], batches,
                                  self.held_out, plan.device, plan.compute_dtype,
                                  floats if plan.float_stream else None, residual)

    def _pass(self, index: int, names: Sequence[str], batches: Iterable[slice]) -> Collected:
        """Run the block on all tracks until these linears have their inputs, for what its parts keep."""
        plan = self.plan
        for batch in batches:
            for track, store in zip(self._tracks, self.stores, strict=True):
                if track.new_store is not None and (store is self.stores[0] or batch.start in self.paired):
                    statistics.received(track.block, plan.skeleton.blocks[index], names, self.arguments, index, store,
                                        batch, plan.device, plan.compute_dtype)
        return {}

    def _batches_of(self, store: StreamStore) -> list[slice]:
        return self.batches if store is self.stores[0] else [one for one in self.batches if one.start in self.paired]

    def _find_parts(self, block: torch.nn.Module, index: int, names: Sequence[str]) -> tuple[Part, ...]:
        """The parts of this block; looked for once for blocks of the same make."""
        prefix = self.plan.skeleton.blocks[index] + "."
        paths = [name.removeprefix(prefix) for name in names]
        make = tuple((path, type(module).__name__) for path, module in block.named_modules())
        make += tuple((path, "quantized") for path in paths)
        if make not in self._parts:
            self._parts[make] = find_parts(block, paths, lambda: self._glance(block, index))
        return self._parts[make]

    def _glance(self, block: torch.nn.Module, index: int) -> torch.Tensor:
        """The output of the block on its smallest batch."""
        return self._outputs(block, index, [min(self.batches, key=lambda one: one.stop - one.start)])

    @torch.inference_mode()
    def _outputs(self, block: torch.nn.Module, index: int, batches: Iterable[slice]) -> torch.Tensor:
        return torch.cat([statistics.run_block(block, self.arguments, index, self.stores[0], batch, self.plan.device,
                                               self.plan.compute_dtype) for batch in batches])

    def _track(self, block: torch.nn.Module, kind: str) -> Track:
        """Its stores are files, whatever the budget: they are written and read once a block, mostly in the cache."""
        def new_store(what: str, width: int) -> StreamStore:
            key = (kind, what, width)
            if key not in self._kept:
                samples, length, _ = self.stores[0].shape
                self._kept[key] = StreamStore(samples, length, width, self.plan.model_dtype, 0, self.folder)
            return self._kept[key]

        return Track(block, new_store if self.plan.device.type == "cpu" else None)

    def save(self, index: int) -> None:
        """Make the stream at the entrance of block `index` durable; what learns at the end needs the last exits too."""
        if index < self.plan.blocks or self.plan.distilling:
            for store, path in zip(self.stores, self._paths(index), strict=True):
                store.save(path)

    def forget(self, index: int) -> None:
        for path in self._paths(index):
            path.unlink(missing_ok=True)

    def _paths(self, index: int) -> list[Path]:
        return [self.folder / f"stream-{kind}-{index}.bin" for kind in ("quantized", "float")[:len(self.stores)]]
