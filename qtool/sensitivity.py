"""How much the loss of the model rises when a linear takes a scheme, and from that the schemes that meet a budget.

For an error D = W - Q of a linear with inputs x and outputs y, the expected KL divergence of a sequence is, to second
order and with the errors of different outputs taken as independent,
    ½ Σ_i E (Σ_t ∂loss/∂y_ti · D_i x_t)²,
with the loss of models/backward.py. The sum over tokens is inside the square: errors that all tokens share do not
cancel where attention takes the mean of many (v_proj). Tokens of experts are taken as independent too:
    ½ Σ_i g_i (D H Dᵀ)_ii,    H = mean of x xᵀ,    g_i = mean of (∂loss/∂y_i)².
D comes from the recipe's own steps, with the H of most sequences; the losses are measured on the others, where a solver
that fits few tokens too well is found out. Sources: HAWQ-V2 (arXiv 1911.03852) for a sum of
second-order terms over layers, GuidedQuant (arXiv 2505.07004) for the gradient at the outputs.

    forward     the inputs of every block, kept in files
    head        the gradient at the last block's output
    backward    for each block, last first: H, and the error of each linear with each scheme; the gradient before it
What is finished is in the files of OUT.partial/ and its journal, so that a killed search goes on at the same block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool import found, heap, quality
from qtool.budget import MEASURED
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import NumericalError, PlanError
from qtool.layer import Layer
from qtool.models import backward, blocks, statistics
from qtool.models.streams import StreamStore, batches_for
from qtool.plan import Plan
from qtool.recipe import Scheme
from qtool.stages import LinearPlan
from qtool.tensors import CalibrationStats
from qtool.workspace import Workspace

STAGE = "allocation"
Losses = dict[str, dict[str, float]]  # linear -> label of a scheme -> nats per token


@dataclass
class Search:
    """hidden, gradient: at the entrance of the block that is next to be done.

    batches: of all samples; those from `first` on are measured, and `gradient` has only these.
    """

    checkpoint: Checkpoint
    plan: Plan
    ids: torch.Tensor
    work: Workspace
    tell: Any
    hidden: StreamStore
    gradient: StreamStore
    arguments: blocks.BlockArguments
    batches: list[slice]
    first: int

    @property
    def measured(self) -> list[slice]:
        return [batch for batch in self.batches if batch.start >= self.first]

    def path(self, kind: str, index: int) -> Path:
        return self.work.folder / f"search-{kind}-{index}.bin"


def allocation(checkpoint: Checkpoint, plan: Plan, ids: torch.Tensor, work: Workspace, tell: Any) -> dict[str, Any]:
    """The schemes that meet the plan's budget, as the manifest tells it; found once and then kept in the journal.

    ids: int64 [samples, length], of which the recipe's search_samples are used.  tell: takes messages on progress.
    """
    assert plan.problem is not None
    if STAGE not in work.finished:
        losses = _search(_open(checkpoint, plan, ids[:plan.recipe.search_samples], work, tell))
        work.record(STAGE, {"allocation": _settle(plan, losses)})
    for path in work.folder.glob("search-*"):
        path.unlink()
    result: dict[str, Any] = work.finished[STAGE]["allocation"]
    return result


def schemes_of(plan: Plan, result: dict[str, Any]) -> dict[str, Scheme]:
    """What an allocation means for the linears of the plan that it was made for."""
    assert plan.problem is not None
    by_label = {scheme.label: scheme for scheme in plan.problem.schemes}
    return {one["name"]: by_label[one["scheme"]] for one in result["linears"]}


def _settle(plan: Plan, losses: Losses) -> dict[str, Any]:
    problem = plan.problem
    assert problem is not None
    chosen = problem.choose(losses)
    sizes = {choice.linears: dict(zip(choice.schemes, choice.bytes, strict=True)) for choice in problem.choices}
    count = problem.fixed + sum(options[chosen[names[0]]] for names, options in sizes.items())
    loss = sum(losses[name][one.label] for name, one in chosen.items())
    return {"limit_bytes": problem.limit, "bytes": count, "bits_per_weight": round(8 * count / problem.weights, 4),
            "samples": plan.recipe.search_samples, "loss": _rounded(loss),
            "linears": [{"name": one.name, "scheme": chosen[one.name].label, "losses": losses[one.name]}
                        for one in plan.linears if one.name in chosen]}


def _open(checkpoint: Checkpoint, plan: Plan, ids: torch.Tensor, work: Workspace, tell: Any) -> Search:
    samples, length = ids.shape
    share = int(plan.recipe.memory_budget_gb * 1e9) // 2
    batches, held_out = batches_for(samples, length, plan.recipe.calibration.batch_tokens or 0, MEASURED)
    first = min(held_out, default=0)
    hidden, gradient = (StreamStore(count, length, plan.skeleton.hidden, dtype, share, work.folder)
                        for count, dtype in ((samples, plan.model_dtype), (samples - first, torch.float32)))
    arguments = blocks.capture(plan.skeleton, checkpoint.read, ids, hidden, plan.device, plan.compute_dtype, batches)
    return Search(checkpoint, plan, ids, work, tell, hidden, gradient, arguments, batches, first)


def _search(search: Search) -> Losses:
    """The losses of all linears, from the blocks that are not done yet and from the journal."""
    plan, done = search.plan, search.work.finished
    stages = [f"sensitivity of block {index}" for index in range(plan.blocks)]
    left = next((index for index, stage in enumerate(stages) if stage in done), plan.blocks)
    if not search.path("gradient", left).exists():
        _forward(search)
        search.tell("search: the gradient of the output head")
        backward.head_gradient(plan.skeleton, search.checkpoint.read, search.ids, search.hidden, search.gradient,
                               plan.recipe.seed, plan.device, plan.compute_dtype, search.arguments.as_tuple,
                               search.first)
        search.gradient.save(search.path("gradient", left))
        search.path("hidden", left).unlink()
    else:
        search.gradient.load(search.path("gradient", left))
    for index in reversed(range(left)):
        search.tell(f"search: the sensitivity of block {index + 1} of {plan.blocks}")
        losses = _block(search, index)
        search.gradient.save(search.path("gradient", index))
        search.work.record(stages[index], {"losses": losses})
        search.path("gradient", index + 1).unlink()
        search.path("hidden", index).unlink()
        heap.give_back()
    return {name: losses for stage in stages for name, losses in done[stage]["losses"].items()}


def _forward(search: Search) -> None:
    """Leave the inputs of every block in its file, and those of the head in `hidden` too."""
    plan = search.plan
    there = max((index for index in range(plan.blocks + 1) if search.path("hidden", index).exists()), default=None)
    if there is None:
        there = 0
        search.hidden.save(search.path("hidden", 0))
    else:
        search.hidden.load(search.path("hidden", there))
    for index in range(there, plan.blocks):
        search.tell(f"search: forward through block {index + 1} of {plan.blocks}")
        block = _load(search, index)
        statistics.propagate(block, plan.skeleton.blocks[index], search.arguments, index, search.hidden,
                             search.batches, plan.device, plan.compute_dtype)
        search.hidden.save(search.path("hidden", index + 1))


def _block(search: Search, index: int) -> Losses:
    """Losses of the linears of one block; the gradient moves to its entrance."""
    plan, prefix = search.plan, search.plan.skeleton.blocks[index]
    schemes = {name: choice.schemes for choice in (plan.problem.choices if plan.problem else ())
               for name in choice.linears}
    linears = {one.name: one for one in plan.linears if one.block == index and one.name in schemes}
    search.hidden.load(search.path("hidden", index))
    block = _load(search, index)
    kept = _stores(search, block, list(linears.values()))
    squares = backward.block_gradient(block, prefix, list(linears), search.arguments, index, search.hidden,
                                      search.gradient, search.measured, plan.device, plan.compute_dtype, kept,
                                      search.first)
    collected = statistics.collect(block, prefix, list(linears), search.arguments, index, search.hidden,
                                   search.batches, range(search.first, len(search.ids)) if search.first else (),
                                   plan.device, plan.compute_dtype)
    losses: Losses = {name: {} for name in linears}
    while collected:
        names, stats = collected.popitem()
        for scheme in dict.fromkeys(scheme for name in names for scheme in schemes[name]):
            members = [linears[name] for name in names if scheme in schemes[name]]
            joint = found.load("grids", scheme.grid).JOINT
            for group in [members] if joint else [[one] for one in members]:
                paths = [one.name.removeprefix(prefix + ".") + ".weight" for one in group]
                weights = [block.get_parameter(path).float() for path in paths]
                difference = _error(plan, group, weights, scheme, stats)
                for one, rows in zip(group, difference.split([len(weight) for weight in weights]), strict=True):
                    if one.name in kept:
                        loss = kept[one.name].loss(rows) / search.ids.shape[1]
                    else:
                        loss = _expert_loss(rows, squares.get(one.name), stats, search.ids[search.first:].numel())
                    losses[one.name][scheme.label] = _finite(one.name, loss)
    for stores in kept.values():
        stores.inputs.close()
        stores.slopes.close()
    return losses


def _stores(search: Search, block: torch.nn.Module, linears: Sequence[LinearPlan]) -> dict[str, backward.Kept]:
    """Files for what is kept of each linear but experts."""
    prefix = search.plan.skeleton.blocks[linears[0].block] if linears else ""
    experts = statistics.expert_prefixes(block, prefix)
    samples, length = len(search.ids) - search.first, search.ids.shape[1]

    def store(width: int, dtype: torch.dtype) -> StreamStore:
        return StreamStore(samples, length, width, dtype, 0, search.work.folder)

    return {one.name: backward.Kept(store(one.shape[1], search.plan.model_dtype), store(one.shape[0], torch.float32))
            for one in linears if not experts or not one.name.startswith(experts)}


def _load(search: Search, index: int) -> torch.nn.Module:
    plan = search.plan
    return blocks.load_block(plan.skeleton, index, search.checkpoint.read, plan.device, plan.compute_dtype)


@torch.inference_mode()
def _error(plan: Plan, group: Sequence[LinearPlan], weights: Sequence[torch.Tensor], scheme: Scheme,
           stats: CalibrationStats) -> torch.Tensor:
    """W - Q of linears that share their input, stacked [N, K], with a scheme and the recipe's steps.

    The steps end where codes are chosen: to refine them costs as much again and helps all schemes alike.
    """
    weight = torch.cat(list(weights))
    layer = Layer(group[0].name, weight, weight, scheme, plan.format.scale_dtype(plan.model_dtype),
                  stats if plan.solves_on_text else None)
    for step, options in plan.steps:
        layer = step.run(layer, options)
        if layer.quantized is not None:
            return weight - found.load("grids", scheme.grid).decode(layer.quantized)
    raise PlanError(f"no step of {plan.recipe.method} chooses codes; end the recipe's steps with rtn or gptq")


def _expert_loss(difference: torch.Tensor, squares: torch.Tensor | None, stats: CalibrationStats, tokens: int) -> float:
    """½ Σ_i g_i (D H Dᵀ)_ii; squares: Σ over tokens of (∂loss/∂y_i)² [N], None for an expert without any."""
    if squares is None:
        return 0.0
    energy = stats.held_out.energy if stats.held_out.tokens else quality.energy_under(stats.hessian)
    return 0.5 * energy((squares / tokens).sqrt()[:, None] * difference)


def _finite(name: str, loss: float) -> float:
    if not 0 <= loss < float("inf"):
        raise NumericalError(f"{name}: its sensitivity is not finite; use more damping or more calibration tokens")
    return _rounded(loss)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
