"""The manifest's line on one linear: what was stored, how far off it is, what had to be repaired."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool import quality, repairs
from qtool.errors import NumericalError
from qtool.layer import Layer
from qtool.plan import Plan
from qtool.stages import LinearPlan
from qtool.tensors import CalibrationStats, QuantizedTensor

NOTHING = torch.empty(0, 0)


@dataclass(frozen=True)
class Solved:
    """One linear of a solved layer: its rows there, its codes, how many linears were solved with it.

    inputs: what had to be repaired of the statistics of its inputs.
    """

    linear: LinearPlan
    layer: Layer
    rows: slice
    quantized: QuantizedTensor
    together: int
    inputs: dict[str, str]

    def waiting(self) -> Solved:
        """Without what is large and no longer needed, but for what measures the answer."""
        stats = self.layer.stats
        assert stats is not None
        return replace(self, layer=replace(self.layer, stats=replace(stats, hessian=NOTHING, cross=None, paired=None,
                                                                     residual=None)))


def of_linear(plan: Plan, solved: Solved, dense: torch.Tensor) -> dict[str, Any]:
    """One linear; dense: what its codes decode to.

    Output error against the target, on held-out tokens where there are any. Raises NumericalError.
    """
    linear, layer = solved.linear, solved.layer
    repairs.refuse_overflow(linear.name, dense, plan.model_dtype)
    weight, target, stats = layer.weight[solved.rows], layer.target[solved.rows], layer.stats
    in_weights = quality.weight_error(weight, weight - dense)
    in_outputs = None
    if stats is not None:
        energy = stats.held_out.energy if stats.held_out.tokens else quality.energy_under(stats.hessian)
        in_outputs = quality.output_error(target, target - dense, energy)
    if not (in_weights >= 0 and (in_outputs is None or in_outputs >= 0)):
        raise NumericalError(f"{linear.name}: the quantized weight is not finite; use more damping or more "
                             f"calibration tokens, or leave it out with a rule (match: '{linear.name}', skip: true)")
    repaired = {**layer.repaired, **solved.inputs, **repairs.of_weights(weight, solved.quantized, dense)}
    return {
        **_stored(plan, linear, linear.block, in_weights, in_outputs, repaired), **_tokens(stats),
        "solved_together": solved.together, **layer.notes,
        **({"rescaled": True} if plan.rotated and f"{linear.stored}.weight" in plan.rotated.changes else {}),
    }


def of_matrix(plan: Plan, linear: LinearPlan, error: float, lost: int, groups: int) -> dict[str, Any]:
    """An embedding or head; lost: of its groups of weights, those that became zero."""
    return {**_stored(plan, linear, None, error, None, repairs.of_groups(lost, groups)), **_tokens(None),
            "solved_together": 1}


def worst(layers: list[dict[str, Any]]) -> tuple[str, float] | None:
    """The largest error of outputs among some linears, with the name; None where none is known."""
    errors = [(layer["name"], layer["relative_error"]) for layer in layers if layer["relative_error"] is not None]
    return max(errors, key=lambda pair: pair[1], default=None)


def _stored(plan: Plan, linear: LinearPlan, block: int | None, in_weights: float, in_outputs: float | None,
            repaired: dict[str, str]) -> dict[str, Any]:
    ratio = quality.sqnr_db(in_weights if in_outputs is None else in_outputs)
    return {
        "name": linear.name, "stored": linear.stored, "block": block, "shape": list(linear.shape),
        "scheme": linear.scheme.model_dump(), "bytes": plan.linear_bytes(linear),
        "relative_error": short(in_outputs), "weight_error": short(in_weights), "sqnr_db": short(ratio),
        **({"repaired": repaired} if repaired else {}),
    }


def _tokens(stats: CalibrationStats | None) -> dict[str, Any]:
    if stats is None:
        return {"tokens": 0, "held_out_tokens": 0, "pooled": False}
    return {"tokens": stats.tokens, "held_out_tokens": stats.held_out.tokens, "pooled": stats.pooled}


def short(value: float | None) -> float | None:
    """Six digits, as manifests have figures."""
    return None if value is None else float(f"{value:.6g}")
