"""Peak memory and time of a plan, before it runs. Every term is one buffer that the pipeline really holds.

Memory is that of the process on a CPU; the terms are named so that `--dry-run --json` can be held against a profile.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qtool.models.skeleton import Skeleton
from qtool.recipe import Recipe

if TYPE_CHECKING:
    from qtool.plan import Stage

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
    largest = max((spec.nbytes for stage in work.stages for spec in stage.outputs), default=0)
    solve = max((_solving(*linear.shape, work) for stage in work.stages for linear in stage.linears), default=0)
    if not work.calibrated:
        return {"runtime": base, "tensor": largest, "solve": solve, "peak": base + max(largest, solve)}
    compute = work.compute_dtype.itemsize
    blocks = [_block(stage, work) for stage in work.stages if stage.block is not None]
    weights, statistics, solve, forward, source = (max(values) for values in zip(*blocks, strict=True))
    weights *= work.streams
    stream = work.tokens * work.skeleton.hidden * work.model_dtype.itemsize
    held = min(stream * work.streams, int(work.recipe.memory_budget_gb * 1e9))
    embedding = work.skeleton.vocabulary * work.skeleton.hidden * compute
    running = weights + statistics + max(solve + source, forward)
    return {"runtime": base, "stream": stream, "weights": weights, "statistics": statistics, "solve": solve,
            "forward": forward, "read_ahead": source, "embedding": embedding, "kept_in_files": _kept(work),
            "peak": base + held + max(running, embedding + largest)}


def _kept(work: Work) -> int:
    """Inputs and outputs of the parts of a block (staged.py), in files; a GPU keeps none."""
    if work.device.type != "cpu":
        return 0
    widest = max((linear.shape[1] for stage in work.stages for linear in stage.linears), default=0)
    return work.tokens * (widest + 2 * work.skeleton.hidden) * work.model_dtype.itemsize * work.streams


def seconds(work: Work) -> float | None:
    """From the arithmetic and the rate of one small matrix product here; rough, and None for data-free plans."""
    if not work.calibrated:
        return None
    linear_weights = sum(linear.shape[0] * linear.shape[1] for stage in work.stages for linear in stage.linears)
    shared = {(linear.block, linear.shape[1]): linear.shape for stage in work.stages for linear in stage.linears}
    passes = (1 if work.device.type == "cpu" else 2) * (1 + work.float_share)
    flops = 2.0 * passes * work.tokens * linear_weights
    flops += sum(columns**2 * work.tokens * (1 + 2 * work.float_share) for _, columns in shared.values())
    products = sum(one.shape[0] * one.shape[1] ** 2 for stage in work.stages for one in stage.linears)  # N K², to solve
    flops += (20 if work.float_share else 12) * products
    return flops / _rate(work.device, work.compute_dtype)


def _block(stage: Stage, work: Work) -> tuple[int, int, int, int, int]:
    """(weights, statistics, largest solve, forward, next block as read) of one block, in bytes."""
    compute = work.compute_dtype.itemsize
    elements = sum(one.shape[0] * one.shape[1] for one in stage.linears)
    widths: dict[int, int] = {}
    for one in stage.linears:  # linears of one width and parent share their input, or come close to it
        widths[one.shape[1]] = widths.get(one.shape[1], 0) + one.shape[0]
    parents = {(one.name.rpartition(".")[0], one.shape[1]) for one in stage.linears}
    matrices = 2 if not work.float_share else 4 if work.float_share == 1 else 5
    statistics = sum(columns**2 for _, columns in parents) * 4 * matrices
    solve = max((_solving(one.shape[0], one.shape[1], work) for one in _stacked(stage)), default=0)
    batch = work.recipe.calibration.batch_tokens or 0  # the plan fills it in
    widest = max((max(one.shape) for one in stage.linears), default=0)
    forward = batch * (3 * widest + 6 * work.skeleton.hidden) * compute
    return elements * compute, statistics, solve, forward, elements * work.model_dtype.itemsize


@dataclass(frozen=True)
class _Stack:
    shape: tuple[int, int]


def _stacked(stage: Stage) -> list[_Stack]:
    """Linears that will probably be solved together: same parent module, same input width."""
    rows: dict[tuple[str, int], int] = {}
    for one in stage.linears:
        key = (one.name.rpartition(".")[0], one.shape[1])
        rows[key] = rows.get(key, 0) + one.shape[0]
    return [_Stack((count, columns)) for (_, columns), count in rows.items()]


def _solving(rows: int, columns: int, work: Work) -> int:
    """Working set of one solve: float32 W, permuted W, D, E, the decoded answer, codes; H in solving order and L."""
    if not work.calibrated:
        return rows * columns * (work.model_dtype.itemsize + 4 + 4 + 4 + 2)
    return rows * columns * (4 * 5 + 3) + columns * columns * 4 * 2


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if device.type == "cpu" else 8192
    left = torch.ones(size, size, device=device, dtype=dtype)
    left @ left
    start = time.perf_counter()
    for _ in range(3):
        product = left @ left
    float(product[0, 0])
    return 3 * 2 * size**3 / (time.perf_counter() - start)
