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

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from qtool import (
    arithmetic,
    card,
    container,
    digests,
    estimate,
    formats,
    found,
    heap,
    keeping,
    manifest,
    outputs,
    outside,
    preflight,
    prepare,
    reading,
    records,
    repairs,
    rotate,
    sensitivity,
)
from qtool.checkpoint.reader import Checkpoint, refuse_non_finite
from qtool.decode import Source
from qtool.errors import NumericalError, PlanError, VerificationError
from qtool.layer import Layer
from qtool.learning.distill import after_distilling, distill, distilled
from qtool.learning.tune import tune
from qtool.models import blocks, calibration
from qtool.outliers import outlier_notes
from qtool.packing import write_linear
from qtool.plan import Plan, with_schemes
from qtool.records import Solved
from qtool.rescale import rescale
from qtool.stages import LinearPlan, Stage, one_scale, same_scheme
from qtool.stream import Stream
from qtool.tensors import FLOATING, INPUT_SCALE, CalibrationStats, all_finite
from qtool.workspace import Workspace, already

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
    made = already(plan.out, checkpoint.directory,
                   lambda: prepare.identity_of(checkpoint, plan, prepare.tokens_of(checkpoint, plan)))
    if made is not None:
        progress.message(f"{plan.out} holds what this command makes already")
        return made
    preflight.refuse(plan)
    torch.manual_seed(plan.recipe.seed)
    heap.reuse()
    if not restart:
        arithmetic.resume(plan.out)
    tokens = prepare.tokens_of(checkpoint, plan)
    source = rotate.view(checkpoint, plan.rotated)
    with Workspace(plan.out, prepare.identity_of(checkpoint, plan, tokens), restart) as work:
        if plan.problem is not None and tokens is not None:
            chosen = sensitivity.allocation(source, plan, tokens.ids, work, progress.message)
            plan = with_schemes(plan, sensitivity.schemes_of(plan, chosen))
        with torch.no_grad() if plan.learning or plan.distilling else torch.inference_mode():
            result = _quantize(source, plan, progress, tokens, work)
    progress.finish()
    return result


def _quantize(checkpoint: Checkpoint, plan: Plan, progress: Progress, tokens: calibration.CalibrationTokens | None,
              work: Workspace) -> dict[str, Any]:
    """Everything once the schemes are known."""
    resumed = any(stage.name in work.finished for stage in plan.stages)
    keeper = keeping.Keeper(work.folder, plan.scaling_steps) if plan.recipe.keep_statistics else None
    jobs = [Job(checkpoint, one, container.open_writer(one, work.folder, checkpoint.name, resumed), progress,
                keeper=keeper)
            for one in (plan, *plan.others)]
    solve_stages(jobs, tokens, work)
    progress.message("naming and hashing the files")
    results = [_finish(job, place, work, jobs[0].plan) for place, job in enumerate(jobs)]
    made = results[0] if len(jobs) == 1 else outputs.together(work, [job.plan.name for job in jobs], results)
    work.complete()
    return made


@dataclass(frozen=True)
class Job:
    """What every step of one run needs.

    finished, original: where some linears are done, what holds their codes, and the unquantized model.  keeper: where
    the statistics are kept.
    """

    checkpoint: Checkpoint
    plan: Plan
    writer: container.Writer
    progress: Progress
    finished: Source | None = None
    original: Checkpoint | None = None
    keeper: keeping.Keeper | None = None


def solve_stages(jobs: Sequence[Job], tokens: calibration.CalibrationTokens | None, work: Workspace) -> None:
    """Do and record every stage of the plans that the journal does not have."""
    plan, progress = jobs[0].plan, jobs[0].progress
    progress.start(plan.blocks, sum(stage.name in work.finished for stage in plan.stages if stage.block is not None))
    stream = None
    if tokens is not None and plan.calibrated and not distilled(work):
        stream = Stream.open(plan, jobs[0].checkpoint.read, tokens, work)
    for stage, weights in reading.ahead(jobs[0].checkpoint, plan, work.finished):
        began = time.monotonic()
        layers, *more = do_stage(jobs, stage, weights, stream)
        heap.give_back()
        for job in jobs:
            job.writer.sync()
        if stream is not None and stage.block is not None:
            stream.save(stage.block + 1)
        work.record(stage.name, {"layers": layers, **({"others": more} if more else {}),
                                 **(jobs[0].keeper.last if jobs[0].keeper and stage.block is not None else {})})
        if stream is not None and stage.block is not None:
            stream.forget(stage.block)
        if stage.block is not None:
            progress.block(stage.block, stage.name, time.monotonic() - began, records.worst(layers),
                           estimate.resident())
    if plan.distilling and stream is not None and tokens is not None:
        distill(plan, jobs[0].checkpoint.read, jobs[0].writer, tokens, stream, work, progress.message)


def do_stage(jobs: Sequence[Job], stage: Stage, weights: dict[str, torch.Tensor],
              stream: Stream | None) -> list[list[dict[str, Any]]]:
    """What the manifest tells of its linears, for each output."""
    if stage.block is not None and stream is not None:
        return _do_block(jobs, stage, weights, stream)
    records: list[list[dict[str, Any]]] = []
    for job in jobs:
        own = job.plan.stage_like(stage)
        for name in own.copied:
            _copy(job, name, weights)
        records.append([settle(job, one) for group in one_scale(own.todo)
                        for one in solve(job, group, [_weight(job, linear, weights) for linear in group], None)]
                       + [outside.quantize(job.checkpoint, job.plan, job.writer, linear) for linear in own.outside])
    return records


def _do_block(jobs: Sequence[Job], stage: Stage, weights: dict[str, torch.Tensor],
              stream: Stream) -> list[list[dict[str, Any]]]:
    """Collect and solve every group of linears that share an input, part by part; propagate."""
    job, plan = jobs[0], jobs[0].plan
    index = stage.block or 0
    for name, weight in weights.items():
        refuse_non_finite(job.checkpoint.origin, name, weight)
    block = blocks.load_block(plan.skeleton, index, weights.__getitem__, plan.device, plan.compute_dtype)
    notes, scalings = ({}, []) if stage.done else rescale(plan, stage, block, stream, weights)
    listed = outlier_notes(plan, stage, block, stream) if stage.todo else {}
    if job.keeper:
        job.keeper.begin(stage, scalings)
    for one in jobs:
        for name in one.plan.stage_like(stage).copied:
            _copy(one, name, weights)
    ranges = stream.ranges(block, stage, _stored_scales(job, stage))
    if stage.attention is not None and ranges.kv is not None:
        for spec, scale in zip(plan.format.kv_scales(stage.attention), ranges.kv, strict=True):
            job.writer.write(spec.name, scale.reshape(spec.shape))
    original = blocks.load_block(plan.skeleton, index, job.original.read, plan.device, plan.compute_dtype) \
        if job.original is not None and stage.done and plan.float_stream else None
    stream.begin(block, stage, ranges.inputs, original)
    into = None if plan.whole is not None and plan.whole.propagate else block  # what the stream goes on through
    made: list[list[dict[str, Any]]] = [[] for _ in jobs]
    waiting: list[Solved] = []  # for what is learned when the whole block is solved
    for names, stats in _collected(plan, stage, stream):
        if job.keeper and stats:
            job.keeper.add(names, stats)
        own = {linear.name: _weight(job, linear, weights) for linear in stage.todo if linear.name in names}
        for place, group, figures in together(jobs, stage, names, stats):
            originals = [own[linear.name].to(plan.device) for linear in group]
            for solved in solve(jobs[place], group, originals, figures, ranges.inputs):
                if plan.learning:
                    put(block, plan, solved.linear, decoded(solved))
                    waiting.append(solved.waiting())
                else:
                    made[place].append(settle(jobs[place], solved, None if place else into))
            del figures
    weights.clear()
    if waiting:
        tuned = tune(plan, stage, block, stream, waiting)
        made[0] += [settle(job, solved) for solved in tuned.solved]
        for name, gain in tuned.gains.items():
            job.writer.write(name, gain)
        notes = {one.name: {**notes.get(one.name, {}), "tuned": tuned.note} for one in stage.linears}
    if index + 1 < plan.blocks or plan.distilling:
        stream.propagate(index)
    told = {one.name: {**notes.get(one.name, {}), **listed.get(one.name, {})} for one in stage.linears}
    if job.keeper:
        job.keeper.end(told)
    return [in_order(stage, some, told) for some in made]


def in_order(stage: Stage, records: Sequence[Mapping[str, Any]],
             notes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records of a stage's linears as these follow each other, with what is noted of them by name."""
    known = {record["name"]: {**record, **notes[record["name"]]} for record in records}
    return [known[one.name] for one in stage.linears if one.name in known]


def _stored_scales(job: Job, stage: Stage) -> dict[str, torch.Tensor]:
    """The calibrated scales of the inputs of linears that are done, by name."""
    done = [one for one in stage.linears if one.name in stage.done and one.scheme.activations == "tensor"]
    if job.finished is None:
        return {}
    return {one.name: job.finished.read_quantized(one.stored).extra[INPUT_SCALE] for one in done}


def _collected(plan: Plan, stage: Stage, stream: Stream) -> Iterator[tuple[list[str], CalibrationStats | None]]:
    """Linears that share statistics, by name; each must be solved before the next is asked for."""
    if not plan.solves_on_text:
        yield from (([linear.name for linear in group], None) for group in one_scale(stage.todo))
        return
    for collected in stream.collect(stage):
        while collected:
            names, stats = collected.popitem()
            yield list(names), stats
            del stats


def together(jobs: Sequence[Job], stage: Stage, names: Sequence[str], stats: CalibrationStats | None) -> Iterator[
        tuple[int, list[LinearPlan], CalibrationStats | None]]:
    """What is solved as one, for each output; the last may take out of the statistics what its steps have done with."""
    todo = []
    for place, job in enumerate(jobs):
        linears = {linear.name: linear for linear in job.plan.stage_like(stage).todo}
        here = [linears[name] for name in names if name in linears]
        todo += [(place, group) for group in (one_scale(here) if stats is None else same_scheme(here))]
    for place, group in todo[:-1]:
        yield place, group, replace(stats) if stats else None
    if todo:
        yield *todo[-1], stats


def solve(job: Job, group: list[LinearPlan], weights: list[torch.Tensor], stats: CalibrationStats | None,
          input_scales: Mapping[str, torch.Tensor] = EMPTY) -> list[Solved]:
    """Run the recipe's steps on linears that share an input."""
    plan, dtype = job.plan, job.plan.format.scale_dtype(job.plan.model_dtype)
    for linear, weight in zip(group, weights, strict=True):
        repairs.refuse_too_large(linear.name, weight, linear.scheme, dtype)
    stacked = weights[0].float() if len(weights) == 1 else torch.cat([weight.float() for weight in weights])
    layer = Layer(group[0].name, stacked, stacked, group[0].scheme, dtype, stats)
    for step, options in plan.steps:
        layer = step.run(layer, options)
    if layer.quantized is None:
        raise PlanError(f"no step of {plan.recipe.method} chooses codes; end the recipe's steps with rtn or gptq "
                        "(rotate alone goes with --format hf: dense weights)")
    made, start, inputs = [], 0, repairs.of_inputs(stats)
    for linear in group:
        stop = start + linear.shape[0]
        quantized = layer.quantized.rows(start, stop)
        if linear.name in input_scales:
            quantized = replace(quantized, extra={**quantized.extra, INPUT_SCALE: input_scales[linear.name]})
        made.append(Solved(linear, layer, slice(start, stop), quantized, len(group), inputs))
        start = stop
    return made


def settle(job: Job, solved: Solved, block: torch.nn.Module | None = None) -> dict[str, Any]:
    """Write a linear, check what was written, put it into the block; what the manifest tells of it."""
    dense = decoded(solved)
    record = records.of_linear(job.plan, solved, dense)
    record["values_sha256"] = write_linear(job.plan, job.writer, solved.linear, solved.quantized, dense)
    if block is not None:
        put(block, job.plan, solved.linear, dense)
    job.progress.linear(solved.linear.name, record["relative_error"])
    return record


def decoded(solved: Solved) -> torch.Tensor:
    """float32 [N, K]."""
    made: torch.Tensor = found.load("grids", solved.linear.scheme.grid).decode(solved.quantized)
    return made


def _copy(job: Job, name: str, weights: dict[str, torch.Tensor]) -> None:
    """A tensor that is not quantized goes over as it is (or in the recipe's dtype)."""
    tensor = weights[name] if name in weights else job.checkpoint.read(name)
    refuse_non_finite(job.checkpoint.origin, name, tensor)
    if job.plan.recipe.dtype != "auto" and tensor.dtype in FLOATING:
        original, tensor = tensor, tensor.to(job.plan.model_dtype)
        if not all_finite(tensor):
            raise NumericalError(f"{name}: has values up to {float(original.abs().max()):.4g}, more than "
                                 f"{job.plan.recipe.dtype} holds; use --set dtype=bfloat16 or dtype=float32")
    job.writer.write(name, tensor)


def _weight(job: Job, linear: LinearPlan, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    name = linear.stored + ".weight"
    weight = weights.pop(name) if name in weights else job.checkpoint.read(name)
    refuse_non_finite(job.checkpoint.origin, name, weight)
    return weight


def _finish(job: Job, place: int, work: Workspace, first: Plan) -> dict[str, Any]:
    """Name the shards, add config, tokenizer, manifest and card, check the key set. place: among several outputs."""
    plan, folder = job.plan, job.writer.folder
    done = [work.finished[stage.name] for stage in plan.stages]
    layers = [record for stage in done for record in (stage["others"][place - 1] if place else stage["layers"])]
    layers, learned = after_distilling(work, layers)
    config = output_config(job.checkpoint.config, plan)
    found_schemes = plan.format.schemes(config, {spec.name: spec for spec in plan.outputs}, job.writer.read_back)
    if found_schemes and set(found_schemes) != {linear.stored for linear in plan.linears}:
        raise VerificationError(f"{folder}: a loader would find {len(found_schemes)} quantized linears in the "
                                f"written keys, not {len(plan.linears)}; this is a bug in format {plan.format.NAME}")
    job.writer.finish()
    names = set(job.writer.names)
    if plan.gguf is None:  # a GGUF file has them in itself
        files = {"config.json": config, **plan.format.extra_files(config.get("quantization_config", {}))}
        names |= manifest.write_beside(folder, job.checkpoint.companions(), files)
    shared = outputs.solved_on(plan, first) if first.others else {}
    if job.keeper:
        shared["statistics"] = job.keeper.finish({stage.name: work.finished[stage.name] for stage in plan.stages})
        names.add(keeping.FOLDER)
    parameters = sum(spec.elements for name, spec in job.checkpoint.specs.items())
    result = {**work.identity, "recipe": plan.recipe.model_dump(mode="json"), **shared, "format": plan.format.NAME,
              "layers": layers, "rotation": rotate.describe(plan.rotated),
              "kept": [{"name": name, "reason": reason} for name, reason in plan.kept],
              "learned": learned,
              "allocation": work.finished.get(sensitivity.STAGE, {}).get("allocation"),
              "totals": manifest.totals(layers, parameters, plan.weight_bytes, plan.source_bytes)}
    work.refuse_strays(names, plan.name)
    (folder / "README.md").write_text(card.text(result, plan.format.LOADERS), encoding="utf-8")
    result |= digests.of_folder(folder)
    manifest.save(folder, result)
    return result


def output_config(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """config.json of the output. source: the model's."""
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    skipped = plan.skeleton.both_names([name for name, _ in plan.kept])
    schemes = {linear.stored: linear.scheme for linear in plan.linears}
    steps = [next(iter(step)) for step in plan.recipe.steps]
    quantization = plan.format.config(schemes, skipped, steps)
    if plan.recipe.kv_cache:
        quantization = plan.format.with_kv_cache(quantization)
    config = formats.with_quantization(config, plan.format, quantization)
    if plan.recipe.dtype != "auto":
        config["dtype"] = plan.recipe.dtype
        config.pop("torch_dtype", None)
    return config


def put(block: torch.nn.Module, plan: Plan, linear: LinearPlan, dense: torch.Tensor) -> None:
    """Give a linear of the block this weight [N, K], as the model's dtype holds it."""
    module = block.get_submodule(linear.name.removeprefix(plan.skeleton.blocks[linear.block] + "."))
    assert isinstance(module, torch.nn.Linear)
    module.weight.copy_(dense.to(plan.model_dtype))
