"""Everything that can be known before any data is touched: a recipe and a checkpoint's headers become a Plan.

The plan decides which linears are quantized how, refuses what cannot be, and names every output tensor with its
shape and dtype. Running it is then a plain loop (pipeline.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from qtool import budget, devices, estimate, found, grids, group_sizes, keeping, plan_gguf, plan_learning, rotate
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import PlanError, RecipeError
from qtool.formats import check_model, stored_bytes
from qtool.mixtures import Shape
from qtool.models import outline
from qtool.models import skeleton as skeletons
from qtool.models.blocks import choose_compute_dtype
from qtool.models.rotations import Rotated
from qtool.models.skeleton import Skeleton
from qtool.recipe import Recipe, Scheme
from qtool.stages import Layout, LinearPlan, Stage
from qtool.tensors import FLOATING, NAMES_OF_DTYPES, TensorSpec
from qtool.units import size

if TYPE_CHECKING:
    from qtool.checkpoint.gguf_writer import GgufModel


@dataclass(frozen=True)
class Plan:
    """Frozen; sizes in bytes. memory, temporary: by purpose (estimate.py)."""

    origin: str
    out: Path
    recipe: Recipe
    device: torch.device
    model_dtype: torch.dtype
    compute_dtype: torch.dtype
    samples: int
    skeleton: Skeleton
    steps: tuple[tuple[ModuleType, Any], ...]
    rotated: Rotated | None
    format: ModuleType
    layout: Layout
    stages: tuple[Stage, ...]
    kept: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    source_bytes: int
    memory: dict[str, int]
    temporary: dict[str, int]
    gguf: GgufModel | None = None  # what a GGUF file says beside its tensors
    name: str = ""  # of several outputs
    others: tuple[Plan, ...] = ()  # solved on the same statistics (outputs.py)
    whole: Recipe | None = None  # that of all of them
    problem: budget.Problem | None = None  # what a search will decide; until then the schemes of `linears` are a guess

    @property
    def calibrated(self) -> bool:
        """Whether text is run through the model."""
        return self.recipe.measures_ranges or any(module.CALIBRATED for module, _ in self.steps)

    @property
    def solves_on_text(self) -> bool:
        """Whether a step wants statistics of the inputs."""
        return any(module.CALIBRATED and not getattr(module, "LISTS_OUTLIERS", False) for module, _ in self.steps)

    @property
    def text_samples(self) -> int:
        """Calibration sequences that a run needs."""
        return self.samples if self.calibrated else self.recipe.search_samples

    @property
    def float_share(self) -> float:
        """The share of the fitting samples that run through the unquantized model too; 0: no step asks for it."""
        return float_share(self.steps)

    @property
    def learning(self) -> list[Any]:  # options of the steps that learn on each solved block
        return plan_learning.learning(self.steps, plan_learning.BLOCK)

    @property
    def distilling(self) -> Any:  # those of the step that learns on the solved model, or None
        return next(iter(plan_learning.learning(self.steps, plan_learning.MODEL)), None)

    @property
    def scaling_steps(self) -> int:
        """How many steps scale the channels of a block before it is solved."""
        return len(found.having("SCALES_INPUTS", self.steps))

    @property
    def statistics_bytes(self) -> int:
        """Of what the recipe keeps for --redo (keeping.py)."""
        return keeping.size(work_of(self), self.scaling_steps) if self.recipe.keep_statistics else 0

    @property
    def float_stream(self) -> bool:
        return self.float_share > 0

    @property
    def follows_residual(self) -> bool:
        return follows_residual(self.steps)

    @property
    def linears(self) -> tuple[LinearPlan, ...]:
        return tuple(linear for stage in self.stages for linear in stage.linears)

    @property
    def outside(self) -> tuple[LinearPlan, ...]:
        """Embeddings and head, where the format holds them quantized."""
        return tuple(linear for stage in self.stages for linear in stage.outside)

    @property
    def outputs(self) -> list[TensorSpec]:
        return [spec for stage in self.stages for spec in stage.outputs]

    def stage_like(self, stage: Stage) -> Stage:
        """This plan's stage of that name; plans of one model have the same ones."""
        return next(one for one in self.stages if one.name == stage.name)

    @property
    def blocks(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)

    @property
    def disk_bytes(self) -> int:
        """Largest need while running: the output with its statistics, and what is removed again."""
        weights = sum(one.weight_bytes for one in (self, *self.others))
        return weights + self.statistics_bytes + self.temporary["peak"]

    @property
    def peak_memory(self) -> int:
        return self.memory["peak"]

    def linear_bytes(self, linear: LinearPlan) -> int:
        """Stored bytes of one quantized linear, scales and zero points included."""
        return stored_bytes(self.format, linear.stored, linear.shape, linear.scheme, self.model_dtype)

    @property
    def bits_per_weight(self) -> float:
        linears = (*self.linears, *self.outside)
        weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
        stored = sum(self.linear_bytes(linear) for linear in linears)
        return 8 * stored / weights if weights else 0.0

    def to_json(self) -> dict[str, Any]:
        free = {name for choice in self.problem.choices for name in choice.linears} if self.problem else set()
        return {
            "schema": 1, "source": self.origin, "out": str(self.out), "recipe": self.recipe.model_dump(mode="json"),
            "device": str(self.device), "dtype": NAMES_OF_DTYPES[self.model_dtype],
            "compute_dtype": NAMES_OF_DTYPES[self.compute_dtype],
            "blocks": self.blocks, "samples": self.text_samples,
            "linears": [{"name": one.name, "shape": list(one.shape), "block": one.block,
                         "scheme": None if one.name in free else one.scheme.model_dump()}
                        for one in (*self.linears, *self.outside)],
            "budget": {"samples": self.recipe.search_samples, **self.problem.to_json()} if self.problem else None,
            "kept": [{"name": name, "reason": reason} for name, reason in self.kept],
            "rotation": rotate.describe(self.rotated),
            "warnings": list(self.warnings), "source_bytes": self.source_bytes, "weight_bytes": self.weight_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4), "disk_bytes": self.disk_bytes,
            "statistics_bytes": self.statistics_bytes, "temporary": self.temporary, "peak_memory": self.peak_memory,
            "memory": self.memory,
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe, out: Path | None = None, device: str = "auto",
              schemes: Mapping[str, Scheme] | None = None) -> Plan:
    """schemes: of some linears, by name, in place of what the recipe says.

    Raises RecipeError, ModelError, CheckpointError or PlanError before anything has been written.
    """
    target = devices.named(device)
    format_ = found.load("formats", recipe.format)
    plan_gguf.refuse(recipe)
    steps = tuple(_step(entry) for entry in recipe.steps)
    rotating = rotate.wanted(steps)
    described = checkpoint.directory, checkpoint.config, checkpoint.specs
    calibrated = recipe.measures_ranges or any(module.CALIBRATED for module, _ in steps)
    runs = calibrated or rotating or recipe.budget is not None
    skeleton = (None if runs else outline.build(*described)) or skeletons.build(*described)
    rotated = rotate.find(skeleton, rotating, recipe.seed) if rotating else None
    skeleton, source = rotated.skeleton if rotated else skeleton, rotate.view(checkpoint, rotated)
    model_dtype = _model_dtype(recipe, checkpoint)
    shape = plan_gguf.shape_of(checkpoint.config, skeleton, calibrated) if recipe.mixture else None
    linears, outside, kept = ([], [], []) if _stays_dense(steps, recipe) else _match(recipe, skeleton, shape)
    attentions = _attentions(skeleton, format_) if recipe.kv_cache else []
    layout = Layout(skeleton, source.specs, format_, model_dtype, recipe.dtype != "auto", tuple(attentions))
    problem = None
    if recipe.budget is not None:
        problem = budget.pose(recipe, format_, model_dtype, linears, layout.bytes_beside(linears))
        linears = _with_schemes(linears, problem.guess())
    recipe, linears = group_sizes.settle(recipe, _with_schemes(linears, schemes or {}))
    _check([*linears, *outside], format_, steps, skeleton, kept)
    stages = layout.stages(linears, outside)
    recipe = settle_calibration(recipe, target)
    samples = recipe.calibration.samples or 0
    compute_dtype = choose_compute_dtype(target, model_dtype)
    plan = Plan(
        origin=checkpoint.origin, out=out or _default_out(checkpoint, recipe), recipe=recipe, device=target,
        model_dtype=model_dtype, compute_dtype=compute_dtype, samples=samples,
        skeleton=skeleton, steps=steps, rotated=rotated, format=format_, layout=layout, stages=stages, kept=tuple(kept),
        warnings=tuple(_warnings(linears, format_)),
        source_bytes=sum(spec.nbytes for spec in checkpoint.specs.values()),
        memory={}, temporary={}, problem=problem,
        gguf=plan_gguf.described(checkpoint, skeleton) if recipe.mixture else None,
    )
    plan_learning.refuse(plan)
    return replace(plan, memory=estimate.memory(work_of(plan)), temporary=estimate.temporary(work_of(plan)))


def work_of(plan: Plan) -> estimate.Work:
    """What the estimates look at."""
    return estimate.Work(plan.skeleton, plan.stages, plan.recipe, plan.device, plan.model_dtype, plan.compute_dtype,
                         plan.samples, plan.calibrated, plan.float_share, plan.rotated is not None,
                         *plan_learning.size(plan), follows_residual=plan.follows_residual,
                         surveys_moments=bool(found.having("SURVEYS_MOMENTS", plan.steps)))


def follows_residual(steps: Iterable[tuple[ModuleType, Any]]) -> bool:
    """Whether a step makes up for what is off in the stream that outputs are added to."""
    return any(getattr(options, "residual", False) for _, options in found.having("NEEDS_FLOAT_STREAM", steps))


def _stays_dense(steps: tuple[tuple[ModuleType, Any], ...], recipe: Recipe) -> bool:
    """Whether the recipe only rotates and its format holds dense weights, so that no linear is quantized."""
    return recipe.format == "hf" and all(getattr(module, "ROTATES", False) for module, _ in steps)


def with_schemes(plan: Plan, chosen: Mapping[str, Scheme]) -> Plan:
    """The plan with these schemes, by the names of linears, and nothing left to choose. Raises PlanError."""
    linears = _with_schemes(plan.linears, chosen)
    _check(linears, plan.format, plan.steps, plan.skeleton, plan.kept)
    return replace(plan, stages=plan.layout.stages(linears, plan.outside), problem=None,
                   warnings=tuple(_warnings(linears, plan.format)))


def _with_schemes(linears: Sequence[LinearPlan], chosen: Mapping[str, Scheme]) -> list[LinearPlan]:
    return [replace(one, scheme=chosen.get(one.name, one.scheme)) for one in linears]


def _default_out(checkpoint: Checkpoint, recipe: Recipe) -> Path:
    method, label = recipe.preset or recipe.method, recipe.scheme.label
    if recipe.mixture is not None:
        return Path(f"{checkpoint.name}-{recipe.mixture}")
    if recipe.format == "hf":
        return Path(f"{checkpoint.name}-{method}")
    if recipe.budget is not None:
        label = f"{recipe.budget.bits:g}bits" if recipe.budget.bits else size(recipe.budget.size or 0).replace(" ", "")
    return Path(f"{checkpoint.name}-{label if label.startswith(method + '-') else f'{method}-{label}'}")


def float_share(steps: tuple[tuple[ModuleType, Any], ...]) -> float:
    """The largest share that one of the steps asks for."""
    return max((options.share for _, options in found.having("NEEDS_FLOAT_STREAM", steps)), default=0.0)


def _step(entry: dict[str, dict[str, Any]]) -> tuple[ModuleType, Any]:
    name, options = next(iter(entry.items()))
    module = found.load("methods", name)
    try:
        return module, module.Options.model_validate(options)
    except ValidationError as error:
        complaints = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            known = ", ".join(module.Options.model_fields)
            complaints.append(f"unknown option '{key}' (known: {known})" if item["type"] == "extra_forbidden"
                              else f"{key}: {item['msg']} (given: {item['input']!r})")
        raise RecipeError(f"step {name}: " + "; ".join(complaints)) from None


def _model_dtype(recipe: Recipe, checkpoint: Checkpoint) -> torch.dtype:
    """The recipe's, else the config's, else that of most of the weights."""
    named: Any = recipe.dtype
    if named == "auto":
        named = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return dtype
    counts: dict[torch.dtype, int] = {}
    for spec in checkpoint.specs.values():
        if spec.dtype in FLOATING:
            counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.elements
    return max(counts, key=lambda key: counts[key], default=torch.bfloat16)


def _match(recipe: Recipe, skeleton: Skeleton,
           shape: Shape | None) -> tuple[list[LinearPlan], list[LinearPlan], list[tuple[str, str]]]:
    """The linears of the blocks that are quantized, those outside of them, and (name, why) of those that are not.

    shape: of the model, where a mixture chooses the types."""
    linears, kept, used = [], [], set()
    for index in range(len(skeleton.blocks)):
        for name, (rows, columns) in skeleton.block_linears(index).items():
            base = plan_gguf.base_scheme(recipe, name, index, columns, shape) if shape else recipe.scheme
            scheme, rule = recipe.scheme_for(name, base) if base or not shape else (None, None)
            used.add(rule)
            if scheme is None:
                kept.append((name, f"rule {recipe.rules[rule].match} leaves it as it is" if rule is not None
                             else plan_gguf.NO_TYPE))
                continue
            stored = skeleton.stored(name)
            scheme = plan_gguf.typed(scheme) if shape else scheme
            linears.append(LinearPlan(name, stored, (rows, columns), scheme, index))
    outside: list[LinearPlan] = []
    if shape:
        outside, left, rules = plan_gguf.outside(recipe, skeleton, shape)
        kept, used = kept + left, used | rules
    elif skeleton.head:
        used.add(_keep_head(recipe, skeleton.head))
        kept.append((skeleton.head, "the output head stays in the model's dtype"))
    kept += [(name, "routers are not quantized") for name in skeleton.routers]
    for index, idle in enumerate(recipe.rules):
        if index not in used:
            raise PlanError(f"rule '{idle.match}' decides nothing: it matches no linear, or earlier rules match all "
                            f"that it does; a linear's name is like {next(iter(skeleton.block_linears(0)), 'none')}")
    if not linears:
        raise PlanError("no linear is left to quantize: every one is skipped by a rule; remove a rule")
    return linears, outside, kept


def _keep_head(recipe: Recipe, head: str) -> int | None:
    """The rule that matches the output head; it may only skip it."""
    scheme, rule = recipe.scheme_for(head)
    if rule is not None and scheme is not None:
        raise PlanError(f"rule '{recipe.rules[rule].match}' asks to quantize the output head {head}, which only GGUF "
                        f"(--method q4_k_m) does; put a rule before it: match: {head}, skip: true")
    return rule


def settle_calibration(recipe: Recipe, device: torch.device) -> Recipe:
    """Fill in what depends on the device."""
    given = recipe.calibration
    fast = device.type == "cuda"
    settled = {"samples": given.samples or (512 if fast else 128),
               "batch_tokens": given.batch_tokens or (16_384 if fast else 1024)}
    return recipe.model_copy(update={"calibration": given.model_copy(update=settled)})


def _check(linears: list[LinearPlan], format_: ModuleType, steps: Sequence[tuple[ModuleType, Any]],
           skeleton: Skeleton, kept: Sequence[tuple[str, str]]) -> None:
    for linear in linears:
        reason = found.load("grids", linear.scheme.grid).check(linear.scheme)
        reason = reason or linear.refused(format_, linear.scheme)
        reason = reason or next(filter(None, (_unfit(linear.scheme, step) for step, _ in steps)), None)
        if reason:
            raise PlanError(reason)
    stored = {linear.stored: linear.scheme for linear in linears}
    reason = format_.check_together(stored, [skeleton.stored(name) for name, _ in kept])
    reason = reason or check_model(format_, skeleton.model_type, stored)
    if reason:
        raise PlanError(reason)


def _unfit(scheme: Scheme, step: ModuleType) -> str | None:
    return (step.check(scheme) if hasattr(step, "check") else None) or grids.refuses_step(scheme, step)


def _attentions(skeleton: Skeleton, format_: ModuleType) -> list[str]:
    """The attention module of each block, where its keys come from, by its stored name."""
    if not hasattr(format_, "kv_scales"):
        raise PlanError(f"format {format_.NAME} has no place for kv_cache scales; use --format compressed-tensors, or "
                        "leave kv_cache out")
    attentions = []
    for index, block in enumerate(skeleton.blocks):
        attention = skeleton.attention(index)
        if attention is None:
            raise PlanError(f"kv_cache: {block} has no linear called k_proj or qkv_proj, so where its keys and values "
                            "come from is not known; leave kv_cache out")
        attentions.append(attention[1])
    return attentions


def _warnings(linears: list[LinearPlan], format_: ModuleType) -> list[str]:
    """What a user should know about who can load the result."""
    schemes = {linear.stored: linear.scheme for linear in linears}
    return [*format_.notes(schemes), *format_.fused_conflicts(schemes)]
