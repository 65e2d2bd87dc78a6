"""Writes the importance matrix of a model, llama.cpp's file, from text that runs through it block by block.

Nothing is quantized: these are the statistics of the model as it is, for any quantizer that reads them. Memory is one
block; after each one its sums and the stream are on the disk, so the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import qtool
from qtool import arithmetic, devices, footprint, inspect, manifest, prepare, recipe, storage
from qtool import plan as plans
from qtool.checkpoint.imatrix import gathered, placed, write_imatrix
from qtool.decode import Source
from qtool.errors import OutputError
from qtool.models import blocks, calibration, importance, skeleton
from qtool.models.streams import StreamStore, batches_for
from qtool.workspace import Workspace, file_place

NAME = "imatrix"
FILE = "imatrix.gguf"  # in the working directory
Sums = dict[str, tuple[torch.Tensor, int]]  # of each linear: x² summed over tokens, float64 [K]; the tokens


@dataclass(frozen=True)
class ImatrixExport:
    """What will be measured. out: the file."""

    source: Source
    out: Path
    skeleton: skeleton.Skeleton
    tokens: calibration.CalibrationTokens
    settings: recipe.Calibration
    device: torch.device
    dtype: torch.dtype
    lost: tuple[str, ...] = ()

    @property
    def linears(self) -> list[str]:
        """All that have an entry: those of the blocks, and the head where it is a matrix of its own."""
        bones = self.skeleton
        inside = [name for index in range(len(bones.blocks)) for name in bones.block_linears(index)]
        return [*inside, *([bones.head] if bones.head else [])]


def make_export(source: Source, out: Path | None = None, text: str | None = None, samples: int | None = None,
                sequence_length: int | None = None, device: str = "auto") -> ImatrixExport:
    """text, samples, sequence_length: as recipes have them.  out: a file ending in .gguf, or a directory for it.

    Raises InputError (or a class below it) for a model that GGUF has no names for and text that is too short.
    """
    where = file_place(out, f"{source.name}-{NAME}.gguf", source.directory)
    target = devices.refuse_missing(devices.named(device))
    given = {"source": text, "samples": samples, "sequence_length": sequence_length}
    changes = {f"calibration.{key}": value for key, value in given.items() if value is not None}
    wanted = recipe.override(recipe.Recipe(), changes, "export")
    settings = plans.settle_calibration(wanted, target).calibration
    bones = skeleton.build(source.directory, source.config, source.specs)
    tokens = calibration.load_tokens(settings, source.directory, settings.samples or 0, bones.vocabulary)
    job = ImatrixExport(source, where, bones, tokens, settings, target,
                        blocks.choose_compute_dtype(target, source.dtype))
    placed([bones.source(f"{name}.weight") for name in job.linears], bones.model_type)
    return job


def run(job: ImatrixExport, step: inspect.Step = inspect.no_steps, restart: bool = False) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints."""
    if not restart:
        arithmetic.resume(job.out)
    stream = job.tokens.ids.numel() * job.skeleton.hidden * job.dtype.itemsize
    spilled = stream if stream > _budget() else 0
    storage.refuse_full(job.out, 2 * stream + spilled, "this export", ["choose an --out on another disk",
                                                                     "use fewer --samples"])
    with Workspace(job.out, _identity(job), restart) as work, torch.inference_mode():
        sums = _measured(job, work, step)
        write_imatrix(work.folder / FILE, _entries(job, sums), [str(job.tokens.description["source"])],
                      *job.tokens.ids.shape)
        work.complete_file(FILE)
        size, digest = job.out.stat().st_size, manifest.file_hash(job.out)
    return {
        "schema": inspect.SCHEMA, "out": str(job.out), "format": NAME, "linears": len(sums), "lossless": False,
        "from": inspect.stored_name(job.source) or f"{inspect.dtype_name(job.source.dtype)} weights",
        "checked": f"the inputs of {len(sums)} matrices on {job.tokens.ids.numel():,} tokens",
        "source_bytes": footprint.stored_bytes(job.source), "weight_bytes": size, "notes": [],
        "outputs": {job.out.name: digest}, "calibration": _text(job),
    }


def _budget() -> int:
    """Bytes of the stream past which it lies in a file."""
    return int(recipe.Recipe().memory_budget_gb * 1e9)


def _identity(job: ImatrixExport) -> dict[str, Any]:
    return {"export": NAME, "qtool": qtool.__version__, "calibration": _text(job), "dtype": str(job.dtype),
            "source": {"name": job.source.name, "files": job.source.hashes()},
            "versions": prepare.versions(job.device), manifest.ARITHMETIC: arithmetic.described(job.device)}


def _text(job: ImatrixExport) -> dict[str, Any]:
    return {**job.tokens.description, "sha256": job.tokens.sha256}


def _measured(job: ImatrixExport, work: Workspace, step: inspect.Step) -> Sums:
    """Block by block; those in the journal are not run again."""
    bones, count = job.skeleton, len(job.skeleton.blocks)
    stages = [*bones.blocks, *([bones.head] if bones.head else [])]
    samples, length = job.tokens.ids.shape
    store = StreamStore(samples, length, bones.hidden, job.dtype, _budget(), work.folder)
    batches, _ = batches_for(samples, length, job.settings.batch_tokens or 0, 0.0)
    where = job.source.read, job.device, job.dtype
    arguments = blocks.capture(bones, where[0], job.tokens.ids, store, *where[1:], batches)
    done = sum(stage in work.finished for stage in stages)
    if 0 < done < len(stages):
        store.load(_stream(work, done))
    for index in range(done, len(stages)):
        step(index, len(stages), stages[index])
        squares = (importance.of_block(bones, index, where[0], arguments, store, batches, *where[1:]) if index < count
                   else importance.of_head(bones, where[0], arguments, job.tokens.ids, store, batches, *where[1:]))
        _keep(work, index, squares.sums)
        if index + 1 < len(stages):
            store.save(_stream(work, index + 1))
        work.record(stages[index], {"tokens": squares.tokens})
        _stream(work, index).unlink(missing_ok=True)
    step(len(stages), len(stages), "writing the file")
    return {name: (sums, work.finished[stage]["tokens"][name]) for index, stage in enumerate(stages)
            for name, sums in _kept(work, index, work.finished[stage]["tokens"]).items()}


def _entries(job: ImatrixExport, sums: Sums) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    """As the file has them."""
    means = {job.skeleton.source(f"{name}.weight"): ((total / max(tokens, 1)).float(), tokens)
             for name, (total, tokens) in sums.items()}
    return gathered(means, job.skeleton.model_type)


def _stream(work: Workspace, index: int) -> Path:
    return work.folder / f"stream-{index}.bin"


def _keep(work: Workspace, index: int, sums: dict[str, torch.Tensor]) -> None:
    """Durably."""
    storage.write(work.folder / f"sums-{index}.safetensors", save(sums))


def _kept(work: Workspace, index: int, names: Mapping[str, int]) -> dict[str, torch.Tensor]:
    path = work.folder / f"sums-{index}.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: the saved statistics cannot be read ({error}); start over with --restart") from None
    if set(found) != set(names):
        raise OutputError(f"{path}: these saved statistics are of another run; start over with --restart")
    return found
