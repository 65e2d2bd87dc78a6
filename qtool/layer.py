"""What one method step hands to the next: one stacked linear problem and its present answer."""

from __future__ import annotations

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
    unless a step moved it.  quantized: the answer so far.  notes: what the manifest should tell.
    """

    name: str
    weight: torch.Tensor
    target: torch.Tensor
    scheme: Scheme
    scale_dtype: torch.dtype
    stats: CalibrationStats | None = None
    quantized: QuantizedTensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def having(self, **changes: Any) -> Layer:
        notes = {**self.notes, **changes.pop("notes", {})}
        return replace(self, notes=notes, **changes)


def damped(hessian: torch.Tensor, damping: float, mode: str) -> torch.Tensor:
    """H + λ for positive definiteness, in a new matrix; see `damp`."""
    return damp(hessian.clone(), damping, mode)


def damp(hessian: torch.Tensor, damping: float, mode: str) -> torch.Tensor:
    """Add λ to the diagonal of H [K, K] in place, dead inputs (H_jj = 0) given a unit diagonal first.

    mode "mean": λ = damping * mean(diag H), as in the GPTQ paper; "relative": λ_j = damping * H_jj.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += damping * (diagonal.mean() if mode == "mean" else diagonal.clone())
    return hessian


def factor(name: str, hessian: torch.Tensor, damping: float, mode: str,
           order: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Lower triangular L, float32 [K, K], with L Lᵀ = H + λ, its rows and columns taken in `order` (int64 [K]).

    A matrix that is not positive definite in float32 is tried in float64, then with ten times the damping, and so
    on up to damping 1; the notes say what was needed. Raises NumericalError when even that fails.
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
                notes: dict[str, Any] = {"damping": strength}
                if dtype is torch.float64 or strength != damping:
                    precision = str(dtype).removeprefix("torch.")
                    notes["repaired"] = f"Hessian factored in {precision} at damping {strength:g}"
                return lower.float(), notes
        strength = max(strength * 10, 1e-6)
    raise NumericalError(f"{name}: the Hessian is not positive definite even at damping 1; use more calibration tokens")
