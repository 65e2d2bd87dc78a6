"""What one method step hands to the next: one stacked linear problem and its present answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qtool.errors import NumericalError
from qtool.recipe import Scheme
from qtool.tensors import CalibrationStats, QuantizedTensor, all_finite


@dataclass(frozen=True)
class Layer:
    """Linears that share their input (q/k/v, gate/up), stacked along the output rows.

    weight: the original, float32 [N, K].  target: what the quantized weight should come close to; equals weight
    unless a step moved it.  quantized: the answer so far.  notes: what the manifest should tell.  repaired: what had to
    be done for an answer, by the kinds of repairs.py.
    """

    name: str
    weight: torch.Tensor
    target: torch.Tensor
    scheme: Scheme
    scale_dtype: torch.dtype
    stats: CalibrationStats | None = None
    quantized: QuantizedTensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)

    def having(self, **changes: Any) -> Layer:
        """With other fields; notes and repairs are added to those there are."""
        for key in ("notes", "repaired"):
            changes[key] = {**getattr(self, key), **changes.get(key, {})}
        return replace(self, **changes)


@dataclass(frozen=True)
class Survey:
    """What the inputs of some linears look like: mean and largest |x| per channel [K], some tokens x [T, K].

    outliers: of the tokens, the share that LLM.int8() takes for outliers, per channel [K].  hessian: mean of x xᵀ over
    all tokens [K, K], where it was asked for.  tie: averages values [K] over channels that must have the same scale.
    """

    mean: torch.Tensor
    largest: torch.Tensor
    outliers: torch.Tensor
    sample: torch.Tensor
    hessian: torch.Tensor | None = None
    tie: Callable[[torch.Tensor], torch.Tensor] = lambda values: values


def damped(hessian: torch.Tensor, damping: float, mode: str) -> torch.Tensor:
    """H + λ for positive definiteness, in a new matrix; see `damp`."""
    return damp(hessian.clone(), damping, mode)


def damp(hessian: torch.Tensor, damping: float, mode: str) -> torch.Tensor:
    """Add λ to the diagonal of H [K, K] in place, dead inputs (H_jj = 0) given the mean of the others first.

    mode "mean": λ = damping * mean(diag H), as in the GPTQ paper; "relative": λ_j = damping * H_jj.
    """
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].double().mean().float() if bool(live.any()) else torch.ones_like(diagonal[0])
    diagonal.copy_(torch.where(live, diagonal, mean))
    diagonal += damping * (mean if mode == "mean" else diagonal.clone())
    return hessian


def factor(name: str, hessian: torch.Tensor, damping: float, mode: str,
           order: torch.Tensor | None = None) -> tuple[torch.Tensor, float, dict[str, str]]:
    """Lower triangular L, float32 [K, K], with L Lᵀ = H + λ, its rows and columns taken in `order` (int64 [K]).

    A matrix that is not positive definite in float32 is tried in float64, then with ten times the damping, and so
    on up to damping 1. Returns L, the damping that was taken and the repair, if it was one.
    Raises NumericalError when even that fails.
    """
    if not all_finite(hessian):
        raise NumericalError(f"{name}: the Hessian has values that are not finite; check the calibration text")
    strength = damping
    while strength <= 1.0:
        for dtype in (torch.float32, torch.float64):
            # no copy of H outlives a line here: these matrices are the largest things in memory
            matrix = hessian.clone() if order is None else hessian[order[:, None], order]
            lower, failed = torch.linalg.cholesky_ex(damp(matrix, strength, mode).to(dtype))
            del matrix
            if not int(failed):
                usual = dtype is torch.float32 and strength == damping
                said = f"factored in {str(dtype).removeprefix('torch.')} at damping {strength:g}, not {damping:g}"
                return lower.float(), strength, {} if usual else {"hessian": said}
        strength = max(strength * 10, 1e-6)
    raise NumericalError(f"{name}: the Hessian is not positive definite even at damping 1; use more calibration "
                         f"tokens, or leave this linear out with a rule (match: '{name}', skip: true)")
