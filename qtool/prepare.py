"""What comes before a run: the source is opened, and the plan is held against what lies in the output's place."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import qtool
from qtool import arithmetic, duration, formats, manifest, ops, outputs, preflight, workspace
from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.errors import InputError
from qtool.models import calibration
from qtool.plan import Plan


def open_source(model: str) -> Checkpoint:
    """The checkpoint of an unquantized model. Raises CheckpointError, and InputError for a quantized one."""
    checkpoint = open_checkpoint(model)
    quantization = formats.quantization_config(checkpoint.config)
    if quantization:
        known = formats.recognise(checkpoint.config)
        method = quantization.get("quant_method") or (known.NAME if known else "unknown method")
        raise InputError(f"{model} is quantized already ({method}); start from the original model, round it again into "
                         f"another format with: qtool export {model} --to FORMAT --requantize RECIPE, or make dense "
                         f"weights of it first with: qtool export {model} --to hf")
    return checkpoint


def dry_run(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The plan as JSON, and what its output directory would meet (docs/json.md)."""
    arithmetic.resume(plan.out)
    state, differs = workspace.state(
        plan.out, lambda: identity_of(checkpoint, plan, tokens_of(checkpoint, plan)))
    data = {**plan.to_json(), **preflight.described(plan, checkpoint.name), **outputs.described(plan),
            "seconds": duration.seconds(plan), "probe": None, "output": {"state": state, "differs": differs}}
    notes = {"finished": f"{plan.out} exists: it holds what this run would make, and a run would refuse to write there",
             "other": f"{plan.out} exists: a run would refuse to write there",
             "unfinished": f"{plan.out}.partial exists: a run would "
                           + ("refuse it, as it is another run's" if differs else "go on with it")}
    return {**data, "too_small": preflight.shortfalls(plan),
            "warnings": [*data["warnings"], *([notes[state]] if state in notes else [])]}


def tokens_of(checkpoint: Checkpoint, plan: Plan) -> calibration.CalibrationTokens | None:
    """The text that a run needs, if it needs any."""
    if not plan.text_samples:
        return None
    return calibration.load_tokens(plan.recipe.calibration, checkpoint.directory, plan.text_samples,
                                   plan.skeleton.vocabulary)


def identity_of(checkpoint: Checkpoint, plan: Plan, tokens: calibration.CalibrationTokens | None) -> dict[str, Any]:
    """What decides the bytes of a run; reads the whole checkpoint, for its hashes."""
    source = {"name": checkpoint.name, "origin": checkpoint.published, "files": checkpoint.hashes()}
    used = None
    if tokens is not None:
        used = {**tokens.description, "sha256": tokens.sha256, "samples": plan.text_samples,
                "sequence_length": plan.recipe.calibration.sequence_length}
    recipe = plan.whole or plan.recipe
    products = tokens is not None or plan.rotated is not None
    return manifest.identity(qtool.__version__, source, recipe.model_dump(mode="json"), used, versions(plan.device),
                             arithmetic.described(plan.device) if products else None)


def versions(device: torch.device) -> dict[str, str]:
    """Of everything that computes."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers"),
            "device": device.type, "ops": ops.backend()}
