"""One calibration, several outputs: what a recipe's `outputs` can have in common, and what they cannot.

All are solved on the statistics of one stream. It runs through the first output's quantized weights (or, with
`propagate: original`, the model's own), so what the stream sees must be the same for all: transforms of the weights and
roundings of the inputs. Reading, forward passes and Hessians are shared; codes, scales and files are each output's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtool import manifest, plan_learning
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import PlanError
from qtool.plan import Plan
from qtool.plan import make_plan as plan_one
from qtool.recipe import Recipe
from qtool.workspace import Workspace


def make_plan(checkpoint: Checkpoint, recipe: Recipe, out: Path | None = None, device: str = "auto") -> Plan:
    """The plan of a run; of several outputs, the first's, with the `others`. Raises as that of plan.py does."""
    if not recipe.outputs:
        plan = plan_one(checkpoint, recipe, out, device)
        if recipe.keep_statistics:
            _refuse_to_keep(plan)
        return plan
    place = out or Path(f"{checkpoint.name}-{recipe.name}")
    plans = []
    for name, alone in recipe.each().items():
        try:
            plans.append(replace(plan_one(checkpoint, alone, place, device), name=name))
        except PlanError as error:
            raise PlanError(f"output {name}: {error}") from None
    first, *others = plans
    for one in plans if others else ():
        plan_learning.refuse(replace(one, whole=recipe))
    for one in others:
        _refuse_apart(first, one, recipe.propagate)
    settled = recipe.model_copy(update={"calibration": first.recipe.calibration})
    held = max(one.memory["peak"] - one.memory["runtime"] for one in plans) + first.memory.get("statistics", 0)
    memory = {**first.memory, "peak": first.memory["runtime"] + held}
    return replace(first, others=tuple(others), whole=settled, memory=memory,
                   warnings=tuple(f"{one.name}: {text}" for one in plans for text in one.warnings))


def _refuse_to_keep(plan: Plan) -> None:
    """Raise PlanError where no --redo could use what --keep-statistics keeps."""
    reason = (f"{plan.recipe.method} chooses codes without text, so there are none" if not plan.solves_on_text
              else "they are for --redo, which cannot change a GGUF file" if plan.gguf is not None else "")
    if reason:
        raise PlanError(f"--keep-statistics: {reason}; leave it out")


def _refuse_apart(first: Plan, other: Plan, propagate: str | None) -> None:
    """Raise PlanError when one stream cannot serve both."""
    reason = _apart(first, other)
    if not reason and propagate == "original" and first.float_stream:
        reason = "propagate: original leaves nothing for the step asymmetric to make up for; leave one of them out"
    if reason:
        raise PlanError(f"outputs {first.name} and {other.name}: {reason}")


def _apart(first: Plan, other: Plan) -> str:
    transforms = [[step for step, (module, _) in zip(one.recipe.steps, one.steps, strict=True)
                   if getattr(module, "SCALES_INPUTS", False) or getattr(module, "ROTATES", False)]
                  for one in (first, other)]
    known = {linear.name: linear.scheme for linear in first.linears}
    beyond = next((linear.name for linear in other.linears if linear.name not in known), None)
    rounded = next((linear.name for linear in other.linears
                    if linear.name in known and linear.scheme.activations != known[linear.name].activations), None)
    if transforms[0] != transforms[1]:
        return ("steps that change the weights before they are solved (awq, smoothquant, equalize, rotate) must be the "
                "same, with the same options, in all outputs; make what differs in a run of its own")
    if other.calibrated != first.calibrated or (first.calibrated and not first.solves_on_text):
        return ("one is solved on statistics and the other is not; make the data-free one in a run of its own, which "
                "is fast, or give it the step gptq")
    if other.float_stream:
        return (f"the step asymmetric would make {other.name} make up for the errors of {first.name}, which the stream "
                f"runs through; give {other.name} its steps without it, such as: steps: [gptq, refine]")
    if beyond:
        return f"{beyond} is quantized in {other.name} only; put the output that leaves out less first"
    if rounded:
        return f"the inputs of {rounded} are rounded differently, so their statistics differ; make two runs"
    if first.recipe.measures_ranges:
        return "calibrated scales of inputs (activations: tensor) are made for one output; make two runs"
    return ""


def solved_on(plan: Plan, first: Plan) -> dict[str, Any]:
    """What the manifest of one of several outputs tells of the stream that it was solved on."""
    assert first.whole is not None
    return {"solved_with": {"output": plan.name, "outputs": [one.name for one in first.whole.outputs],
                            "propagated": first.whole.propagate or first.name}}


def together(work: Workspace, names: Sequence[str], manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest over several outputs, one folder each: their layers and files with the output's name before them."""
    work.refuse_strays(names)
    results = dict(zip(names, manifests, strict=True))
    layers = [{**layer, "name": f"{name}/{layer['name']}"} for name, one in results.items() for layer in one["layers"]]
    files = {f"{name}/{file}": manifest.file_hash(work.folder / name / file)
             for name, one in results.items() for file in [*one["outputs"], manifest.NAME]}
    sizes = [one["totals"] for one in results.values()]
    totals = manifest.totals(layers, sizes[0]["parameters"], sum(one["weight_bytes"] for one in sizes),
                             sizes[0]["source_bytes"])
    first = manifests[0]
    made = {**work.identity, "several": list(results), "layers": layers, "rotation": first["rotation"],
            "kept": first["kept"], "outputs": files, "allocation": None, "totals": totals}
    manifest.save(work.folder, made)
    return made


def described(plan: Plan) -> dict[str, Any]:
    """What the JSON of a plan tells besides, where there are several outputs."""
    plans = (plan, *plan.others)
    if plan.whole is None:
        return {"outputs": None}
    return {"recipe": plan.whole.model_dump(mode="json"), "weight_bytes": sum(one.weight_bytes for one in plans),
            "outputs": [{"name": one.name, "format": one.format.NAME, "weight_bytes": one.weight_bytes,
                         "schemes": list(dict.fromkeys(linear.scheme.label for linear in one.linears)),
                         "bits_per_weight": round(one.bits_per_weight, 4)} for one in plans]}
