"""Peak memory and time of a plan, before it runs. Every term is one buffer that the pipeline really holds.

Memory is that of the process on a CPU; the terms are named so that `--dry-run --json` can be held against a profile.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qtool.budget import MEASURED
from qtool.models.backward import ROWS
from qtool.models.skeleton import Skeleton
from qtool.recipe import Recipe
from qtool.tensors import any_number

if TYPE_CHECKING:
    from qtool.stages import Stage

PAGE = 4096


@dataclass(frozen=True)
class Work:
    """What the estimates look at."""

    skeleton: Skeleton
    stages: tuple[Stage, ...]
    recipe: Recipe
    device: torch.device
    model_dtype: torch.dtype
    compute_dtype: torch.dtype
    samples: int
    calibrated: bool
    float_share: float
    rotated: bool = False
    candidates: int = 0  # of a budget: the most schemes that one linear may take

    @property
    def streams(self) -> int:
        """How many run through the blocks: one, or with the unquantized model's two."""
        return 2 if self.float_share else 1

    @property
    def tokens(self) -> int:
        return self.samples * self.recipe.calibration.sequence_length


def resident() -> int:
    """Bytes of memory that this process holds now (0 where the system does not tell)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except OSError:
        return 0


def memory(work: Work) -> dict[str, int]:
    """Bytes by purpose; `peak` is the largest sum that is held at one time."""
    base = resident()
    terms = _memory(work, base)
    if work.recipe.search_samples:
        terms |= _search(work)
        terms["peak"] = max(terms["peak"], base + terms["search"])
    return terms


def _memory(work: Work, base: int) -> dict[str, int]:
    largest = max((spec.nbytes for stage in work.stages for spec in stage.outputs), default=0)
    solve = max((_solving(*linear.shape, work) for stage in work.stages for linear in stage.linears), default=0)
    trial = max(_trial(work.skeleton, index) for index in range(len(work.skeleton.blocks))) if work.rotated else 0
    if not work.calibrated:
        return {"runtime": base, "tensor": largest, "solve": solve, "trial": trial,
                "peak": base + max(largest, solve, trial)}
    compute = work.compute_dtype.itemsize
    blocks = [_block(stage, work) for stage in work.stages if stage.block is not None]
    weights, statistics, solve, forward, source = (max(values) for values in zip(*blocks, strict=True))
    stream = work.tokens * work.skeleton.hidden * work.model_dtype.itemsize
    held = min(stream * work.streams, int(work.recipe.memory_budget_gb * 1e9))
    embedding = work.skeleton.vocabulary * work.skeleton.hidden * compute
    running = weights + source + max(statistics + forward, solve)
    return {"runtime": base, "stream": stream, "weights": weights, "statistics": statistics, "solve": solve,
            "forward": forward, "read_ahead": source, "embedding": embedding, "kept_in_files": _kept(work),
            "trial": trial, "peak": base + max(held + max(running, embedding + largest), trial)}


def _trial(skeleton: Skeleton, index: int) -> int:
    """A block in float32 on which rotations are tried; its experts share the weights of the first."""
    shapes = {any_number(name): skeleton.parameters[name] for name in skeleton.block_parameters(index)}
    return 4 * sum(map(math.prod, shapes.values()))


def _kept(work: Work) -> int:
    """Inputs and outputs of the parts of a block (staged.py), in files; a GPU keeps none."""
    if work.device.type != "cpu":
        return 0
    widest = max((linear.shape[1] for stage in work.stages for linear in stage.linears), default=0)
    return work.tokens * (widest + 2 * work.skeleton.hidden) * work.model_dtype.itemsize * work.streams


def _search(work: Work) -> dict[str, int]:
    """The search for schemes (sensitivity.py): the stream and its gradient with the head or with one block; its files.

    The head: the embedding, itself, logits, their gradient and some rows in float32. A block: all its statistics, what
    autograd keeps of a batch (the scores of the attention too), or one solve.
    """
    length, compute, hidden = work.recipe.calibration.sequence_length, work.compute_dtype.itemsize, work.skeleton.hidden
    tokens = work.recipe.search_samples * length
    measured = int(tokens * MEASURED) + length
    stream = tokens * hidden * work.model_dtype.itemsize + measured * hidden * 4
    vocabulary = work.skeleton.vocabulary
    head = vocabulary * (hidden * (work.model_dtype.itemsize + compute) + 3 * length * compute + 4 * ROWS * 4)
    batch, largest, kept = work.recipe.calibration.batch_tokens or 0, 0, 0
    for stage in work.stages:
        if stage.block is not None:
            groups, elements = _groups(stage), sum(one.shape[0] * one.shape[1] for one in stage.linears)
            widest = max((max(one.shape) for one in stage.linears), default=0)
            forward = batch * (6 * widest + 12 * hidden + 3 * length * hidden // 64) * compute
            solve = max((_solving(*group, work) for group in groups), default=0)
            sums = sum(4 * columns**2 for _, columns in groups)
            kept = max(kept, sum(one.shape[1] * work.model_dtype.itemsize + one.shape[0] * 4 for one in stage.linears
                                 if ".experts." not in one.name))
            largest = max(largest, elements * (compute + work.model_dtype.itemsize) + sums + max(forward, solve))
    held = min(stream, int(work.recipe.memory_budget_gb * 1e9))
    blocks = sum(stage.block is not None for stage in work.stages)
    files = tokens * hidden * work.model_dtype.itemsize * (blocks + 1) + measured * (8 * hidden + kept)
    return {"search": held + max(head, largest), "search_files": files}


def seconds(work: Work) -> float | None:
    """From the arithmetic and the rate of one small matrix product here; rough, and None for data-free plans."""
    flops = (_run_flops(work) if work.calibrated else 0.0) + _search_flops(work)
    return flops / _rate(work.device, work.compute_dtype) if flops else None


def _search_flops(work: Work) -> float:
    """Of a budget, else 0. Two passes forward and H; on what is measured one more, one backward, the head and one
    product per candidate; and of every candidate a factor and a solve."""
    tokens = work.recipe.search_samples * work.recipe.calibration.sequence_length
    linears = [linear.shape for stage in work.stages for linear in stage.linears]
    shared = {(linear.block, linear.shape[1]) for stage in work.stages for linear in stage.linears}
    weights, head = sum(rows * columns for rows, columns in linears), work.skeleton.vocabulary * work.skeleton.hidden
    flops = tokens * (4.0 * weights + sum(columns**2 for _, columns in shared))
    flops += 2.0 * tokens * MEASURED * ((2 + work.candidates) * weights + 2 * head)
    if work.calibrated:
        flops += work.candidates * 6.0 * sum(rows * columns**2 for rows, columns in linears)
    return flops


def _run_flops(work: Work) -> float:
    linear_weights = sum(linear.shape[0] * linear.shape[1] for stage in work.stages for linear in stage.linears)
    shared = {(linear.block, linear.shape[1]): linear.shape for stage in work.stages for linear in stage.linears}
    passes = (1 if work.device.type == "cpu" else 2) * (1 + work.float_share)
    flops = 2.0 * passes * work.tokens * linear_weights
    flops += sum(columns**2 * work.tokens * (1 + 2 * work.float_share) for _, columns in shared.values())
    products = sum(one.shape[0] * one.shape[1] ** 2 for stage in work.stages for one in stage.linears)  # N K², to solve
    flops += (20 if work.float_share else 12) * products
    return flops


def _block(stage: Stage, work: Work) -> tuple[int, int, int, int, int]:
    """(weights, statistics, solving with them, forward, blocks as read) of one block, in bytes."""
    compute, elements = work.compute_dtype.itemsize, sum(one.shape[0] * one.shape[1] for one in stage.linears)
    groups = _groups(stage)
    sums = [_statistics(columns, work) for _, columns in groups]
    solving = [_solving(rows, columns, work) for rows, columns in groups]
    if any(".experts." in one.name for one in stage.linears):  # all are collected before the first is solved
        statistics, solve = sum(sums), sum(sums) + max(solving)
    else:
        statistics, solve = max(sums, default=0), max(solving, default=0)
    batch = work.recipe.calibration.batch_tokens or 0  # the plan fills it in
    widest = max((max(one.shape) for one in stage.linears), default=0)
    forward = batch * (3 * widest + 6 * work.skeleton.hidden) * compute
    as_read = elements * work.model_dtype.itemsize
    # this block's weights as read are the block's own where no conversion is needed; the next block's come on top
    return (elements * compute * work.streams, statistics, solve, forward,
            as_read * (1 if work.compute_dtype is work.model_dtype else 2))


def _groups(stage: Stage) -> list[tuple[int, int]]:
    """(rows, columns) of the linears that will probably be solved together: same parent module, same input width."""
    rows: dict[tuple[str, int], int] = {}
    for one in stage.linears:
        key = (one.name.rpartition(".")[0], one.shape[1])
        rows[key] = rows.get(key, 0) + one.shape[0]
    return [(count, columns) for (_, columns), count in rows.items()]


def _statistics(columns: int, work: Work) -> int:
    """Sums over the inputs of one group while they are collected: H, of paired tokens again, cross; held-out tokens."""
    matrices = 1 if not work.float_share else 2 if work.float_share == 1 else 3
    return 4 * columns**2 * matrices + _held_out(columns, work)


def _held_out(columns: int, work: Work) -> int:
    tokens = math.ceil(work.samples * work.recipe.calibration.held_out) * work.recipe.calibration.sequence_length
    if tokens < columns:
        return tokens * columns * work.compute_dtype.itemsize * work.streams
    return 4 * columns**2 * work.streams


def _solving(rows: int, columns: int, work: Work) -> int:
    """Working set of one solve, statistics included.

    The target: W, its change twice; H, H of the paired tokens, L and the matrix that it comes from. The codes: W,
    target, the decoded answer, D, E, codes; H, H in solving order, L.
    """
    weights = rows * columns
    if not work.calibrated:
        return weights * (work.model_dtype.itemsize + 4 + 4 + 4 + 2)
    target = weights * 12 + columns**2 * 4 * (4 if work.float_share < 1 else 3) if work.float_share else 0
    codes = weights * ((20 if work.float_share else 16) + 3) + columns**2 * 4 * 3
    return max(target, codes) + _held_out(columns, work)


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if device.type == "cpu" else 8192
    left = torch.ones(size, size, device=device, dtype=dtype)
    left @ left
    start = time.perf_counter()
    for _ in range(3):
        product = left @ left
    float(product[0, 0])
    return 3 * 2 * size**3 / (time.perf_counter() - start)
