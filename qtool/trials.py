"""Small trials of what a calibrated run does to a block, on random data of the model's shapes and with the recipe's own
steps: their seconds, which duration.py multiplies by counts.

Everything is done twice and timed the second time: the first also starts threads and chooses kernels. Long inputs are
cut, and the seconds scaled by the arithmetic.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool import found
from qtool.layer import Layer, Survey
from qtool.models import blocks
from qtool.models.statistics import run_block
from qtool.models.streams import StreamStore
from qtool.moments import HeldOut, add_gram
from qtool.plan import Plan
from qtool.rescale import SHRINK_STEPS
from qtool.stages import LinearPlan, Stage
from qtool.stream import TRIAL_TOKENS
from qtool.tensors import CalibrationStats

ROWS = (64, 192)  # of the matrices that are solved for a trial
COLUMNS = 2048  # of them, at most
TOKENS = 512  # of a product
PASS_FLOPS = 2e10  # of a trial of a block, at most
PASS_BYTES = 2 << 30  # of its weights; a larger one is not tried


@dataclass(frozen=True)
class Solving:
    """Seconds for one set of linears [N, K] that share their input: fixed + per_row N."""

    fixed: float
    per_row: float

    def of(self, rows: int) -> float:
        return self.fixed + self.per_row * rows


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a second call."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def solving(plan: Plan, linear: LinearPlan, tail: bool = False) -> Solving:
    """The steps of the plan on the inputs and scheme of a linear, then measuring, packing and reading back.

    tail: whether a target may follow what its outputs are added to.
    """
    columns = min(linear.shape[1], COLUMNS)
    stats = functools.cache(lambda rows: _statistics(plan, columns, rows))
    tried = _by_rows(lambda rows: _solve(plan, linear, _weight(rows, columns), replace(stats(rows if tail else 0))))
    longer = linear.shape[1] / columns
    return Solving(tried.fixed * longer**3, tried.per_row * longer**2)


def _by_rows(call: Callable[[int], Any]) -> Solving:
    """What is the same for every number of rows, and what each of them takes."""
    few = timed(lambda: call(ROWS[0]))
    start = time.perf_counter()
    call(ROWS[1])
    per_row = max(time.perf_counter() - start - few, 0.0) / (ROWS[1] - ROWS[0])
    return Solving(max(few - per_row * ROWS[0], 0.0), per_row)


def gram(columns: int) -> float:
    """Seconds to add one token to the H of inputs with so many columns."""
    width = min(columns, COLUMNS)
    x, total = torch.randn(TOKENS, width), torch.zeros(width, width)
    return timed(lambda: add_gram(total, x)) / TOKENS * (columns / width) ** 2


def scaling(plan: Plan, group: Sequence[LinearPlan], one: float) -> float:
    """Seconds to look for the channel scales of linears that share their input. one: of a token in the block.

    Each step's own search, on some rows; where it leaves several candidates, each is rounded and tried on the block.
    """
    rows, columns = sum(linear.shape[0] for linear in group), group[0].shape[1]
    width, total = min(columns, COLUMNS), 0.0
    for step, options in found.having("SCALES_INPUTS", plan.steps):
        some = torch.randn(getattr(options, "tokens", 2 * width), width)
        size = some.abs()
        look = Survey(size.mean(0), size.amax(0), torch.zeros(width), some, some.T @ some / len(some))
        found_scales: list[Any] = []

        def search(count: int) -> None:
            layer = _layer(plan, group[0], _weight(count, width))
            found_scales[:] = step.input_scales(layer, look, options)  # noqa: B023

        tried, longer = _by_rows(search), columns / width
        cubic = 3 if getattr(step, "SURVEYS_MOMENTS", False) else 1  # H is factored, whatever the rows
        total += tried.fixed * longer**cubic + tried.per_row * rows * longer
        candidates = len(found_scales)
        if candidates > 1:
            again = _by_rows(lambda count: _rounded(_layer(plan, group[0], _weight(count, width)), some))  # noqa: B023
            total += candidates * (again.of(rows) * columns / width + one * TRIAL_TOKENS)
    return total


def _layer(plan: Plan, linear: LinearPlan, weight: torch.Tensor, stats: CalibrationStats | None = None) -> Layer:
    return Layer(linear.name, weight, weight, linear.scheme, plan.format.scale_dtype(plan.model_dtype), stats)


def token_pass(plan: Plan, stage: Stage) -> float | None:
    """Seconds of one token in a block, from a batch of the run; None for a block that is too large to be tried."""
    elements = sum(one.shape[0] * one.shape[1] for one in stage.linears)
    if elements * plan.compute_dtype.itemsize > PASS_BYTES or not elements:
        return None
    settings = plan.recipe.calibration
    length = max(16, min(settings.sequence_length, int(PASS_FLOPS / 2 / elements)))
    size = max(1, min((settings.batch_tokens or 0) // length, int(PASS_FLOPS / 2 / elements / length), plan.samples))
    index, batch = stage.block or 0, slice(0, size)
    read = _one_row(plan)
    store = StreamStore(size, length, plan.skeleton.hidden, plan.model_dtype, 1 << 40)
    with torch.inference_mode():
        ids = torch.zeros(size, length, dtype=torch.int64)
        arguments = blocks.capture(plan.skeleton, read, ids, store, plan.device, plan.compute_dtype, [batch])
        block = blocks.load_block(plan.skeleton, index, read, plan.device, plan.compute_dtype)
        return timed(lambda: store.write(batch, run_block(block, arguments, index, store, batch, plan.device,
                                                          plan.compute_dtype))) / (size * length)


def _one_row(plan: Plan) -> blocks.Read:
    """Every row of a weight is one and the same; that of an embedding is there only once."""
    shapes = {plan.skeleton.source(name): shape for name, shape in plan.skeleton.parameters.items()}
    tables = {plan.skeleton.source(name) for name in plan.skeleton.embeddings}

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        row = torch.randn(shape[-1:], generator=torch.Generator().manual_seed(0))
        weight = (row if len(shape) < 2 else row / shape[-1] ** 0.5).to(plan.model_dtype).expand(shape)
        return weight if name in tables else weight.contiguous()
    return read


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def _statistics(plan: Plan, columns: int, tail: int) -> CalibrationStats:
    """tail: rows of what the outputs are added to, 0 where that is not followed."""
    x = _weight(columns + TOKENS, columns) * 50
    hessian = x.T @ x / len(x)
    held = {"gram": hessian, **({"cross": hessian * 0.01} if plan.float_stream else {})}
    if tail:
        held["residual"] = _weight(tail, columns)
    held_out = HeldOut.restored(TOKENS, plan.float_stream, columns, held, plan.device)
    return CalibrationStats(hessian, held_out, len(x), held.get("cross"), hessian if 0 < plan.float_share < 1 else None,
                            residual=held.get("residual"))


def _solve(plan: Plan, linear: LinearPlan, weight: torch.Tensor, stats: CalibrationStats) -> None:
    layer = _layer(plan, linear, weight, stats)
    for step, options in plan.steps:
        layer = step.run(layer, options)
    if layer.quantized is None:
        return
    decode, shape = found.load("grids", linear.scheme.grid).decode, (len(weight), weight.shape[1])
    for matrix in (layer.target, layer.target - decode(layer.quantized)):
        stats.held_out.energy(matrix)
    packed = plan.format.pack(linear.stored, layer.quantized, plan.model_dtype)
    decode(plan.format.unpack(linear.stored, packed.__getitem__, linear.scheme, shape))


def _rounded(layer: Layer, some: torch.Tensor) -> None:
    grid = found.load("grids", layer.scheme.grid)
    fitted = grid.fit(layer.weight, layer.scheme, layer.scale_dtype, some.square().mean(0), SHRINK_STEPS, True, 1)
    grid.decode(grid.encode(layer.weight, fitted))
