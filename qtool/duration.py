"""How long a run will take, before it starts: from small trials on this machine (trials.py) and counts of its work.

What a block really takes is for `--probe` to find out (probe.py), which scales its figures by arithmetic.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qtool import estimate, found, heap, trials
from qtool.budget import MEASURED
from qtool.layer import Layer
from qtool.methods import rtn
from qtool.outside import rounded
from qtool.plan import Plan, work_of
from qtool.stages import LinearPlan, Stage, same_scheme, shared_inputs

TRIAL_ELEMENTS = 1 << 19  # elements of the matrix that a data-free recipe is tried on
DISK_RATE = 5e8  # bytes read and written again in a second, of a usual NVMe disk
HASHERS = 2  # files of the source that are hashed at a time
SHARD_BYTES = 5_000_000_000  # of a usual source; a smaller one is one file
EFFICIENCY = 0.8  # of a run, against the rate of one large product


def seconds(plan: Plan) -> float | None:
    """Of the whole run; None on a device that is not here."""
    if plan.device.type == "cuda" and not torch.cuda.is_available():
        return None
    heap.reuse()  # as a run does
    took = searching(plan) if plan.problem else 0.0
    if plan.calibrated and plan.device.type == "cpu":
        took += calibrated(plan)
    elif plan.calibrated:
        rate = _rate(plan.device, plan.compute_dtype)
        took += sum(work(plan, stage) for stage in plan.stages) / rate + distilling(plan, one_pass(plan, rate), rate)
    if not plan.solves_on_text:
        took += sum(_rounding(one) for one in (plan, *plan.others))
    outside = sum(outside_seconds(one, linear, _random(linear)) for one in (plan, *plan.others)
                  for linear in one.outside)
    return took + outside + hashing(plan, hash_rate()) + moving(plan, DISK_RATE)


def calibrated(plan: Plan) -> float:
    """Seconds of the blocks of a run on text, from small trials of their passes and of the recipe's steps."""
    known: dict[Any, float] = {}
    rate = _rate(plan.device, plan.compute_dtype)
    total = 0.0
    for stage in plan.stages:
        if stage.block is not None and stage.linears:
            total += _passes(plan, stage, known, rate) + sum(_solving(one, one.stage_like(stage), known)
                                                             for one in (plan, *plan.others) if plan.solves_on_text)
    saved = plan.temporary["resume"] / 2 * max(plan.blocks - 1, 0)
    return total + saved / DISK_RATE + distilling(plan, sum(known[tuple(_shapes(stage))] for stage in plan.stages
                                                            if stage.block is not None and stage.linears), rate)


def _passes(plan: Plan, stage: Stage, known: dict[Any, float], rate: float) -> float:
    """Text through one block: once, for H, and for what the steps look at before. known: what was tried."""
    shapes, length = tuple(_shapes(stage)), plan.recipe.calibration.sequence_length
    if shapes not in known:
        tried = trials.token_pass(plan, stage)
        known[shapes] = 2.0 * sum(rows * columns for rows, columns in shapes) / rate if tried is None else tried
    one, groups = known[shapes], shared_inputs(stage)
    looked = _looked_at(plan, "SCALES_INPUTS") + _looked_at(plan, "LISTS_OUTLIERS")
    samples = plan.samples * (1 + plan.float_share) + looked + (plan.samples if plan.recipe.measures_ranges else 0)
    took = (samples * length + learned_tokens(plan)) * one
    measured = plan.samples if plan.solves_on_text else 0
    surveyed = _looked_at(plan, "SURVEYS_MOMENTS")
    if measured or surveyed:
        took += length * sum(
            _once(known, ("gram", group[0].shape[1]), lambda: trials.gram(group[0].shape[1]))  # noqa: B023
            * (measured * _products(plan, group) + surveyed) for group in groups)
    if plan.scaling_steps:
        took += sum(_once(known, ("scaling", *((linear.shape, linear.scheme.label) for linear in group)),
                          lambda: trials.scaling(plan, group, one)) for group in groups)  # noqa: B023 - called here
    return took


def _looked_at(plan: Plan, mark: str) -> int:
    """Samples that the steps with a mark run through a block before it is solved."""
    return sum(min(options.samples, plan.samples) for _, options in found.having(mark, plan.steps))


def learned_tokens(plan: Plan) -> float:
    """What the steps that learn on a block run through it, in tokens of a forward pass: a backward one takes twice as
    much, and the held-out samples are looked at now and then."""
    fitting, held = _split(plan)
    return sum(options.epochs * (3 * options.share * fitting + 2 * held) + held for options in plan.learning)


def distilling(plan: Plan, one: float, rate: float) -> float:
    """Seconds of learning on the whole model. one: of a token forward through all blocks.  rate: operations a second.

    A step runs the blocks twice forward and once backward, and the head three times forward or backward and once for
    the original.
    """
    options = plan.distilling
    if options is None:
        return 0.0
    fitting, held = _split(plan)
    head = 2.0 * plan.skeleton.vocabulary * plan.skeleton.hidden / rate
    learned = min(options.epochs * fitting, options.budget_tokens or math.inf)
    looked = (1 + options.epochs * options.checks) * held
    took = learned * (4 * one + 4 * head) + looked * (one + 2 * head)
    return min(took, 60 * options.minutes) if options.minutes else took


def _split(plan: Plan) -> tuple[int, int]:
    """Tokens to learn from, and those that are held out."""
    spec = plan.recipe.calibration
    held = min(plan.samples - 1, math.ceil(plan.samples * spec.held_out))
    return (plan.samples - held) * spec.sequence_length, held * spec.sequence_length


def _solving(plan: Plan, stage: Stage, known: dict[Any, Any]) -> float:
    took = 0.0
    for group, tail in ((some, estimate.group_of(shared, work_of(plan)).tail > 0)
                        for shared in shared_inputs(stage) for some in same_scheme(shared)):
        make = plan.name, group[0].shape[1], group[0].scheme.model_dump_json(), tail
        tried = _once(known, make, lambda: trials.solving(plan, group[0], tail))  # noqa: B023 - called here
        took += tried.of(sum(linear.shape[0] for linear in group))
    return took


def _products(plan: Plan, group: Sequence[LinearPlan]) -> float:
    """What the statistics of linears that share their input take, in units of their H: it is symmetric, others are
    not."""
    tail = estimate.group_of(group, work_of(plan)).tail
    return 1 + 2 * plan.float_share * (1 + tail / group[0].shape[1])


def _once(known: dict[Any, Any], key: Any, find: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = find()
    return known[key]


def work(plan: Plan, stage: Stage) -> float:
    """What its linears take: floating-point operations of a calibrated run, elements to round of another.

    The outputs of a run with several share all but the solving.
    """
    if not plan.calibrated:
        return float(sum(one.shape[0] * one.shape[1] for one in stage.linears))
    passes = (1 if plan.device.type == "cpu" else 2) * (1 + plan.float_share)
    tokens = plan.samples * plan.recipe.calibration.sequence_length
    passed = passes * tokens + learned_tokens(plan)
    flops = 2.0 * passed * sum(rows * columns for rows, columns in _shapes(stage))
    groups = {(group[0].shape[1], _products(plan, group)) for group in shared_inputs(stage)}
    flops += sum(columns**2 * products for columns, products in groups) * tokens
    solved = sum(rows * columns**2 for rows, columns in _shapes(stage))  # N K², to solve
    tails = sum(one.tail * one.columns**2 for one in (estimate.group_of(group, work_of(plan))
                                                      for group in shared_inputs(stage)))
    return flops + ((20 if plan.float_share else 12) * solved + 8 * tails) * (1 + len(plan.others))


def one_pass(plan: Plan, rate: float) -> float:
    """Seconds of one token through all blocks, at so many operations a second."""
    return sum(2.0 * rows * columns for stage in plan.stages for rows, columns in _shapes(stage)) / rate


def searching(plan: Plan, rate: float = 0.0) -> float:
    """Seconds that the search of a budget takes. rate: operations a second, where that has been measured."""
    return search_flops(plan) / (rate or _rate(plan.device, plan.compute_dtype))


def search_flops(plan: Plan) -> float:
    """Of a budget, else 0. Two passes forward and H; on what is measured one more, one backward, the head and one
    product per candidate; and of every candidate a factor and a solve."""
    if plan.problem is None:
        return 0.0
    tokens = plan.recipe.search_samples * plan.recipe.calibration.sequence_length
    shapes = [shape for stage in plan.stages for shape in _shapes(stage)]
    weights, head = sum(rows * columns for rows, columns in shapes), plan.skeleton.vocabulary * plan.skeleton.hidden
    shared = {(linear.block, linear.shape[1]) for linear in plan.linears}
    candidates = plan.problem.most_candidates
    flops = tokens * (4.0 * weights + sum(columns**2 for _, columns in shared))
    flops += 2.0 * tokens * MEASURED * ((2 + candidates) * weights + 2 * head)
    if plan.calibrated:
        flops += candidates * 6.0 * sum(rows * columns**2 for rows, columns in shapes)
    return flops


def hashing(plan: Plan, rate: float) -> float:
    """Seconds to hash the source and the output, at `rate` bytes a second."""
    sources = plan.source_bytes / (rate * min(HASHERS, 1 + plan.source_bytes // SHARD_BYTES))
    return sources + sum(one.weight_bytes for one in (plan, *plan.others)) / rate


def moving(plan: Plan, rate: float) -> float:
    """Seconds to copy what lies outside of the blocks and to write the statistics that are kept, at `rate` bytes/s."""
    outside = sum(spec.nbytes for stage in plan.stages if stage.block is None for spec in stage.outputs)
    return (outside + plan.statistics_bytes) / rate


def hash_rate() -> float:
    """Bytes of memory whose sha256 one thread finds in a second."""
    data, start = bytes(32 << 20), time.perf_counter()
    hashlib.sha256(data)
    return len(data) / (time.perf_counter() - start)


def _shapes(stage: Stage) -> list[tuple[int, int]]:
    return [linear.shape for linear in stage.linears]


def _rounding(plan: Plan) -> float:
    """Of all linears of the blocks with the recipe's steps, from random weights of the first."""
    if not plan.linears:
        return 0.0
    elements = sum(one.shape[0] * one.shape[1] for one in plan.linears)
    linear = plan.linears[0]
    weight = _random(linear)
    shape = (len(weight), weight.shape[1])

    def round_all() -> None:
        layer = Layer(linear.name, weight, weight, linear.scheme, plan.format.scale_dtype(plan.model_dtype))
        for step, options in plan.steps:
            if not step.CALIBRATED:
                layer = step.run(layer, options)
        if layer.quantized is not None:
            packed = plan.format.pack(linear.stored, layer.quantized, plan.model_dtype)
            again = plan.format.unpack(linear.stored, packed.__getitem__, linear.scheme, shape)
            for quantized in (layer.quantized, again):
                found.load("grids", linear.scheme.grid).decode(quantized)

    return trials.timed(round_all) * elements / weight.numel()


def outside_seconds(plan: Plan, linear: LinearPlan, weight: torch.Tensor) -> float:
    """Seconds for an embedding or head, from some of its rows, `weight` [n, K]."""
    start = time.perf_counter()
    for chunk in rounded(plan.format, linear.stored, (len(weight), linear.shape[1]), linear.scheme, plan.model_dtype,
                         lambda first, last: weight[first:last], rtn.Options()):
        found.load("grids", linear.scheme.grid).decode(chunk.quantized)
    return (time.perf_counter() - start) * linear.shape[0] / len(weight)


def _random(linear: LinearPlan) -> torch.Tensor:
    rows, columns = linear.shape
    generator = torch.Generator().manual_seed(0)
    some = -(-min(rows, max(1, TRIAL_ELEMENTS // columns)) // 128) * 128  # whole blocks of those grids that share rows
    return torch.randn(some, columns, generator=generator) * 0.02


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a run, from those of a matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    left = torch.ones(size, size, device=device, dtype=dtype)
    left @ left
    start = time.perf_counter()
    for _ in range(3):
        product = left @ left
    float(product[0, 0])
    return EFFICIENCY * 3 * 2 * size**3 / (time.perf_counter() - start)
