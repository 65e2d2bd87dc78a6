"""The weights of a run's stages, read before they are needed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.plan import Plan
from qtool.stages import Stage


def ahead(checkpoint: Checkpoint, plan: Plan, finished: Container[str]) -> Iterator[
        tuple[Stage, dict[str, torch.Tensor]]]:
    """Every unfinished stage with its weights; when calibrating, block i + 1 is read while block i is solved."""
    todo = [stage for stage in plan.stages if stage.name not in finished]
    if not plan.calibrated:
        yield from ((stage, {}) for stage in todo)
        return

    def read(stage: Stage) -> dict[str, torch.Tensor]:
        if stage.block is None:
            return {}
        names = {plan.skeleton.source(name) for name in plan.skeleton.block_parameters(stage.block)}
        return {name: checkpoint.read(name) for name in sorted(names)}

    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        future = pool.submit(read, todo[0]) if todo else None
        for place, stage in enumerate(todo):
            weights = future.result() if future else {}
            future = pool.submit(read, todo[place + 1]) if place + 1 < len(todo) else None
            yield stage, weights
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a stopped command does not wait for a download
