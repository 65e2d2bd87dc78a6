"""What `--redo` asks for: which linears of a finished output are made again, with which recipe, in which files.

Everything that is not said is as the output's manifest has it. Blocks before a redone one are run as they are in the
output, so that its linears see the inputs that they will see in use. Blocks after it stay as they are.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import qtool
from qtool import decode, flags, formats, found, kept, manifest, recipe, rotate
from qtool.checkpoint import stacks
from qtool.checkpoint.header import read_header, read_json
from qtool.checkpoint.reader import Checkpoint, shard_names
from qtool.checkpoint.writer import INDEX, Shard, aligned
from qtool.decode import Source
from qtool.errors import InputError, OutputError, PlanError, RecipeError
from qtool.plan import Plan, make_plan
from qtool.recipe import Recipe, Scheme
from qtool.stages import LinearPlan, Stage
from qtool.tensors import TensorSpec

NEAR = 3  # names in a message
WHOLE = ("format", "dtype", "kv_cache", "budget", "outputs", "propagate", "mixture", "rules", "shard_gb",
         "keep_statistics")


@dataclass(frozen=True)
class Redo:
    """A redo that can be carried out.

    record: the manifest of the output.  linears: what is made again, by name.  plan: of the whole output as it will be.
    part: that plan with the stages that must be run, finished linears marked.  files: the files to write again.
    kept: the statistics that it is solved on without text; None: the text is run where steps need it, the reason is
    `why`.
    """

    checkpoint: Checkpoint
    output: Source
    record: dict[str, Any]
    patterns: tuple[str, ...]
    linears: frozenset[str]
    plan: Plan
    part: Plan
    files: tuple[Shard, ...]
    kept: kept.Kept | None
    why: str

    @property
    def asked(self) -> dict[str, Any]:
        """What decides the result beside the output and the calibration text; goes into the manifest."""
        settings = self.plan.recipe.model_dump(mode="json")
        kept = ("steps", "calibration", "seed", "memory_budget_gb")
        schemes = {one.name: one.scheme.model_dump() for one in self.plan.linears if one.name in self.linears}
        return {"patterns": list(self.patterns), "linears": schemes,
                "recipe": {key: settings[key] for key in kept}}


def prepare(checkpoint: Checkpoint, out: Path, given: flags.Given, patterns: Sequence[str], device: str) -> Redo:
    """Raises InputError and its kin for anything that cannot be redone, before anything is written."""
    record = _record(out)
    _refuse_other_source(checkpoint, out, record)
    output = decode.open_model(str(out))
    linears = _matching(record, patterns, out)
    made, schemes = _wanted(record, linears, given)
    known = {one["name"]: Scheme.model_validate(one["scheme"]) for one in record["layers"]}
    plan = make_plan(checkpoint, made, out, device, {**known, **schemes})
    if {one.name for one in plan.linears} != set(known):
        raise OutputError(f"{out}: its manifest lists other linears than its recipe makes; quantize the model anew")
    if plan.learning or plan.distilling:
        raise PlanError(f"{out}: its linears learned together (steps {plan.recipe.method}), so none can be made again "
                        "alone; quantize the model anew")
    if rotate.describe(plan.rotated) != record["rotation"]:
        raise PlanError(f"{out}: its weights are rotated otherwise than this recipe says; keep its step rotate")
    if any(one.scheme.activations == "tensor" for one in plan.linears) and not plan.recipe.measures_ranges:
        raise PlanError("calibrated scales of inputs (activations: tensor) are for the whole output; leave them out")
    base = Recipe.model_validate(record["recipe"])
    there, why = kept.find(plan, base, record, linears)
    if there is None:
        _refuse_parts_of_scaled(plan, linears, out, base)
    part = _part(plan, linears, record) if there is None else _solved_again(plan, linears)
    if there is not None:
        there.refuse_damaged(part.stages)
    return Redo(checkpoint, output, record, tuple(patterns), linears, plan, part,
                _files(output, plan, part, record), there, why)


def _record(out: Path) -> dict[str, Any]:
    """The manifest of the output. Raises OutputError for one that cannot be redone in part."""
    if not out.is_dir():
        raise OutputError(f"{out}: --redo changes a finished output, and there is none; give its folder with --out")
    record = manifest.load(out)
    why = ("it holds several outputs, whose hashes one manifest has" if "several" in record
           else "it is one of several outputs of a run, whose manifest lies above" if "solved_with" in record
           else "export made it, not quantize" if not record.get("recipe")
           else "a GGUF file is one file, in which nothing can be replaced" if record["format"] == "gguf"
           else "no linear in it is quantized" if not record["layers"] else "")
    if why:
        raise OutputError(f"{out}: cannot be redone in part, because {why}; quantize the model anew")
    if record["qtool"] != qtool.__version__:
        raise OutputError(f"{out}: qtool: {record['qtool']} -> {qtool.__version__}; another version made it, so "
                          "what is redone would not go with the rest; quantize the model anew")
    return record


def _refuse_other_source(checkpoint: Checkpoint, out: Path, record: Mapping[str, Any]) -> None:
    changed = manifest.differences(record["source"]["files"], checkpoint.hashes(), "source.files")
    if changed:
        raise OutputError(f"{out} was made from another model than {checkpoint.origin}:\n  "
                          + "\n  ".join(changed[:20]) + "\ngive the model that it was made from")


def _matching(record: Mapping[str, Any], patterns: Sequence[str], out: Path) -> frozenset[str]:
    """The linears that a pattern matches. Raises InputError for a pattern that matches none."""
    names, chosen = [one["name"] for one in record["layers"]], set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            kept = [one["name"] for one in record["kept"] if fnmatch.fnmatchcase(one["name"], pattern)]
            plain = pattern.strip("*.")
            inside = [f"{plain}.*"] if any(name.startswith(plain + ".") for name in names) else []
            near = inside or difflib.get_close_matches(plain, names, NEAR, 0.0)
            raise InputError(f"--redo '{pattern}' matches no quantized linear of {out}"
                             + (f" ({kept[0]} is not quantized there)" if kept else "")
                             + f"; near: {', '.join(near)}")
        chosen |= set(matching)
    return frozenset(chosen)


def _wanted(record: Mapping[str, Any], linears: frozenset[str],
            given: flags.Given) -> tuple[Recipe, dict[str, Scheme]]:
    """(the recipe to run, the schemes of what is redone)"""
    base, named, told = Recipe.model_validate(record["recipe"]), flags.named(given), flags.changes(given)
    for key, value in told.items():
        if key.partition(".")[0] in WHOLE and value != getattr(base, key, None):
            raise RecipeError(f"--redo keeps the {key} of the output ({getattr(base, key, None)}); leave it out, or "
                              "quantize the model anew")
    own = {key: value for key, value in told.items() if key.partition(".")[0] not in (*WHOLE, "scheme")}
    scheme = {key: value for key, value in told.items() if key.partition(".")[0] == "scheme"}
    steps = named or base
    text = base.calibration if record["calibration"] or named is None else named.calibration
    made = base.model_copy(update={"steps": steps.steps, "calibration": text, "budget": None})
    made = recipe.override(made, own, "--redo") if own else made
    before = {one["name"]: one["scheme"] for one in record["layers"]}
    schemes = {}
    for name in linears:
        start = Scheme.model_validate(before[name]) if named is None else named.scheme_for(name)[0]
        if start is None:
            raise RecipeError(f"--redo: a rule of the recipe leaves {name} as it is; a redone linear gets a scheme")
        holder = made.model_copy(update={"scheme": start})
        schemes[name] = recipe.override(holder, scheme, "--redo").scheme if scheme else start
    return made, schemes


def _refuse_parts_of_scaled(plan: Plan, linears: frozenset[str], out: Path, before: Recipe) -> None:
    """Channel scales lie in the norms and linears of a whole block, which can then only be redone as one."""
    if not _scales(plan, before):
        return
    for stage in plan.stages:
        redone = [one.name for one in stage.linears if one.name in linears]
        if redone and len(redone) < len(stage.linears) and stage.block is not None:
            raise PlanError(f"{out}: the input channels of its blocks are scaled (awq, smoothquant, equalize), so "
                            f"{redone[0]} cannot be redone without the rest of its block; give --redo "
                            f"'{plan.skeleton.blocks[stage.block]}.*'")


def _scales(plan: Plan, before: Recipe) -> bool:
    modules = [found.load("methods", next(iter(step))) for step in before.steps] + [module for module, _ in plan.steps]
    return any(getattr(module, "SCALES_INPUTS", False) for module in modules)


def _part(plan: Plan, linears: frozenset[str], record: Mapping[str, Any]) -> Plan:
    """The stages to run: the blocks up to the last redone one; without text only the redone ones."""
    whole = _scales(plan, Recipe.model_validate(record["recipe"]))
    touched = [stage for stage in plan.stages if any(one.name in linears for one in stage.linears)]
    last = max(stage.block or 0 for stage in touched)
    stages = []
    for stage in plan.stages:
        if stage.block is None or stage.block > last or (not plan.calibrated and stage not in touched):
            continue
        done = frozenset(one.name for one in stage.linears if one.name not in linears)
        scaled = whole and not done
        stages.append(replace(stage, done=done, copied=stage.copied if scaled else (),
                              attention=stage.attention if scaled else None))
    return replace(plan, stages=tuple(stages))


def _solved_again(plan: Plan, linears: frozenset[str]) -> Plan:
    """The stages with such a linear, for solving on kept statistics: no block is run, nothing else changes."""
    stages = []
    for stage in plan.stages:
        done = frozenset(one.name for one in stage.linears if one.name not in linears)
        if stage.block is not None and len(done) < len(stage.linears):
            stages.append(replace(stage, done=done, copied=(), attention=None))
    return replace(plan, stages=tuple(stages), temporary=dict.fromkeys(plan.temporary, 0))


def replaced(part: Plan, stage: Stage) -> list[TensorSpec]:
    """The tensors of a stage that are written again."""
    if stage.copied:
        return list(stage.outputs)
    return [spec for one in stage.todo for spec in _layout(part, one, one.scheme)]


def _layout(plan: Plan, linear: LinearPlan, scheme: Scheme) -> Sequence[TensorSpec]:
    specs: Sequence[TensorSpec] = plan.format.layout(linear.stored, linear.shape, scheme, plan.model_dtype)
    return specs


def _files(output: Source, plan: Plan, part: Plan, record: Mapping[str, Any]) -> tuple[Shard, ...]:
    """The files with a tensor that is written again, as they will be: names and order stay."""
    before = {one["name"]: Scheme.model_validate(one["scheme"]) for one in record["layers"]}
    instead: dict[str, list[TensorSpec]] = {}  # a tensor of the output -> what comes in its place
    for stage in part.stages:
        fresh = {spec.name: spec for spec in replaced(part, stage)}
        if stage.copied:  # norms; they have their place
            instead |= {name: [spec] for name, spec in fresh.items() if name in output.checkpoint.specs}
        for one in stage.todo:
            old = [spec.name for spec in _layout(plan, one, before[one.name])]
            new = {spec.name: spec for spec in _layout(plan, one, one.scheme)}
            instead |= {name: [new[name]] if name in new else [] for name in old}
            instead[old[0]] += [spec for name, spec in new.items() if name not in old]
    files = []
    folder = output.directory
    members = formats.members(plan.format)
    index = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in shard_names(index, _index(folder), str(folder)):
        specs = [one for spec, _ in read_header(folder / name).values() for one in stacks.parts(spec, members)]
        if any(spec.name in instead for spec in specs):
            now = [one for spec in specs for one in instead.get(spec.name, [spec])]
            files.append(Shard(name, aligned(now)))
    return tuple(files)


def _index(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / INDEX) if (folder / INDEX).is_file() else None


def notes(redo: Redo) -> list[str]:
    """What to know of the result."""
    plan, last = redo.plan, max(stage.block or 0 for stage in redo.part.stages)
    later = plan.blocks - 1 - last
    found = list(plan.warnings)
    if redo.kept is not None:
        found.append(f"solved on the statistics in {redo.kept.folder}, those of the first run, without text")
    elif redo.why:
        found.append(f"the text is run through {len(redo.part.stages)} blocks, because {redo.why}")
    if plan.calibrated and later:
        found.append(f"the {later} blocks after block {last} stay as they are, although their inputs change a little")
    return found


def described(redo: Redo) -> dict[str, Any]:
    """What `--redo --dry-run` tells (docs/json.md)."""
    plan, before = redo.plan, {one["name"]: one for one in redo.record["layers"]}
    linears = [{"name": one.name, "block": one.block, "shape": list(one.shape), "before": before[one.name]["scheme"],
                "scheme": one.scheme.model_dump()} for one in plan.linears if one.name in redo.linears]
    names = [one.file_name for one in redo.files]
    whole = [path.name for path in sorted(plan.out.glob("*.safetensors"))]
    return {"schema": 1, "source": plan.origin, "out": str(plan.out), "patterns": list(redo.patterns),
            "linears": linears, "recipe": plan.recipe.model_dump(mode="json"), "device": str(plan.device),
            "samples": 0 if redo.kept else plan.text_samples, "blocks": len(redo.part.stages),
            "statistics": "kept" if redo.kept else None, "reason": redo.why or None,
            "files": {one.file_name: sum(spec.nbytes for spec in one.specs) for one in redo.files},
            "kept_files": [name for name in whole if name not in names],
            "weight_bytes_before": redo.record["totals"]["weight_bytes"], "weight_bytes": plan.weight_bytes,
            "temporary": redo.part.temporary, "peak_memory": plan.peak_memory, "warnings": notes(redo)}
