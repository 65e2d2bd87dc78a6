"""Runs a Plan. This file is the story of a tensor, from disk to disk.

    with a budget       the scheme of each linear is searched for (sensitivity.py)
    before the blocks   the tensors are copied; the calibration tokens become the activation stream
    for each block      read its weights            (the next block is read meanwhile)
                        collect statistics          one per shared input, while the stream runs through it
                        solve its linears           the recipe's steps, q/k/v and gate/up as one problem
                        write and read back         pack, write, unpack from the file, compare
                        propagate                   the stream runs through the quantized block
                        record                      fsync, journal: never done again
    after the blocks    the rest is copied; the files get their names, their hashes and the manifest

A data-free recipe takes the same road without the stream, one tensor at a time. Work happens in OUT.partial/, which
a rerun of the same command continues and which gets its final name only when everything is there and verified.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

import torch

import qtool
from qtool import card, estimate, formats, found, grids, heap, manifest, ops, quality, rotate, sensitivity
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import ShardWriter, plan_shards
from qtool.errors import NumericalError, PlanError, VerificationError
from qtool.layer import Layer
from qtool.models import blocks, calibration
from qtool.outliers import outlier_notes
from qtool.plan import Plan, with_schemes
from qtool.rescale import rescale
from qtool.stages import LinearPlan, Stage
from qtool.stream import Stream
from qtool.tensors import FLOATING, INPUT_SCALE, CalibrationStats, QuantizedTensor, all_finite
from qtool.workspace import Workspace, refuse_existing

EMPTY: Mapping[str, torch.Tensor] = {}


class Progress(Protocol):
    """What console.py shows of a run."""

    def start(self, blocks: int, done: int) -> None: ...
    def message(self, text: str) -> None: ...
    def linear(self, name: str, error: float | None) -> None: ...
    def block(self, index: int, name: str, seconds: float, worst: tuple[str, float] | None,
              memory_bytes: int) -> None: ...
    def finish(self) -> None: ...


def run(checkpoint: Checkpoint, plan: Plan, progress: Progress, restart: bool = False) -> dict[str, Any]:
    """Quantize; returns the manifest. Raises what the plan could not foresee; then OUT.partial/ can be continued."""
    refuse_existing(plan.out)
    _refuse_full_disk(plan)
    torch.manual_seed(plan.recipe.seed)
    heap.reuse()
    tokens = tokens_of(checkpoint, plan)
    source = rotate.view(checkpoint, plan.rotated)
    with Workspace(plan.out, identity_of(checkpoint, plan, tokens), restart) as work:
        if plan.problem is not None and tokens is not None:
            chosen = sensitivity.allocation(source, plan, tokens.ids, work, progress.message)
            plan = with_schemes(plan, sensitivity.schemes_of(plan, chosen))
        with torch.inference_mode():
            result = _quantize(source, plan, progress, tokens, work)
    progress.finish()
    return result


def _quantize(checkpoint: Checkpoint, plan: Plan, progress: Progress, tokens: calibration.CalibrationTokens | None,
              work: Workspace) -> dict[str, Any]:
    """Everything once the schemes are known."""
    writer = ShardWriter(work.folder, plan_shards(plan.outputs, int(plan.recipe.shard_gb * 1e9)))
    done = sum(1 for stage in plan.stages if stage.block is not None and stage.name in work.finished)
    progress.start(plan.blocks, done)
    job = Job(checkpoint, plan, writer, progress)
    stream = Stream.open(plan, checkpoint.read, tokens, work) if tokens is not None and plan.calibrated else None
    for stage, weights in _read_ahead(job, work.finished):
        began = time.monotonic()
        layers = _do_stage(job, stage, weights, stream)
        heap.give_back()
        writer.sync()
        if stream is not None and stage.block is not None:
            stream.save(stage.block + 1)
        work.record(stage.name, {"layers": layers})
        if stream is not None and stage.block is not None:
            stream.forget(stage.block)
        if stage.block is not None:
            progress.block(stage.block, stage.name, time.monotonic() - began, _worst(layers), estimate.resident())
    progress.message("naming and hashing the files")
    return _finish(job, work)


@dataclass(frozen=True)
class Job:
    """What every step of one run needs."""

    checkpoint: Checkpoint
    plan: Plan
    writer: ShardWriter
    progress: Progress


def _do_stage(job: Job, stage: Stage, weights: dict[str, torch.Tensor], stream: Stream | None) -> list[dict[str, Any]]:
    if stage.block is not None and stream is not None:
        return _do_block(job, stage, weights, stream)
    for name in stage.copied:
        _copy(job, name, weights)
    if stage.block is not None:
        return [record for group in _one_scale(stage.linears)
                for record in _solve(job, group, [_weight(job, linear, weights) for linear in group], None)]
    return []


def _do_block(job: Job, stage: Stage, weights: dict[str, torch.Tensor], stream: Stream) -> list[dict[str, Any]]:
    """Collect and solve every group of linears that share an input, part by part; propagate."""
    plan = job.plan
    index = stage.block or 0
    for name, weight in weights.items():
        _refuse_non_finite(name, weight)
    block = blocks.load_block(plan.skeleton, index, weights.__getitem__, plan.device, plan.compute_dtype)
    notes, listed = rescale(plan, stage, block, stream, weights), outlier_notes(plan, stage, block, stream)
    for name in stage.copied:
        _copy(job, name, weights)
    ranges = stream.ranges(block, stage)
    if stage.attention is not None and ranges.kv is not None:
        for spec, scale in zip(plan.format.kv_scales(stage.attention), ranges.kv, strict=True):
            job.writer.write(spec.name, scale.reshape(1))
    stream.begin(block, stage, ranges.inputs)
    records: list[dict[str, Any]] = []
    for group, stats in _collected(plan, stage, stream):
        originals = [_weight(job, linear, weights).to(plan.device) for linear in group]
        records += _solve(job, group, originals, stats, block, ranges.inputs)
    weights.clear()
    if index + 1 < plan.blocks:
        stream.propagate(index)
    records = [{**record, **notes.get(record["name"], {}), **listed.get(record["name"], {})} for record in records]
    order = {linear.name: place for place, linear in enumerate(stage.linears)}
    return sorted(records, key=lambda record: order[record["name"]])


def _collected(plan: Plan, stage: Stage, stream: Stream) -> Iterator[tuple[list[LinearPlan], CalibrationStats | None]]:
    """Linears that are solved together, with their statistics; each must be solved before the next is asked for."""
    if not plan.solves_on_text:
        yield from ((group, None) for group in _one_scale(stage.linears))
        return
    linears = {linear.name: linear for linear in stage.linears}
    for collected in stream.collect(stage):
        while collected:
            names, stats = collected.popitem()
            groups = _same_scheme([linears[name] for name in names if name in linears])
            while groups:
                group = groups.pop(0)
                # the last may take out of the statistics what its steps have done with
                yield group, replace(stats) if groups else stats
            del stats


def _solve(job: Job, group: list[LinearPlan], weights: list[torch.Tensor], stats: CalibrationStats | None,
           block: torch.nn.Module | None = None,
           input_scales: Mapping[str, torch.Tensor] = EMPTY) -> list[dict[str, Any]]:
    """Run the recipe's steps on linears that share an input; write each; put the result into the block."""
    plan = job.plan
    stacked = weights[0].float() if len(weights) == 1 else torch.cat([weight.float() for weight in weights])
    layer = Layer(group[0].name, stacked, stacked, group[0].scheme, plan.format.scale_dtype(plan.model_dtype), stats)
    for step, options in plan.steps:
        layer = step.run(layer, options)
    if layer.quantized is None:
        raise PlanError(f"no step of {plan.recipe.method} chooses codes; end the recipe's steps with rtn or gptq "
                        "(rotate alone goes with --format hf: dense weights)")
    records, start = [], 0
    for linear in group:
        stop = start + linear.shape[0]
        quantized = layer.quantized.rows(start, stop)
        if linear.name in input_scales:
            quantized = replace(quantized, extra={**quantized.extra, INPUT_SCALE: input_scales[linear.name]})
        dense = found.load("grids", linear.scheme.grid).decode(quantized)
        record = _measure(plan, linear, layer, slice(start, stop), dense, len(group))
        _write_linear(job, linear, quantized, dense)
        if block is not None:
            _linear_of(block, plan, linear).weight.copy_(dense.to(plan.model_dtype))
        job.progress.linear(linear.name, record["relative_error"])
        records.append(record)
        start = stop
    return records


def _measure(plan: Plan, linear: LinearPlan, layer: Layer, rows: slice, dense: torch.Tensor,
             solved_together: int) -> dict[str, Any]:
    """The manifest's line on one linear; output error against the target, on held-out tokens where there are any."""
    weight, target, stats = layer.weight[rows], layer.target[rows], layer.stats
    in_weights = quality.weight_error(weight, weight - dense)
    in_outputs = None
    if stats is not None:
        energy = stats.held_out.energy if stats.held_out.tokens else quality.energy_under(stats.hessian)
        in_outputs = quality.output_error(target, target - dense, energy)
    if not (in_weights >= 0 and (in_outputs is None or in_outputs >= 0)):
        raise NumericalError(f"{linear.name}: the quantized weight is not finite; use more damping or more "
                             "calibration tokens")
    error = in_weights if in_outputs is None else in_outputs
    ratio = quality.sqnr_db(error)
    return {
        "name": linear.name, "stored": linear.stored, "block": linear.block, "shape": list(linear.shape),
        "scheme": linear.scheme.model_dump(),
        "bytes": plan.linear_bytes(linear),
        "relative_error": _rounded(in_outputs), "weight_error": _rounded(in_weights), "sqnr_db": _rounded(ratio),
        "tokens": stats.tokens if stats else 0, "held_out_tokens": stats.held_out.tokens if stats else 0,
        "pooled": bool(stats and stats.pooled), "solved_together": solved_together, **layer.notes,
        **({"rescaled": True} if plan.rotated and f"{linear.stored}.weight" in plan.rotated.changes else {}),
    }


def _write_linear(job: Job, linear: LinearPlan, quantized: QuantizedTensor, dense: torch.Tensor) -> None:
    """Pack and write one linear, then decode what the file really has and hold it against what was meant."""
    here = torch.device("cpu")
    quantized = quantized.to(here)
    for name, tensor in job.plan.format.pack(linear.stored, quantized, job.plan.model_dtype).items():
        job.writer.write(name, tensor)
    again = job.plan.format.unpack(linear.stored, job.writer.read_back, linear.scheme, linear.shape)
    if not torch.equal(found.load("grids", linear.scheme.grid).decode(again), dense.to(here)):
        raise VerificationError(f"{linear.stored}: what was read back from {job.writer.folder} differs from what was "
                                "written; the disk or the memory of this machine may be faulty")


def _copy(job: Job, name: str, weights: dict[str, torch.Tensor]) -> None:
    """A tensor that is not quantized goes over as it is (or in the recipe's dtype)."""
    tensor = weights[name] if name in weights else job.checkpoint.read(name)
    _refuse_non_finite(name, tensor)
    if job.plan.recipe.dtype != "auto" and tensor.dtype in FLOATING:
        tensor = tensor.to(job.plan.model_dtype)
    job.writer.write(name, tensor)


def _weight(job: Job, linear: LinearPlan, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    name = linear.stored + ".weight"
    weight = weights.pop(name) if name in weights else job.checkpoint.read(name)
    _refuse_non_finite(name, weight)
    return weight


def _refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype in FLOATING and not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericalError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; the checkpoint is damaged")


def _read_ahead(job: Job, finished: dict[str, Any]) -> Iterator[tuple[Stage, dict[str, torch.Tensor]]]:
    """Every unfinished stage with its weights; when calibrating, block i + 1 is read while block i is solved."""
    todo = [stage for stage in job.plan.stages if stage.name not in finished]
    if not job.plan.calibrated:
        yield from ((stage, {}) for stage in todo)
        return

    def read(stage: Stage) -> dict[str, torch.Tensor]:
        if stage.block is None:
            return {}
        skeleton = job.plan.skeleton
        names = {skeleton.source(name) for name in skeleton.block_parameters(stage.block)}
        return {name: job.checkpoint.read(name) for name in sorted(names)}

    with ThreadPoolExecutor(1, "read-ahead") as pool:
        future = pool.submit(read, todo[0]) if todo else None
        for place, stage in enumerate(todo):
            weights = future.result() if future else {}
            future = pool.submit(read, todo[place + 1]) if place + 1 < len(todo) else None
            yield stage, weights


def tokens_of(checkpoint: Checkpoint, plan: Plan) -> calibration.CalibrationTokens | None:
    """The text that a run needs, if it needs any."""
    if not plan.text_samples:
        return None
    return calibration.load_tokens(plan.recipe.calibration, checkpoint.directory, plan.text_samples,
                                   plan.skeleton.vocabulary)


def identity_of(checkpoint: Checkpoint, plan: Plan, tokens: calibration.CalibrationTokens | None) -> dict[str, Any]:
    """What decides the bytes of a run; reads the whole checkpoint, for its hashes."""
    source = {"name": checkpoint.name, "origin": checkpoint.origin, "files": checkpoint.hashes()}
    used = None
    if tokens is not None:
        used = {**tokens.description, "sha256": tokens.sha256, "samples": plan.text_samples,
                "sequence_length": plan.recipe.calibration.sequence_length}
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": version("transformers"), "device": plan.device.type, "ops": ops.backend()}
    return manifest.identity(qtool.__version__, source, plan.recipe.model_dump(mode="json"), used, versions)


def _finish(job: Job, work: Workspace) -> dict[str, Any]:
    """Name the shards, add config, tokenizer, manifest and card, check the key set, rename the directory."""
    plan = job.plan
    layers = [record for stage in plan.stages for record in work.finished[stage.name]["layers"]]
    config = _config(job)
    found_schemes = plan.format.schemes(config, {spec.name: spec for spec in plan.outputs}, job.writer.read_back)
    if set(found_schemes) != {linear.stored for linear in plan.linears}:
        raise VerificationError(f"{work.folder}: a loader would find {len(found_schemes)} quantized linears in the "
                                f"written keys, not {len(plan.linears)}; this is a bug in format {plan.format.NAME}")
    job.writer.finish()
    for path in job.checkpoint.companions():
        shutil.copyfile(path, work.folder / path.name)
    manifest.write_json(work.folder / "config.json", config)
    for name, content in plan.format.extra_files(config.get("quantization_config", {})).items():
        manifest.write_json(work.folder / name, content)
    scratch = {"journal.jsonl", "lock"}
    hashes = {path.name: manifest.file_hash(path) for path in sorted(work.folder.iterdir())
              if path.is_file() and path.name not in scratch and not path.name.startswith("stream-")}
    parameters = sum(spec.elements for name, spec in job.checkpoint.specs.items())
    result = {**work.identity, "format": plan.format.NAME, "layers": layers, "rotation": rotate.describe(plan.rotated),
              "kept": [{"name": name, "reason": reason} for name, reason in plan.kept], "outputs": hashes,
              "allocation": work.finished.get(sensitivity.STAGE, {}).get("allocation"),
              "totals": manifest.totals(layers, parameters, plan.weight_bytes, plan.source_bytes)}
    text = card.text(result, plan.format.LOADERS)
    (work.folder / "README.md").write_text(text, encoding="utf-8")
    manifest.save(work.folder, result)
    work.complete()
    return result


def _config(job: Job) -> dict[str, Any]:
    plan = job.plan
    config = {key: value for key, value in job.checkpoint.config.items() if key != "quantization_config"}
    skipped = [name for name, _ in plan.kept]
    schemes = {linear.stored: linear.scheme for linear in plan.linears}
    steps = [next(iter(step)) for step in plan.recipe.steps]
    quantization = plan.format.config(schemes, skipped, steps)
    if plan.recipe.kv_cache:
        quantization = plan.format.with_kv_cache(quantization)
    if quantization:  # dense weights have none
        config["quantization_config"] = quantization
    if plan.recipe.dtype != "auto":
        config["dtype"] = plan.recipe.dtype
        config.pop("torch_dtype", None)
    return config


def _refuse_full_disk(plan: Plan) -> None:
    parent = next(folder for folder in (plan.out.absolute().parent, *plan.out.absolute().parents) if folder.exists())
    partial = plan.out.with_name(plan.out.name + ".partial")
    there = sum(path.stat().st_blocks * 512 for path in partial.glob("*")) if partial.is_dir() else 0
    free = shutil.disk_usage(parent).free + there
    if free < plan.disk_bytes:
        raise PlanError(f"{parent} has {free / 1e9:.1f} GB free and this run needs {plan.disk_bytes / 1e9:.1f} GB; "
                        "choose an --out on another disk")


def _same_scheme(linears: list[LinearPlan]) -> list[list[LinearPlan]]:
    """Linears that can be solved as one stacked matrix."""
    groups: dict[str, list[LinearPlan]] = {}
    for linear in linears:
        joint = found.load("grids", linear.scheme.grid).JOINT
        groups.setdefault(linear.scheme.model_dump_json() if joint else linear.name, []).append(linear)
    return list(groups.values())


def _one_scale(linears: Iterable[LinearPlan]) -> list[list[LinearPlan]]:
    """Without statistics each linear is solved alone, but those that engines run as one share a scale of the whole."""
    groups: dict[str, list[LinearPlan]] = {}
    for linear in linears:
        together = grids.has_whole_scale(linear.scheme)
        whole = formats.fused_name(linear.name) if together else linear.name
        groups.setdefault(f"{whole} {linear.scheme.label}", []).append(linear)
    return list(groups.values())


def _linear_of(block: torch.nn.Module, plan: Plan, linear: LinearPlan) -> torch.nn.Linear:
    module = block.get_submodule(linear.name.removeprefix(plan.skeleton.blocks[linear.block] + "."))
    assert isinstance(module, torch.nn.Linear)
    return module


def _worst(layers: list[dict[str, Any]]) -> tuple[str, float] | None:
    errors = [(layer["name"], layer["relative_error"]) for layer in layers if layer["relative_error"] is not None]
    return max(errors, key=lambda pair: pair[1], default=None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")

