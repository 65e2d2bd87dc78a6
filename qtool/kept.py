"""The calibration statistics that an output has kept (keeping.py): whether a redo can be solved on them, and they.

They are those of the first run: what each linear received when the blocks before it, and the linears before it in its
block, had the codes that the first run gave them. Running the text again gives the same where these codes are still the
same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qtool import found, manifest
from qtool.checkpoint.header import read_header, read_json
from qtool.checkpoint.reader import fetcher, place
from qtool.errors import CheckpointError, OutputError
from qtool.keeping import FOLDER, INDEX, SCHEMA, SYMMETRIC, block_file, rounding
from qtool.models.folds import COLUMNS, ROWS, Scaling
from qtool.moments import HeldOut, from_lower, lower_size
from qtool.plan import Plan, follows_residual
from qtool.recipe import Recipe
from qtool.stages import Stage
from qtool.tensors import CalibrationStats

HELD = "held_out."
SQUARE, RESIDUAL, OFF = ("cross", "held_out.cross"), ("residual", "held_out.residual"), "held_out.residuals"


@dataclass(frozen=True)
class Kept:
    """What lies in `folder`. hashes: by file, as the manifest has them.  blocks: the entries of the index, by stage."""

    folder: Path
    hashes: Mapping[str, str]
    blocks: Mapping[str, Any]

    def groups(self, stage: Stage, device: torch.device) -> Iterator[tuple[list[str], CalibrationStats]]:
        """Linears that share statistics, by name, and these; of a stage, where one of them is to be solved."""
        todo = {one.name: one for one in stage.todo}
        file = self._file(stage)
        for group in self.blocks[stage.name]["groups"]:
            mine = [todo[name] for name in group["linears"] if name in todo]
            if mine:
                yield group["linears"], _statistics(file, group, mine[0].shape, device)

    def scalings(self, stage: Stage) -> dict[str, list[Scaling]]:
        """What the first run did to the weights of the linears to solve, in order, before it solved them."""
        todo, entry = {one.name: one for one in stage.todo}, self.blocks[stage.name]["scaled"]
        file = self._file(stage)
        return {name: [Scaling(name, axis, file.take(stored, (one.shape[(ROWS, COLUMNS).index(axis)],)))
                       for axis, stored in entry[name]] for name, one in todo.items() if name in entry}

    def notes(self, stage: Stage) -> Mapping[str, Any]:
        """What the manifest tells of the linears of a stage beside what solving them gives."""
        notes: Mapping[str, Any] = self.blocks[stage.name]["notes"]
        return notes

    def refuse_damaged(self, stages: Sequence[Stage]) -> None:
        """Raise OutputError where a file that these stages need is not as it was written."""
        for name in map(self._name, stages):
            if manifest.file_hash(self.folder / name) != self.hashes[name]:
                raise _damaged(self.folder / name)

    def _name(self, stage: Stage) -> str:
        assert stage.block is not None
        return block_file(stage.block)

    def _file(self, stage: Stage) -> _File:
        return _File(self.folder / self._name(stage))


def find(plan: Plan, base: Recipe, record: Mapping[str, Any], linears: Collection[str]) -> tuple[Kept | None, str]:
    """What the output of the plan has kept, if a redo of these linears can be solved on it; else why it cannot.

    base: the recipe of the output.  record: its manifest. Raises OutputError for a damaged index.
    """
    folder, known = plan.out / FOLDER, record.get("statistics")
    if not plan.solves_on_text:
        return None, ""
    if known is None:
        return None, "no statistics were kept (--keep-statistics)"
    if not (folder / INDEX).is_file():
        return None, f"{folder} has been removed"
    changed = manifest.differences(base.calibration.model_dump(), plan.recipe.calibration.model_dump(), "calibration")
    if changed:
        return None, "the statistics that were kept are of another text: " + ", ".join(changed)
    reason = _other_steps(plan, base)
    if reason:
        return None, reason
    kept = Kept(folder, known["files"], _index(folder, known["files"]))
    return (None, reason) if (reason := _not_covered(kept, plan, linears)) else (kept, "")


def _other_steps(plan: Plan, base: Recipe) -> str:
    """Why statistics of the recipe `base` are not those of the plan's steps, or nothing."""
    before = [_step(entry) for entry in base.steps]
    for what, text in (("SCALES_INPUTS", "scale the channels of a block"), ("LISTS_OUTLIERS", "look for outliers")):
        if found.having(what, before) != found.having(what, plan.steps):
            return f"the steps that {text} are not those of the output"
    share = max((options.share for _, options in found.having("NEEDS_FLOAT_STREAM", before)), default=0.0)
    if plan.float_share not in (0.0, share):
        return (f"asymmetric wants a share of {plan.float_share:g} of the samples in the unquantized model too, and "
                f"{share:g} of them were measured so")
    if plan.follows_residual and not follows_residual(before):
        return "asymmetric wants to know what outputs are added to (residual), which was not measured"
    return ""


def _step(entry: Mapping[str, Any]) -> tuple[ModuleType, Any]:
    name, options = next(iter(entry.items()))
    module = found.load("methods", name)
    return module, module.Options.model_validate(options)


def _not_covered(kept: Kept, plan: Plan, linears: Collection[str]) -> str:
    """Why what was kept does not do for one of these linears, or nothing."""
    inputs = {name: group["inputs"] for entry in kept.blocks.values() for group in entry["groups"]
              for name in group["linears"]}
    for one in plan.linears:
        if one.name in linears:
            if one.name not in inputs:
                return f"nothing was kept of {one.name}, whose block has been redone since"
            if one.scheme.activations == "tensor" or rounding(one.scheme) != inputs[one.name]:
                return f"how the inputs of {one.name} are rounded is measured on text, or is not as it was"
    return ""


def _index(folder: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    path = folder / INDEX
    if manifest.file_hash(path) != hashes.get(INDEX):
        raise _damaged(path)
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise OutputError(f"{path}: not of schema {SCHEMA}; remove {folder}, and the text is run instead")
    blocks: dict[str, Any] = data["blocks"]
    return blocks


def _statistics(file: _File, group: Mapping[str, Any], shape: tuple[int, int],
                device: torch.device) -> CalibrationStats:
    read = {kind: file.statistic(kind, name, *shape).to(device) for kind, name in group["tensors"].items()}
    held = {kind.removeprefix(HELD): tensor for kind, tensor in read.items() if kind.startswith(HELD)}
    held_out = HeldOut.restored(group["held_out_tokens"], group["held_out_paired"], shape[1], held, device)
    return CalibrationStats(read["hessian"], held_out, group["tokens"], read.get("cross"), read.get("paired"),
                            group["pooled"], read.get("residual"))


class _File:
    """The tensors of one file. Raises CheckpointError for what is not in it as it should be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = place({path.name: read_header(path)}, None, str(path.parent))
        self._fetch = fetcher(self._stored, {}, lambda _: path)

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name`, which has this shape; -1: any number."""
        there = self._stored[name].spec.shape if name in self._stored else ()
        if len(there) != len(shape) or any(wanted not in (-1, size) for wanted, size in zip(shape, there, strict=True)):
            raise CheckpointError(f"{self.path}: '{name}' {list(shape)} is not in it; remove {self.path.parent}, and "
                                  "the text is run instead")
        return self._fetch(name, None, None)

    def statistic(self, kind: str, name: str, rows: int, columns: int) -> torch.Tensor:
        """What the index calls `kind`, of inputs [T, columns]: a matrix [columns, columns], or inputs themselves; or of
        what the outputs of a linear [rows, columns] are added to."""
        if kind in SYMMETRIC:
            return from_lower(self.take(name, (lower_size(columns),)), columns)
        if kind == OFF:
            return self.take(name, (-1, rows))
        return self.take(name, (columns if kind in SQUARE else rows if kind in RESIDUAL else -1, columns))


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path} is not as it was written; remove {path.parent}, and the text is run instead")
