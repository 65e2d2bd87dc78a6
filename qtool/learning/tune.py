"""The step tune on one block of a run: what is learned, from which tokens, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.func import functional_call

from qtool.learning import weights
from qtool.learning.block import Outcome, Schedule, descend, output_loss
from qtool.plan import Plan
from qtool.records import Solved
from qtool.stages import Stage
from qtool.stream import Stream


@dataclass(frozen=True)
class Tuned:
    """solved: with the codes and scales that were learned.  gains: other parameters, by stored name.  note: what the
    manifest tells of the block, for each step."""

    solved: list[Solved]
    gains: dict[str, torch.Tensor]
    note: list[dict[str, Any]]


def tune(plan: Plan, stage: Stage, block: torch.nn.Module, stream: Stream, solved: Sequence[Solved]) -> Tuned:
    """Learn on a block whose linears have all been solved; leaves it with the parameters that were learned.

    The steps follow each other, each from what the one before has left.
    """
    stream.finish_original(stage.block or 0)
    made = Tuned(list(solved), {}, [])
    for options in plan.learning:
        after = _tuned(plan, stage, block, stream, made.solved, options)
        made = Tuned(after.solved, {**made.gains, **after.gains}, made.note + after.note)
    return made


def _tuned(plan: Plan, stage: Stage, block: torch.nn.Module, stream: Stream, solved: Sequence[Solved],
           options: Any) -> Tuned:
    prefix = plan.skeleton.blocks[stage.block or 0] + "."
    paths = [one.linear.name.removeprefix(prefix) + ".weight" for one in solved]
    tensors = {path: one.quantized for path, one in zip(paths, solved, strict=True)}
    names = {path: plan.skeleton.source(prefix + path) for path in weights.gains_of(block, tensors)}
    dtypes = {spec.name: spec.dtype for spec in stage.outputs}
    gains = {path: block.get_parameter(path).detach().to(dtypes[name]) for path, name in names.items()
             if options.gains and name in dtypes}
    originals = {path: one.layer.target[one.rows] for path, one in zip(paths, solved, strict=True)}
    begin = weights.start(tensors, gains, originals if options.rounding != "frozen" else None)
    moves = weights.moves(begin, options.scales)
    outcome = _learn(plan, stage, block, stream, begin, moves, options)
    made, learned = weights.answer(begin, outcome.moves)
    with torch.no_grad():
        for path, value in weights.parameters(begin, outcome.moves).items():
            block.get_parameter(path).copy_(value)
    again = [replace(one, quantized=made[path]) for path, one in zip(paths, solved, strict=True)]
    return Tuned(again, {names[path]: gain.cpu() for path, gain in learned.items()}, [_note(outcome)])


def _learn(plan: Plan, stage: Stage, block: torch.nn.Module, stream: Stream, begin: weights.Start,
           moves: weights.Moves, options: Any) -> Outcome:
    index = stage.block or 0
    fitting, held = stream.learning_batches(options.share)
    size = max(1, options.tokens // (plan.recipe.calibration.sequence_length * (fitting[0].stop - fitting[0].start)))

    def loss(batch: slice, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        entrance, target = stream.ends(batch)
        args, kwargs = stream.arguments.for_block(index, len(entrance))
        parts = {path: tensor.to(plan.compute_dtype) for path, tensor in parameters.items()}
        output = functional_call(block, parts, (entrance, *args), kwargs)
        return output_loss(output[0] if isinstance(output, tuple) else output, target, entrance, options.clip)

    rates = {weights.LATENT: options.offset_rate if options.rounding == "offset" else options.weight_rate}

    def rate(name: str) -> float:
        return rates.get(name.rpartition("|")[2], options.rate if "|" in name else options.gain_rate)

    schedule = Schedule(rate, options.epochs, size, lambda name: options.rounding == "offset"
                        and name.endswith("|" + weights.LATENT), patience=options.patience)
    return descend(moves, lambda now: weights.parameters(begin, now), loss, fitting, held, schedule)


def _note(outcome: Outcome) -> dict[str, Any]:
    return {"loss_before": float(f"{outcome.before:.6g}"), "loss_after": float(f"{outcome.after:.6g}"),
            "steps": outcome.steps, "kept_step": outcome.kept}
