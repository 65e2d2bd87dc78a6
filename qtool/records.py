"""The manifest's line on one linear: what was stored, how far off it is, what had to be repaired."""

from __future__ import annotations

from typing import Any

import torch

from qtool import quality, repairs
from qtool.errors import NumericalError
from qtool.layer import Layer
from qtool.plan import Plan
from qtool.stages import LinearPlan
from qtool.tensors import CalibrationStats, QuantizedTensor


def of_linear(plan: Plan, linear: LinearPlan, layer: Layer, rows: slice, quantized: QuantizedTensor,
              dense: torch.Tensor, solved_together: int) -> dict[str, Any]:
    """One linear of a solved layer, its `rows`; dense: what `quantized` decodes to.

    Output error against the target, on held-out tokens where there are any. Raises NumericalError.
    """
    repairs.refuse_overflow(linear.name, dense, plan.model_dtype)
    weight, target, stats = layer.weight[rows], layer.target[rows], layer.stats
    in_weights = quality.weight_error(weight, weight - dense)
    in_outputs = None
    if stats is not None:
        energy = stats.held_out.energy if stats.held_out.tokens else quality.energy_under(stats.hessian)
        in_outputs = quality.output_error(target, target - dense, energy)
    if not (in_weights >= 0 and (in_outputs is None or in_outputs >= 0)):
        raise NumericalError(f"{linear.name}: the quantized weight is not finite; use more damping or more "
                             f"calibration tokens, or leave it out with a rule (match: '{linear.name}', skip: true)")
    repaired = {**layer.repaired, **repairs.of_inputs(stats), **repairs.of_weights(weight, quantized, dense)}
    return {
        **_stored(plan, linear, linear.block, in_weights, in_outputs, repaired), **_tokens(stats),
        "solved_together": solved_together, **layer.notes,
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
        "relative_error": _rounded(in_outputs), "weight_error": _rounded(in_weights), "sqnr_db": _rounded(ratio),
        **({"repaired": repaired} if repaired else {}),
    }


def _tokens(stats: CalibrationStats | None) -> dict[str, Any]:
    if stats is None:
        return {"tokens": 0, "held_out_tokens": 0, "pooled": False}
    return {"tokens": stats.tokens, "held_out_tokens": stats.held_out.tokens, "pooled": stats.pooled}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
