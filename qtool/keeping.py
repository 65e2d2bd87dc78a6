"""Writes the calibration statistics of a run beside its weights, for a later --redo without text (kept.py reads them).

    OUT/statistics/block-00000.safetensors   of each set of linears that share their input: H and, where the run had
                                             them, cross, paired and residual (tensors.py), and what held-out tokens
                                             left
    OUT/statistics/index.json                which linears share what, and what was done to their weights before

Symmetric matrices are stored as bands of their lower half. Experts that share pooled statistics share the tensors too.
A block's file is whole before the block is recorded, so a killed run begins it again or never.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qtool import manifest, storage
from qtool.checkpoint.growing import GrowingFile
from qtool.checkpoint.header import read_json
from qtool.estimate import Group, Work, group_of
from qtool.models.folds import Scaling
from qtool.models.streams import batches_for
from qtool.moments import HeldOut, lower, lower_size
from qtool.recipe import Scheme
from qtool.stages import Stage, shared_inputs
from qtool.tensors import CalibrationStats

FOLDER, INDEX, SCHEMA = "statistics", "index.json", 2
SYMMETRIC = ("hessian", "paired", "held_out.gram")
ENTRY = 192  # bytes of one tensor in a header, beside its name
WHAT, SMALLER = "a block's statistics", "leave --keep-statistics out"


class Keeper:
    """scaling_steps: of the recipe, each of which may change a weight twice."""

    def __init__(self, folder: Path, scaling_steps: int) -> None:
        self.folder, self.scaling_steps = folder / FOLDER, scaling_steps
        self._stage: Stage | None = None
        self._file: GrowingFile | None = None
        self._shared: list[tuple[weakref.ref[Any], str]] = []  # statistics of this block that were written, by name
        self._entry: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def begin(self, stage: Stage, scalings: Sequence[Scaling]) -> None:
        """Begin the file of a block. scalings: what was done to the weights of its linears."""
        self._make_folder()
        assert stage.block is not None
        self._stage = stage
        self._file = GrowingFile(self.folder / block_file(stage.block), _room(stage, self.scaling_steps), WHAT, SMALLER)
        self._shared.clear()
        self._entry = {"file": self._file.path.name, "groups": [], "scaled": {}}
        for number, one in enumerate(scalings):
            name = f"{one.linear}.scaled.{number}"
            self._file.add(name, [one.by.float()], (len(one.by),))
            self._entry["scaled"].setdefault(one.linear, []).append([one.axis, name])

    def add(self, names: Sequence[str], stats: CalibrationStats) -> None:
        """Write the statistics of linears that share them, as they are before the first step."""
        assert self._stage is not None
        linear = next(one for one in self._stage.linears if one.name == names[0])
        tensors = {kind: self._write(names[0], kind, tensor, linear.shape[1])
                   for kind, tensor in (("hessian", stats.hessian), ("cross", stats.cross), ("paired", stats.paired),
                                        ("residual", stats.residual)) if tensor is not None}
        tensors |= self._held_out(names[0], stats.held_out, linear.shape[1])
        self._entry["groups"].append({
            "linears": list(names), "tokens": stats.tokens, "pooled": stats.pooled, "tensors": tensors,
            "held_out_tokens": stats.held_out.tokens, "held_out_paired": stats.held_out.paired,
            "inputs": rounding(linear.scheme)})

    def end(self, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """Finish the file of the block; `last` is what its line in the journal says then. notes: what the manifest
        tells of its linears beside what solving them gives."""
        assert self._file is not None
        self._file.finish()
        self.last = {"statistics": {**self._entry, "notes": {name: dict(some) for name, some in notes.items()}}}

    def finish(self, finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Write the index; what the manifest tells. finished: the lines of the journal, by stage."""
        _write_index(self.folder, {stage: line["statistics"] for stage, line in finished.items()
                                  if "statistics" in line})
        return _described(self.folder)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise storage.failed(error, self.folder, WHAT, 0, SMALLER) from None

    def _held_out(self, leader: str, held: HeldOut, columns: int) -> dict[str, str]:
        known = self._known(held)
        if known is None:
            known = leader
            self._shared.append((weakref.ref(held), known))
            for kind, tensor in held.state().items():
                self._write(leader, f"held_out.{kind}", tensor, columns)
        return {f"held_out.{kind}": f"{known}.held_out.{kind}" for kind in held.state()}

    def _write(self, leader: str, kind: str, tensor: torch.Tensor, columns: int) -> str:
        assert self._file is not None
        known = self._known(tensor)
        if known is None:
            known = f"{leader}.{kind}"
            self._shared.append((weakref.ref(tensor), known))
            if kind in SYMMETRIC:
                self._file.add(known, lower(tensor), (lower_size(columns),))
            else:
                self._file.add(known, [tensor], tuple(tensor.shape))
        return known

    def _known(self, what: Any) -> str | None:
        return next((name for held, name in self._shared if held() is what), None)


def block_file(block: int) -> str:
    return f"block-{block:05d}.safetensors"


def rounding(scheme: Scheme) -> str | None:
    """How the inputs of a linear are rounded at run time, so that its statistics are those of rounded inputs."""
    return f"{scheme.activations} {scheme.grid}" if scheme.activations in ("token", "group", "tensor") else None


def only_there(before: Path, folder: Path) -> dict[str, Any]:
    """Write the index of the blocks whose files are in `folder`, from that of `before`; what the manifest tells."""
    blocks = read_json(before / INDEX)["blocks"]
    _write_index(folder, {stage: entry for stage, entry in blocks.items() if (folder / entry["file"]).is_file()})
    return _described(folder)


def _write_index(folder: Path, blocks: Mapping[str, Any]) -> None:
    """blocks: their entries by the names of their stages."""
    manifest.write_json(folder / INDEX, {"schema": SCHEMA, "blocks": blocks})


def _described(folder: Path) -> dict[str, Any]:
    """What the manifest tells: sha256 of each file, bytes of all."""
    files = sorted(folder.iterdir())
    return {"files": {path.name: manifest.file_hash(path) for path in files},
            "bytes": sum(path.stat().st_size for path in files)}


def size(work: Work, scaling_steps: int) -> int:
    """Bytes of all statistics of a run, the index aside: exact where linears share their input as is usual; at most
    that with experts, some of which share, with steps that scale channels, and where what outputs are added to is not
    found (models/staged.py)."""
    def of(stage: Stage) -> int:
        scales = 4 * scaling_steps * sum(sum(one.shape) for one in stage.linears)
        return _room(stage, scaling_steps) + scales + sum(_group_bytes(group_of(group, work), work)
                                                          for group in shared_inputs(stage))

    return sum(of(stage) for stage in work.stages if stage.block is not None)


def _group_bytes(group: Group, work: Work) -> int:
    columns, tail = group.columns, 4 * group.tail * group.columns
    settings = work.recipe.calibration
    batches, held_out = batches_for(work.samples, settings.sequence_length, settings.batch_tokens or 0,
                                    settings.held_out)
    half, square = 4 * lower_size(columns), 4 * columns**2
    fitting = sum(batch.start not in held_out for batch in batches)
    apart = 0 < math.ceil(fitting * work.float_share) < fitting  # some tokens are paired, others not
    total = half + (square if work.float_share else 0) + (half if apart else 0) + tail
    tokens = len(held_out) * settings.sequence_length
    if not tokens:
        return total
    if tokens < columns:
        return total + tokens * (columns * work.streams + group.tail) * work.compute_dtype.itemsize
    return total + half + (square if work.float_share else 0) + tail


def _room(stage: Stage, scaling_steps: int) -> int:
    """Bytes of the header of a block's file."""
    tensors = 9 + 2 * scaling_steps  # of one linear, at most
    longest = max((len(one.name.encode()) for one in stage.linears), default=0)
    return 64 + (8 * -(-(ENTRY + longest) // 8)) * tensors * len(stage.linears)
