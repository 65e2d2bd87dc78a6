"""Writes text that a model makes up itself, for calibration: as much of it as is asked for, and of the kinds it knows.

Each sequence begins with the model's token for a beginning and is drawn token by token from what the model foresees, at
temperature 1, over the whole vocabulary (arXiv 2305.17888, LLM-QAT, does so for training); after an end of text it goes
on. The file is JSON lines, {"text": ...}, that `--calibration` of any command reads, and other programs too.
Unlike everything else here this needs the whole model in memory: a token can only be drawn when all blocks have run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qtool
from qtool import arithmetic, devices, footprint, inspect, manifest, preflight, prepare, recipe, storage
from qtool import plan as plans
from qtool.decode import Source
from qtool.errors import CalibrationError, InputError, NumericalError
from qtool.models import blocks, skeleton, tokenizer
from qtool.models.whole import load_model
from qtool.tensors import all_finite
from qtool.workspace import Workspace, file_place

NAME = "text"
FILE = "text.jsonl"  # in the working directory
BATCH = 32  # sequences that are drawn side by side; what is drawn depends on it
BEYOND = 1.2  # of the weights: what drawing takes besides


@dataclass(frozen=True)
class TextExport:
    """What will be written. out: the file.  begin: the first token of each sequence, which is no part of the text."""

    source: Source
    out: Path
    skeleton: skeleton.Skeleton
    settings: recipe.Calibration
    tokenizer: Any
    begin: int
    device: torch.device
    dtype: torch.dtype
    lost: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return self.settings.samples or 0


def make_export(source: Source, out: Path | None = None, samples: int | None = None, sequence_length: int | None = None,
                device: str = "auto") -> TextExport:
    """samples, sequence_length: as recipes have them.  out: a file ending in .jsonl, or a directory for it.

    Raises InputError (or a class below it) for a model that does not fit into memory or whose tokenizer names no token
    to begin with.
    """
    where = file_place(out, f"{source.name}-{NAME}.jsonl", source.directory)
    target = devices.refuse_missing(devices.named(device))
    given = {"samples": samples, "sequence_length": sequence_length}
    changes = {f"calibration.{key}": value for key, value in given.items() if value is not None}
    wanted = recipe.override(recipe.Recipe(), changes, "export")
    bones = skeleton.build(source.directory, source.config, source.specs)
    words = tokenizer.load(source.directory)
    begin = words.eos_token_id if words.bos_token_id is None else words.bos_token_id
    if begin is None or not 0 <= begin < bones.vocabulary:
        raise CalibrationError(f"{source.directory}: the tokenizer names no token that a text begins or ends with, so "
                               "the model cannot begin one; give --calibration a text of your own")
    job = TextExport(source, where, bones, plans.settle_calibration(wanted, target).calibration, words, begin, target,
                     blocks.choose_compute_dtype(target, source.dtype))
    _refuse_large(job)
    return job


def run(job: TextExport, step: inspect.Step = inspect.no_steps, restart: bool = False) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints."""
    if not restart:
        arithmetic.resume(job.out)
    tokens = job.samples * job.settings.sequence_length
    storage.refuse_full(job.out, 16 * tokens, "this export", ["choose an --out on another disk", "use fewer --samples"])
    with Workspace(job.out, _identity(job), restart) as work, torch.inference_mode():
        records = _written(job, work, step)
        storage.write(work.folder / FILE, "".join(records).encode())
        work.complete_file(FILE)
        size, digest = job.out.stat().st_size, manifest.file_hash(job.out)
    return {
        "schema": inspect.SCHEMA, "out": str(job.out), "format": NAME, "linears": 0, "lossless": False,
        "from": inspect.stored_name(job.source) or f"{inspect.dtype_name(job.source.dtype)} weights",
        "checked": f"{job.samples:,} texts of {job.settings.sequence_length:,} tokens, drawn from the model",
        "source_bytes": footprint.stored_bytes(job.source), "weight_bytes": size, "notes": [],
        "outputs": {job.out.name: digest}, "calibration": _text(job),
    }


def draw(model: nn.Module, begin: int, count: int, length: int, known: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [count, length]: sequences after `begin`, each token drawn from the model's own probabilities.

    known: tokens that the tokenizer has; rows of the embedding past them are never drawn. Raises NumericalError.
    """
    device = next(model.parameters()).device
    token = torch.full((count, 1), begin, device=device)
    drawn, cache = [], None
    for _ in range(length):
        answer = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, logits = answer.past_key_values, answer.logits[:, -1, :known].float()
        if not all_finite(logits):
            raise NumericalError("the model's logits are not finite; look at its weights: qtool inspect MODEL --layers")
        token = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).to(device)
        drawn.append(token)
    return torch.cat(drawn, dim=1).cpu()


def _written(job: TextExport, work: Workspace, step: inspect.Step) -> list[str]:
    """Lines of the file, batch by batch; those in the journal are not drawn again."""
    starts = range(0, job.samples, BATCH)
    model: nn.Module | None = None
    for index, start in enumerate(starts):
        step(index, len(starts), f"writing texts {start + 1} to {min(start + BATCH, job.samples)} of {job.samples}")
        if str(start) in work.finished:
            continue
        if model is None:
            model = load_model(job.skeleton, job.source.read, job.device, job.dtype, job.source.schemes,
                               job.source.read_quantized, job.source.cache_scales())
        generator = torch.Generator().manual_seed(start)
        ids = draw(model, job.begin, BATCH, job.settings.sequence_length, len(job.tokenizer), generator)
        work.record(str(start), {"lines": list(_lines(job, ids[:job.samples - start]))})
    step(len(starts), len(starts), "writing the file")
    return [line for start in starts for line in work.finished[str(start)]["lines"]]


def _lines(job: TextExport, ids: torch.Tensor) -> Iterator[str]:
    for row in ids.tolist():
        yield json.dumps({"text": job.tokenizer.decode(row, skip_special_tokens=True)}, ensure_ascii=False) + "\n"


def _refuse_large(job: TextExport) -> None:
    """Raises InputError where the weights and what drawing takes are more than there is."""
    elements = sum(torch.Size(shape).numel() for shape in job.skeleton.parameters.values())
    needed = int(elements * job.dtype.itemsize * BEYOND)
    free = torch.cuda.mem_get_info(job.device)[0] if job.device.type == "cuda" else preflight.available_memory()
    if free is not None and needed > free:
        raise InputError(f"{job.source.origin}: writing text needs the whole model in memory, {needed / 1e9:.1f} GB, "
                         f"and there are {free / 1e9:.1f}; take a larger machine, or give --calibration a text of your "
                         "own")


def _identity(job: TextExport) -> dict[str, Any]:
    return {"export": NAME, "qtool": qtool.__version__, "calibration": _text(job), "dtype": str(job.dtype),
            "source": {"name": job.source.name, "files": job.source.hashes()},
            "versions": prepare.versions(job.device), manifest.ARITHMETIC: arithmetic.described(job.device)}


def _text(job: TextExport) -> dict[str, Any]:
    return {"source": "the model's own", "samples": job.samples, "sequence_length": job.settings.sequence_length}
