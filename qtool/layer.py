"""What one method step hands to the next: one stacked linear problem and its present answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qtool.errors import NumericalError
from qtool.recipe import Scheme
from qtool.tensors import CalibrationStats, QuantizedTensor


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
    """H + λ I for positive definiteness, dead inputs (H_jj = 0) given a unit diagonal. float32 or float64 [K, K].

    mode "mean": λ = damping * mean(diag H), as in the GPTQ paper; "relative": λ_j = damping * H_jj.
    """
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += damping * (diagonal.mean() if mode == "mean" else diagonal.clone())
    return result


def factor(name: str, hessian: torch.Tensor, damping: float, mode: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Upper triangular R with H + λ = R Rᵀ: Cholesky of the index-reversed matrix (frontier 1.1), no inverse.

    A matrix that is not positive definite in float32 is tried in float64, then with ten times the damping, and so
    on up to damping 1; the notes say what was needed. Raises NumericalError when even that fails.
    """
    if not torch.isfinite(hessian).all():
        raise NumericalError(f"{name}: the Hessian has values that are not finite; check the calibration text")
    strength = damping
    while strength <= 1.0:
        matrix = damped(hessian, strength, mode).flip(0, 1)
        for dtype in (torch.float32, torch.float64):
            lower, failed = torch.linalg.cholesky_ex(matrix.to(dtype))
            if not int(failed):
                notes: dict[str, Any] = {"damping": strength}
                if dtype is torch.float64 or strength != damping:
                    precision = str(dtype).removeprefix("torch.")
                    notes["repaired"] = f"Hessian factored in {precision} at damping {strength:g}"
                return lower.flip(0, 1).float(), notes
        strength = max(strength * 10, 1e-6)
    raise NumericalError(f"{name}: the Hessian is not positive definite even at damping 1; use more calibration tokens")
