"""What `qtool quantize` was asked for: to show a plan, to time a block, to redo layers, or to run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import console, flags
from qtool.errors import InputError, PlanError


@dataclass(frozen=True)
class Wanted:
    """The arguments beside the recipe."""

    model: str
    out: Path | None
    device: str
    dry_run: bool
    probe: bool
    restart: bool
    json: bool
    quiet: bool

    @property
    def silent(self) -> bool:
        return self.json or self.quiet


def quantize(wanted: Wanted, given: flags.Given) -> None:
    """Plan, and show the plan or run it."""
    made = flags.to_recipe(given)
    with console.working(f"reading {wanted.model}", wanted.silent):
        from qtool import arithmetic, pipeline, preflight, prepare
        from qtool.outputs import make_plan

        checkpoint = prepare.open_source(wanted.model)
        plan = make_plan(checkpoint, made, wanted.out, wanted.device)
    if wanted.dry_run:
        _dry_run(wanted, checkpoint, plan)
        return
    resumed = None if wanted.restart else arithmetic.resume(plan.out)
    for text in (*_without_kernels(), *plan.warnings, *preflight.notes(plan), *([resumed] if resumed else [])):
        console.note(f"note: {text}", wanted.silent)
    began = time.monotonic()
    with console.progress(wanted.silent) as progress:
        result = pipeline.run(checkpoint, plan, progress, wanted.restart)
    _show_result(wanted, result, plan.out, began)


def redo(wanted: Wanted, given: flags.Given, patterns: list[str]) -> None:
    """Make some linears of a finished output again, or show what that would do."""
    if wanted.out is None:
        raise InputError("--redo changes a finished output; give its folder with --out")
    if wanted.probe:
        raise InputError("--probe times a block of a whole run; leave it out with --redo")
    out = wanted.out.resolve()
    with console.working(f"reading {wanted.model}", wanted.silent):
        from qtool import prepare, redoing
        from qtool import redo as redos

        checkpoint = prepare.open_source(wanted.model)
        if not wanted.dry_run:
            redoing.recover(out)
        asked = redos.prepare(checkpoint, out, given, patterns, wanted.device)
    if wanted.dry_run:
        show(wanted, redos.described(asked), "redo")
        return
    for text in (*_without_kernels(), *redos.notes(asked)):
        console.note(f"note: {text}", wanted.silent)
    began = time.monotonic()
    with console.progress(wanted.silent) as progress:
        result = redoing.run(asked, progress, wanted.restart)
    _show_result(wanted, result, wanted.out, began, len(asked.linears))


def _dry_run(wanted: Wanted, checkpoint: Any, plan: Any) -> None:
    """Show the plan, with --probe after timing a block of it. Raises PlanError where the machine is too small."""
    from qtool import devices, preflight, prepare

    data = prepare.dry_run(checkpoint, plan)
    if wanted.probe and not [one for one in data["too_small"] if one["what"] != "disk"]:
        from qtool import probe

        devices.refuse_missing(plan.device)
        with console.working("timing a block", wanted.silent):
            data |= probe.predicted(checkpoint, plan, lambda text: console.note(text, wanted.silent))
        data["too_small"] = preflight.shortfalls(plan, data)
    show(wanted, data, "plan")
    if data["too_small"]:
        raise PlanError(preflight.message(plan, data["too_small"]))


def _show_result(wanted: Wanted, result: Mapping[str, Any], out: Path, began: float, redone: int = 0) -> None:
    seconds = time.monotonic() - began
    if wanted.json:
        console.show_json({**result, "out": str(out), "seconds": round(seconds, 3)})
    elif not wanted.quiet:
        from qtool import report

        console.show(report.quantized(result, str(out), seconds, redone))


def show(wanted: Wanted, data: Mapping[str, Any], how: str) -> None:
    """A result as JSON or as the table that report_plan.py makes of it."""
    if wanted.json:
        console.show_json(data)
    elif not wanted.quiet:
        from qtool import report_plan

        console.show(getattr(report_plan, how)(data))


def _without_kernels() -> list[str]:
    """One note where the package was installed without its compiled extension."""
    from qtool import ops

    if ops.native_available():
        return []
    return ["the compiled kernels are not installed, so the ops run in plain PyTorch, with the same results but many "
            "times slower; with a C++ compiler at hand, install qtool again"]
