"""Export to a format that cannot hold the codes of a checkpoint: decoded, and rounded again by a data-free recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import footprint, formats, inspect, pipeline, recipe
from qtool.checkpoint import Checkpoint
from qtool.decode import Source
from qtool.errors import InputError
from qtool.plan import Plan, make_plan

LABEL = re.compile(r"(?P<zeros>u?)int(?P<bits>[2-8])-(g(?P<group>\d+)|channel)")


@dataclass(frozen=True)
class Requantization:
    """What will be run: the plan of `how` for the decoded weights of the source."""

    source: Source
    decoded: Checkpoint
    plan: Plan
    how: str


def make(source: Source, to: str, how: str, out: Path | None = None) -> Requantization:
    """how: a scheme such as int4-g64 or uint8-channel, which is rounded to, or the name or file of a recipe.

    Raises InputError for a recipe that needs text, and what make_plan raises.
    """
    if source.format is None:
        raise InputError(f"{source.origin} is not quantized, so there is nothing to round again; use: qtool quantize "
                         f"{source.origin} --format {to}")
    if formats.load(to).NAME == "hf":
        raise InputError("--to hf keeps dense weights, which are not rounded; leave --requantize out")
    decoded = source.as_checkpoint()
    plan = make_plan(decoded, recipe.override(_recipe(how), {"format": to}, "--to"),
                     out or Path(f"{source.name}-{to}"), "cpu")
    if plan.calibrated or plan.problem is not None:
        raise InputError(f"--requantize {how} needs calibration text, which an export does not read; make dense "
                         f"weights first (qtool export {source.origin} --to hf) and quantize these")
    return Requantization(source, decoded, plan, how)


def run(job: Requantization, progress: pipeline.Progress, restart: bool = False) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints."""
    result = pipeline.run(job.decoded, job.plan, progress, restart)
    return {
        "schema": inspect.SCHEMA, "out": str(job.plan.out), "from": inspect.stored_name(job.source),
        "format": job.plan.format.NAME, "linears": len(job.plan.linears), "lossless": False,
        "requantized": job.how,
        "checked": f"not lossless: decoded and rounded again ({job.how}); every linear was read back and compared",
        "source_bytes": footprint.stored_bytes(job.source), "weight_bytes": result["totals"]["weight_bytes"],
        "notes": list(job.plan.warnings), "outputs": result["outputs"],
    }


def _recipe(how: str) -> recipe.Recipe:
    label = LABEL.fullmatch(how)
    if label is None:
        named = how in recipe.available() or how.endswith((".yaml", ".yml"))
        made = recipe.load(how) if named else recipe.preset(how)
        return recipe.override(made, {"scheme.group_size": "auto"}) if how == "rtn" else made
    scheme = {"bits": int(label["bits"]), "group_size": int(label["group"] or -1), "symmetric": not label["zeros"]}
    return recipe.override(recipe.preset("rtn"), {f"scheme.{key}": value for key, value in scheme.items()},
                           f"--requantize {how}")
