"""What comes before a run: the source is opened, and the plan is held against what lies in the output's place."""

from __future__ import annotations

from typing import Any

from qtool import formats, pipeline, workspace
from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.errors import InputError
from qtool.plan import Plan


def open_source(model: str) -> Checkpoint:
    """The checkpoint of an unquantized model. Raises CheckpointError, and InputError for a quantized one."""
    checkpoint = open_checkpoint(model)
    quantization = formats.quantization_config(checkpoint.config)
    if quantization:
        raise InputError(f"{model} is quantized already ({quantization.get('quant_method', 'unknown method')}); start "
                         "from the original model, or make dense weights of it first with: qtool export "
                         f"{model} --to hf")
    return checkpoint


def dry_run(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The plan as JSON, and what its output directory would meet (docs/json.md)."""
    state, differs = workspace.state(
        plan.out, lambda: pipeline.identity_of(checkpoint, plan, pipeline.tokens_of(checkpoint, plan)))
    data = {**plan.to_json(), "output": {"state": state, "differs": differs}}
    notes = {"finished": f"{plan.out} exists: it holds what this run would make, and a run would refuse to write there",
             "other": f"{plan.out} exists: a run would refuse to write there",
             "unfinished": f"{plan.out}.partial exists: a run would "
                           + ("refuse it, as it is another run's" if differs else "go on with it")}
    return {**data, "warnings": [*data["warnings"], *([notes[state]] if state in notes else [])]}
