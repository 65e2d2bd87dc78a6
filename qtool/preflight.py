"""Whether this machine is large enough for a plan, and what to change where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qtool import container, devices, estimate, storage
from qtool.errors import PlanError
from qtool.plan import Plan, work_of
from qtool.units import size

SPARE_SAMPLES = 16  # fewer are no remedy
LEAST_BATCH = 256  # tokens; smaller batches are no remedy
CGROUPS = (("/sys/fs/cgroup", "memory.max", "memory.current"),
           ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
CACHE = ("inactive_file", "active_file")  # of memory.stat: what the kernel gives back when it is wanted


def described(plan: Plan, name: str) -> dict[str, Any]:
    """What the JSON of a plan tells of its needs and of the machine (docs/json.md). name: of the checkpoint."""
    files = {(f"{one.name}/{file}" if one.name else file): count for one in (plan, *plan.others)
             for file, count in container.files(one, name).items()}
    return {"files": files, "gpu_memory": plan.memory.get("gpu"), "machine": machine(plan)}


def machine(plan: Plan) -> dict[str, Any]:
    """Bytes that this run could have: memory, that of the GPU (None: there is none), disk where the output goes."""
    gpu = None
    if plan.device.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.mem_get_info(plan.device)[0]
    return {"memory": available_memory(), "gpu_memory": gpu, "disk": storage.free(plan.out)}


def available_memory() -> int | None:
    """Bytes that this process may come to hold: what it has and what is free, within the limit of its container."""
    known = estimate.meminfo()
    if "MemAvailable" not in known:
        return None
    return estimate.resident() + min([known["MemAvailable"], *_cgroup_room()])


def _cgroup_room() -> Iterator[int]:
    """Bytes that the container may still take, where it has a limit."""
    for folder, limit, usage in CGROUPS:
        try:
            texts = [(Path(folder) / name).read_text(encoding="ascii").strip() for name in (limit, usage)]
            stat = (Path(folder) / "memory.stat").read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        if all(text.isdigit() for text in texts):
            cached = sum(int(value) for name, value in map(str.split, stat) if name in CACHE)
            yield max(int(texts[0]) - int(texts[1]) + cached, 0)


def shortfalls(plan: Plan, measured: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """What does not fit: `what`, bytes `needed` and `available`, and `remedies`, each of which is enough by itself.

    measured: peak_memory and gpu_memory of a probe, in place of the estimate's.
    """
    has = machine(plan)
    needs = {what: _needed(plan, what) for what in ("memory", "gpu_memory", "disk")}
    if measured is not None:
        needs |= {"memory": measured["peak_memory"], "gpu_memory": measured["gpu_memory"] or 0}
    return [{"what": what, "needed": needs[what], "available": has[what], "remedies": _remedies(plan, what, has[what])}
            for what in needs if has[what] is not None and needs[what] > has[what]]


def message(plan: Plan, short: list[dict[str, Any]]) -> str:
    """The sentences for what does not fit."""
    names = {"memory": "memory", "gpu_memory": f"memory of {plan.device}",
             "disk": f"disk in {storage.standing(plan.out)}"}
    return "\n".join(storage.shortage("the run", one["needed"], names[one["what"]], one["available"], one["remedies"])
                     for one in short)


def refuse(plan: Plan) -> None:
    """Raise PlanError where the disk has too little room for the run, or the machine can never have the memory;
    InputError where the device is missing."""
    devices.refuse_missing(plan.device)
    known = estimate.meminfo()
    for one in shortfalls(plan):
        if one["what"] != "memory" or one["needed"] > known.get("MemTotal", one["needed"]) + known.get("SwapTotal", 0):
            raise PlanError(message(plan, [one]))


def notes(plan: Plan) -> list[str]:
    """A run is not refused for memory that others hold now; it is said."""
    return [message(plan, [one]).replace("this machine is too small: ", "memory is short: ")
            for one in shortfalls(plan) if one["what"] == "memory"]


def _remedies(plan: Plan, what: str, available: int) -> list[str]:
    """Changes to the command that make it fit, as the estimate has it; else how far they go and what remains."""
    found = [text for text, changed in _changes(plan, what) if _needed(changed, what) <= available]
    first = list({text.partition("=")[0]: text for text in reversed(found)}.values())[::-1]
    if what == "disk":
        return [*first, "choose an --out on another disk"]
    if first:
        return first
    least = min((_needed(changed, what) for _, changed in _changes(plan, what)), default=_needed(plan, what))
    other = [] if what == "memory" else ["--device cpu"]
    if plan.calibrated:
        other.append("a data-free method such as rtn")
    return [*other, f"a larger machine: with smaller settings it still needs {size(least)}"]


def _needed(plan: Plan, what: str) -> int:
    return {"memory": plan.peak_memory, "gpu_memory": plan.memory.get("gpu", 0), "disk": plan.disk_bytes}[what]


def _changes(plan: Plan, what: str) -> Iterator[tuple[str, Plan]]:
    """Smaller settings, the largest of each kind first."""
    if not plan.text_samples:
        return
    if what == "disk" and plan.recipe.keep_statistics:
        yield "leave --keep-statistics out", replace(plan, recipe=plan.recipe.model_copy(
            update={"keep_statistics": False}))
    given = plan.recipe.calibration
    if what == "memory" and plan.memory.get("stream"):
        yield "--set memory_budget_gb=0.001", _with(plan, memory_budget_gb=0.001)
    batch = (given.batch_tokens or 0) // 2
    while what != "disk" and batch >= max(LEAST_BATCH, given.sequence_length):
        yield f"--set calibration.batch_tokens={batch}", _with(plan, batch_tokens=batch)
        batch //= 2
    samples = plan.samples // 2
    while samples >= SPARE_SAMPLES:
        yield f"--set calibration.samples={samples}", _with(plan, samples=samples)
        samples //= 2
    if what != "disk" and batch >= LEAST_BATCH:
        both = _with(plan, batch_tokens=LEAST_BATCH, memory_budget_gb=0.001)
        yield f"--set memory_budget_gb=0.001 --set calibration.batch_tokens={LEAST_BATCH}", both


def _with(plan: Plan, **settings: Any) -> Plan:
    """The plan with other settings, estimated anew."""
    top = {key: settings.pop(key) for key in ("memory_budget_gb",) if key in settings}
    calibration = plan.recipe.calibration.model_copy(update=settings)
    recipe = plan.recipe.model_copy(update={"calibration": calibration, **top})
    changed = replace(plan, recipe=recipe, samples=calibration.samples or 0)
    memory = estimate.memory(work_of(changed))
    beyond = plan.peak_memory - estimate.memory(work_of(plan))["peak"]  # of several outputs
    return replace(changed, memory={**memory, "peak": memory["peak"] + max(beyond, 0)},
                   temporary=estimate.temporary(work_of(changed)))
