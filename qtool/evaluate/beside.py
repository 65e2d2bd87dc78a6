"""What is measured beside the predictions: memory at inference, speed, accuracy on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qtool import footprint, heap
from qtool.decode import Source
from qtool.evaluate import predictions, speed, tasks
from qtool.evaluate.predictions import Step


@dataclass(frozen=True)
class Wanted:
    """memory_context: tokens of each of memory_batch sequences, whose memory is computed; None: not wanted."""

    memory_context: int | None = None
    memory_batch: int = 1
    speed: bool = False
    tasks: tasks.Tasks | None = None


def add(result: dict[str, Any], models: Sequence[Source], base: Source | None, wanted: Wanted, step: Step) -> None:
    """Put `memory`, `speed` and `tasks` into the rows of an evaluation, and into its notes what could not be had.

    Models are loaded one after the other, on the device and in the type of the evaluation; speed is measured in the
    model's own type.
    """
    rows = [*([result["against"]] if base is not None else []), *result["models"]]
    sources = [*([base] if base is not None else []), *models]
    device = torch.device(result["device"])
    dtype = getattr(torch, result["compute_dtype"])
    scores: list[Any] = []
    for row, source in zip(rows, sources, strict=True):
        if wanted.memory_context is not None:
            row["memory"] = footprint.inference(source, wanted.memory_context, wanted.memory_batch)
        if not (wanted.speed or wanted.tasks):
            continue
        if not predictions.fits(source, device, dtype, 0):
            result["notes"].append(f"{source.name} does not fit in memory: neither timed nor run on tasks")
            scores.append({})
            continue
        if wanted.speed:
            step(0, 1, f"{source.name}: speed")
            row["speed"] = speed.measure(source, device)
            heap.give_back()
        if wanted.tasks is not None:
            row["tasks"], found = tasks.measure(source, wanted.tasks, device, dtype, step)
            scores.append(found)
            heap.give_back()
    if base is not None and wanted.tasks is not None:
        for row, found in zip(rows[1:], scores[1:], strict=True):
            tasks.compare(row.get("tasks", []), found, scores[0])
