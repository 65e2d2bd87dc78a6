"""Times the first part of a run, in a temporary place beside the output, and scales up: `--dry-run --probe`.

The heaviest block is solved as the run will do it (on the stream at the entrance of the first one), and, where that was
quick, the next one too: what is done once, at the first block, is then no part of the rest. Blocks of other sizes are
scaled by their arithmetic. Peak memory is the kernel's count over these blocks.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qtool import console, container, duration, estimate, heap, lock, pipeline, prepare, reading, rotate, storage
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import OutputError
from qtool.plan import Plan
from qtool.stages import Stage
from qtool.stream import Stream
from qtool.workspace import Workspace

QUICK = 15.0  # seconds; after a block that takes less, a second one is timed
SAMPLE_BYTES = 128 << 20  # of the tensors that the speed of the disk is measured on
Tell = Callable[[str], None]


def predicted(checkpoint: Checkpoint, plan: Plan, tell: Tell) -> dict[str, Any]:
    """`seconds`, `peak_memory` and `gpu_memory` of the run, and under `probe` what they come from (docs/json.md).

    Writes and reads some of the model beside the output; nothing of it stays.
    """
    folder = storage.standing(plan.out)
    torch.manual_seed(plan.recipe.seed)
    heap.reuse()
    prefix = f".{plan.out.name}-probe-"
    for old in folder.glob(f"{glob.escape(prefix)}*"):  # of one that was killed
        with suppress(OutputError, OSError), lock.folder(old):
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as place, lock.folder(Path(place)):
        began = time.monotonic()
        disk = _disk_rate(checkpoint, plan, Path(place))
        outside = sum(_outside(checkpoint, one) for one in (plan, *plan.others))
        _reset_peak(plan.device)
        opened, blocks = _solve(checkpoint, plan, Path(place) / "probe", tell)
    peak = _peak_memory()
    known: dict[str, Any] = {"blocks": blocks, "before": round(opened, 3), "outside": round(outside, 3),
             "disk_rate": round(disk), "hash_rate": round(duration.hash_rate()), "seconds": 0.0,
             "peak_memory": peak, "gpu_memory": None}
    if plan.device.type == "cuda":
        known["gpu_memory"] = int(torch.cuda.max_memory_allocated(plan.device))
    known["seconds"] = round(time.monotonic() - began, 3)
    around = estimate.resident() + max(plan.memory.get(key, 0) for key in ("search", "outside"))
    return {"seconds": round(_total(plan, known), 3), "peak_memory": max(peak, around),
            "gpu_memory": known["gpu_memory"], "probe": known}


def _total(plan: Plan, known: dict[str, Any]) -> float:
    """Seconds of the whole run from what was measured."""
    counts = {stage.block: duration.work(plan, stage) for stage in plan.stages if stage.block is not None}
    timed = {one["block"]: one["seconds"] for one in known["blocks"]}
    like = known["blocks"][-1]
    rate = max(counts[like["block"]], 1.0) / max(like["seconds"], 1e-9)
    blocks = sum(timed.get(index, count / rate) for index, count in counts.items())
    search = duration.searching(plan, rate if plan.calibrated else 0.0) if plan.problem else 0.0
    search += duration.distilling(plan, duration.one_pass(plan, rate), rate)
    return float(known["before"] + search + blocks + known["outside"] + duration.moving(plan, known["disk_rate"])
                 + duration.hashing(plan, known["hash_rate"]))


def _solve(checkpoint: Checkpoint, plan: Plan, out: Path, tell: Tell) -> tuple[float, list[dict[str, Any]]]:
    """(seconds until the stream stands before the first block, the blocks that were solved with their seconds)"""
    cut = _cut(plan, out)
    tell("running the text to the first block" if plan.text_samples else "reading")
    began = time.monotonic()
    tokens = prepare.tokens_of(checkpoint, plan)
    source = rotate.view(checkpoint, plan.rotated)
    blocks = []
    with torch.no_grad() if plan.learning else torch.inference_mode(), Workspace(out, {}) as work:
        jobs = [pipeline.Job(source, one, container.open_writer(one, work.folder, checkpoint.name), console.Silent())
                for one in (cut, *cut.others)]
        stream = Stream.open(cut, source.read, tokens, work) if tokens is not None and plan.calibrated else None
        opened = time.monotonic() - began
        for stage, weights in reading.ahead(source, cut, ()):
            index = stage.block or 0
            tell(f"solving block {index + 1}")
            began = time.monotonic()
            pipeline.do_stage(jobs, stage, weights, stream)
            heap.give_back()
            for job in jobs:
                job.writer.sync()
            if stream is not None:
                stream.save(index + 1)
            blocks.append({"block": index, "seconds": round(time.monotonic() - began, 4)})
            if blocks[0]["seconds"] > QUICK:
                break
        for job in jobs:
            job.writer.close()
    return opened, blocks


def _cut(plan: Plan, out: Path) -> Plan:
    """The plan of the heaviest block and the one after it."""
    counts = {stage.block: duration.work(plan, stage) for stage in plan.stages if stage.block is not None}
    heaviest = max(counts, key=lambda index: (counts[index], -(index or 0)))

    def some(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        return tuple(stage for stage in stages if stage.block in (heaviest, (heaviest or 0) + 1))

    return replace(plan, out=out, stages=some(plan.stages),
                   others=tuple(replace(one, out=out, stages=some(one.stages)) for one in plan.others))


def _outside(checkpoint: Checkpoint, plan: Plan) -> float:
    """Seconds for the embeddings and the head, where they are quantized."""
    total = 0.0
    for linear in plan.outside:
        rows = min(linear.shape[0], max(1, 2 * duration.TRIAL_ELEMENTS // linear.shape[1]))
        total += duration.outside_seconds(plan, linear, checkpoint.read_rows(f"{linear.stored}.weight", 0, rows))
    return total


def _disk_rate(checkpoint: Checkpoint, plan: Plan, folder: Path) -> float:
    """Bytes a second that go from the source to the output's disk, from the largest tensor."""
    spec = max(checkpoint.specs.values(), key=lambda one: one.nbytes)
    row = max(1, spec.nbytes // max(1, spec.shape[0] if spec.shape else 1))
    rows = max(1, min(spec.shape[0], SAMPLE_BYTES // row))
    began = time.monotonic()
    tensor = checkpoint.read_rows(spec.name, 0, rows)
    with (folder / "copy").open("wb") as file:
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return rows * row / max(time.monotonic() - began, 1e-9)


def _reset_peak(device: torch.device) -> None:
    with suppress(OSError):  # where it cannot be reset, it includes what planning took
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return estimate.resident()
