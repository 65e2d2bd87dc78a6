"""Carries out a redo: beside the output, then in its place.

    OUT.redo.partial/     the work: journal, activation stream, the files that change; killed, the same command goes on
    OUT.redo/             a whole finished output: the files that change, and hard links to those that do not
    OUT -> .OUT.before-redo, OUT.redo -> OUT, .OUT.before-redo is removed

So OUT is at any moment the old output or the new one. Killed between the two renames it is missing, and the same
command ends what was begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qtool import (
    arithmetic,
    card,
    devices,
    digests,
    estimate,
    heap,
    keeping,
    lock,
    manifest,
    pipeline,
    records,
    rotate,
    storage,
    workspace,
)
from qtool import prepare as before_runs
from qtool.checkpoint import stacks
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.tensor_io import sha256_files
from qtool.checkpoint.writer import INDEX, ShardWriter, write_index
from qtool.errors import OutputError, VerificationError
from qtool.kept import Kept
from qtool.models.calibration import CalibrationTokens
from qtool.models.folds import Scaling
from qtool.redo import Redo, replaced
from qtool.workspace import Workspace

KEPT = "kept tensors"  # the stage that copies what shares a file with redone tensors
OWN = (manifest.NAME, "README.md")


def recover(out: Path) -> None:
    """Put a finished redo in its place, if an earlier command was killed before that. Raises OutputError."""
    fresh, old = _beside(out)
    workspace.recover(fresh)
    if fresh.is_dir():
        with lock.folder(fresh):
            if fresh.is_dir() and "redone" in manifest.load(fresh):  # only ever a whole output has this name
                _swap(out)
    elif old.is_dir() and out.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        old.rename(out)


def run(redo: Redo, progress: pipeline.Progress, restart: bool = False) -> dict[str, Any]:
    """Returns the manifest of the output as it is then; that of an output of which this was done already as it is."""
    out, plan = redo.plan.out, redo.part
    devices.refuse_missing(plan.device)
    torch.manual_seed(plan.recipe.seed)
    heap.reuse()
    if not restart:
        arithmetic.resume(_beside(out)[0])
    tokens = before_runs.tokens_of(redo.checkpoint, plan) if redo.kept is None else None
    identity = _identity(redo, tokens)
    entry = {**redo.asked, "calibration": identity["calibration"], "versions": identity["versions"],
             "statistics": "kept" if redo.kept else None}
    last = {key: value for key, value in (redo.record.get("redone") or [{}])[-1].items() if key != "before"}
    if last == json.loads(json.dumps(entry)):
        progress.message(f"{out} has been redone in this way already")
        return redo.record
    _refuse_damaged(redo)
    _refuse_full_disk(redo)
    entry["before"] = manifest.file_hash(out / manifest.NAME)
    source = rotate.view(redo.checkpoint, plan.rotated)
    with Workspace(_beside(out)[0], {**identity, "redo": entry}, restart) as work:
        writer = ShardWriter(work.folder, redo.files, getattr(plan.format, "METADATA", None), KEPT in work.finished)
        job = pipeline.Job(_mixed(redo, source), plan, writer, progress, redo.output, source)
        if KEPT not in work.finished:
            _copy_kept(redo, writer)
            work.record(KEPT, {})
        with torch.inference_mode():
            if redo.kept is None:
                pipeline.solve_stages([job], tokens, work)
            else:
                _solve_kept(redo.kept, job, work)
        progress.message("naming and hashing the files")
        result = _finish(redo, writer, work, entry)
        work.complete()
        _swap(out)
    progress.finish()
    return result


def _identity(redo: Redo, tokens: CalibrationTokens | None) -> dict[str, Any]:
    """Of the run that this redo is; on kept statistics, their text is its text."""
    identity = before_runs.identity_of(redo.checkpoint, redo.part, tokens)
    if redo.kept is None:
        return identity
    return {**identity, "calibration": redo.record["calibration"],
            manifest.ARITHMETIC: arithmetic.described(redo.part.device)}


def _solve_kept(kept: Kept, job: pipeline.Job, work: Workspace) -> None:
    """Solve and record the stages that the journal does not have, on what the first run measured for them."""
    plan, progress = job.plan, job.progress
    progress.start(len(plan.stages), sum(stage.name in work.finished for stage in plan.stages))
    for stage in plan.stages:
        if stage.name in work.finished:
            continue
        began, solved, scalings = time.monotonic(), [], kept.scalings(stage)
        for names, stats in kept.groups(stage, plan.device):
            for _, group, figures in pipeline.together([job], stage, names, stats):
                weights = [_scaled(job.checkpoint.read(f"{one.stored}.weight").to(plan.device),
                                   scalings.get(one.name, ())) for one in group]
                solved += [pipeline.settle(job, one) for one in pipeline.solve(job, group, weights, figures)]
        heap.give_back()
        job.writer.sync()
        layers = pipeline.in_order(stage, solved, kept.notes(stage))
        work.record(stage.name, {"layers": layers})
        progress.block(stage.block or 0, stage.name, time.monotonic() - began, records.worst(layers),
                       estimate.resident())


def _scaled(weight: torch.Tensor, scalings: Iterable[Scaling]) -> torch.Tensor:
    for one in scalings:
        weight = replace(one, by=one.by.to(weight.device)).of(weight)
    return weight


def _beside(out: Path) -> tuple[Path, Path]:
    """(where the new output is made, where the old one is while they change places)"""
    return out.with_name(out.name + ".redo"), out.with_name(f".{out.name}.before-redo")


def _swap(out: Path) -> None:
    fresh, old = _beside(out)
    try:
        if out.exists():
            out.rename(old)
        storage.sync_folder(out.parent)
        fresh.rename(out)
        storage.sync_folder(out.parent)
    except OSError as error:
        raise OutputError(f"{fresh} is finished but cannot take the place of {out}: {error.strerror}; the same command "
                          "tries again") from None
    shutil.rmtree(old, ignore_errors=True)


def _refuse_damaged(redo: Redo) -> None:
    """Raise OutputError where the output is not as its manifest has it: what is kept would carry the damage on."""
    out, outputs = redo.plan.out, redo.record["outputs"]
    changed = manifest.wrong_seal(out)
    if changed:
        raise OutputError(changed)
    missing = [name for name in outputs if not (out / name).is_file()]
    now = {} if missing else sha256_files({name: out / name for name in outputs})
    wrong = missing or [name for name in outputs if now[name] != outputs[name]]
    if wrong:
        how = "missing" if missing else "not as it was written"
        raise OutputError(f"{out / wrong[0]} is {how} ({len(wrong)} files in all); quantize the model anew")


def _refuse_full_disk(redo: Redo) -> None:
    needed = sum(spec.nbytes for shard in redo.files for spec in shard.specs) + redo.part.temporary["peak"]
    storage.refuse_full(_beside(redo.plan.out)[0], needed, "the redo", ["redo fewer linears at a time",
                                                                       "make room"])


def _mixed(redo: Redo, source: Checkpoint) -> Checkpoint:
    """The output, but what is solved again and what is written again with it as the model has it."""
    fresh = {f"{one.stored}.weight" for stage in redo.part.stages for one in stage.todo}
    fresh |= {name for stage in redo.part.stages for name in stage.copied}

    def fetch(name: str, start: int | None, stop: int | None) -> torch.Tensor:
        held = source if name in fresh else redo.output
        return held.read(name) if start is None or stop is None else held.read_rows(name, start, stop)

    return Checkpoint(source.origin, source.name, source.kind, source.config, source.directory, source.specs, fetch,
                      source.hashes)


def _copy_kept(redo: Redo, writer: ShardWriter) -> None:
    """Everything in the files to write that is not made again, byte for byte."""
    again = {spec.name for stage in redo.part.stages for spec in replaced(redo.part, stage)}
    for shard in redo.files:
        for spec in shard.specs:
            if spec.name not in again:
                writer.write(spec.name, redo.output.checkpoint.read(spec.name))
    writer.sync()


def _finish(redo: Redo, writer: ShardWriter, work: Workspace, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Name the files, link what stays, write config, index, manifest and card; check the key set."""
    plan, out, folder = redo.plan, redo.plan.out, work.folder
    config = pipeline.output_config(redo.checkpoint.config, plan)
    tensors = {spec.stored: shard.file_name for shard in redo.files for spec in shard.specs}
    specs = {spec.name: spec for shard in redo.files for spec in shard.specs}

    def read(name: str) -> torch.Tensor:
        return writer.read_back(name) if name in specs else redo.output.checkpoint.read(name)

    everything = {spec.name: specs.get(spec.name, spec) for spec in plan.outputs}
    found = plan.format.schemes(config, everything, read)
    if {name: scheme for name, (scheme, _) in found.items()} != {one.stored: one.scheme for one in plan.linears}:
        raise VerificationError(f"{folder}: a loader would not find the redone linears with their schemes; this is a "
                                f"bug in format {plan.format.NAME}")
    writer.finish()
    lost = _lost_statistics(redo)
    kept_files = _link(out, folder, {*(shard.file_name for shard in redo.files), INDEX, *OWN, "config.json", *lost})
    if (out / INDEX).is_file():
        before = json.loads((out / INDEX).read_text(encoding="utf-8"))["weight_map"]
        written = [one for unit in stacks.units(plan.outputs) for one in stacks.entries(unit)]
        write_index(folder, {one.name: (one.nbytes, tensors.get(one.name) or before[one.name]) for one in written})
    extra = plan.format.extra_files(config.get("quantization_config", {}))
    for name, content in {"config.json": config, **extra}.items():
        (folder / name).unlink(missing_ok=True)  # a link to the old one's
        manifest.write_json(folder / name, content)
    result = _manifest(redo, work, entry)
    if lost:
        result["statistics"] = keeping.only_there(out / keeping.FOLDER, folder / keeping.FOLDER)
    (folder / "README.md").write_text(card.text(result, plan.format.LOADERS), encoding="utf-8")
    result |= _digests(redo, folder, kept_files - set(extra), {spec.stored for spec in plan.outputs})
    manifest.save(folder, result)
    for path in folder.glob("stream-*"):  # at the entrance of the block after the last one that was run
        path.unlink()
    work.refuse_strays({*result["outputs"], *(path.name for path in out.iterdir())})
    return result


def _lost_statistics(redo: Redo) -> set[str]:
    """The files of statistics that no longer hold: of blocks whose channels are scaled otherwise now, and the index."""
    if not (redo.plan.out / keeping.FOLDER / keeping.INDEX).is_file():
        return set()
    files = {keeping.block_file(stage.block) for stage in redo.part.stages if stage.copied and stage.block is not None}
    return {f"{keeping.FOLDER}/{name}" for name in (*files, keeping.INDEX)} if files else set()


def _manifest(redo: Redo, work: Workspace, entry: Mapping[str, Any]) -> dict[str, Any]:
    """That of the output with what was redone; its outputs are still to come."""
    again = {one["name"]: one for stage in redo.part.stages for one in work.finished[stage.name]["layers"]}
    layers = [again.get(one["name"], one) for one in redo.record["layers"]]
    result = {**redo.record, "layers": layers, "redone": [*redo.record.get("redone", []), entry]}
    totals = redo.record["totals"]
    result["totals"] = manifest.totals(layers, totals["parameters"], redo.plan.weight_bytes, totals["source_bytes"])
    if result.get("allocation"):  # what a search expected of these linears is not what they are now
        kept = [one for one in result["allocation"]["linears"] if one["name"] not in redo.linears]
        result["allocation"] = {**result["allocation"], "linears": kept}
    return result


def _digests(redo: Redo, folder: Path, kept: set[str], tensors: set[str]) -> dict[str, dict[str, str]]:
    """As digests.of_folder, without reading the files that were linked."""
    files: dict[str, str] = dict(redo.record["outputs"])
    inside: dict[str, str] = dict(redo.record.get("tensors", {}))
    for name in sorted({*files, *(shard.file_name for shard in redo.files)} - kept):
        files[name], found = digests.of_file(folder / name, digests.places(folder / name))
        inside |= found
    return {"outputs": dict(sorted(files.items())),
            "tensors": {name: digest for name, digest in inside.items() if name in tensors}}


def _link(out: Path, folder: Path, but: set[str]) -> set[str]:
    """Hard links in `folder` to all files of `out` but some; copies where the file system has no links."""
    linked = set()
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        target = folder / name
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif name not in but:
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            try:
                os.link(path, target)
            except OSError:
                shutil.copy2(path, target)
            linked.add(name)
    return linked
