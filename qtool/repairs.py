"""What numbers did not allow, and what was done about it: for the manifest, the summary and `inspect --layers`.

A repair keeps the method and says what it had to do without; what none makes right is an error that names the linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qtool import found
from qtool.errors import NumericalError
from qtool.recipe import Scheme
from qtool.tensors import CalibrationStats, QuantizedTensor

LARGEST = 2.0**124  # float32 needs some room above, where a group is decoded and added up
# kind -> what a list of such linears is headed with; what is said of one
KINDS = {
    "hessian": ("whose Hessian was repaired", "Hessian repaired"),
    "few_tokens": ("with fewer tokens than input columns", "fewer tokens than columns"),
    "dead_inputs": ("with input columns that are always zero", "dead inputs"),
    "target": ("whose asymmetric target was left out", "target left out"),
    "refine": ("that could not be refined", "not refined"),
    "too_small": ("with groups too small for their scales, which are zero now", "groups became zero"),
}


def of_inputs(stats: CalibrationStats | None) -> dict[str, str]:
    """What the statistics of linears that share their inputs lack, by kind."""
    if stats is None:
        return {}
    columns, said = len(stats.hessian), {}
    if stats.tokens < columns and not stats.pooled:
        said["few_tokens"] = (f"{stats.tokens} tokens for {columns} input columns; damping stands in for the missing "
                              "ranks")
    dead = int((stats.hessian.diagonal() <= 0).sum())
    if dead:
        said["dead_inputs"] = (f"{dead} of {columns} input columns are zero on all calibration text; their weights are "
                               "rounded to nearest")
    return said


def of_weights(weight: torch.Tensor, quantized: QuantizedTensor, dense: torch.Tensor) -> dict[str, str]:
    """What became of a weight [N, K], by kind. dense: its values as decoded."""
    return of_groups(*lost_groups(weight, quantized.group_size, dense))


def lost_groups(weight: torch.Tensor, group: int, dense: torch.Tensor) -> tuple[int, int]:
    """How many groups of columns became zero though their weights [N, K] are not, and how many there are."""
    low, high = dense.view(len(dense), -1, group).aminmax(dim=-1)
    zero = (low == 0) & (high == 0)
    lost = int((weight.view(*zero.shape, group)[zero] != 0).any(-1).sum()) if bool(zero.any()) else 0
    return lost, zero.numel()


def of_groups(lost: int, groups: int) -> dict[str, str]:
    """What is said of so many groups that became zero."""
    return {"too_small": f"{lost} of {groups} groups of weights are too small for the scales that the format has; they "
                         "are zero now"} if lost else {}


def refuse_too_large(name: str, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    """Raise NumericalError for a weight [N, K] with values beyond what the grid reaches with its largest scale."""
    if not weight.numel():
        return
    largest = max(abs(float(end)) for end in weight.aminmax())
    reach = min(found.load("grids", scheme.grid).reach(scheme, scale_dtype), LARGEST)
    if largest <= reach:
        return
    kind = str(scale_dtype).removeprefix("torch.")
    raise NumericalError(f"{name}: its largest weight, {largest:.4g}, is beyond the {reach:.4g} that {scheme.label} "
                         f"reaches with scales in {kind}; choose a format with wider scales (--format "
                         f"compressed-tensors), or leave this linear out with a rule (match: '{name}', skip: true)")


def refuse_overflow(name: str, dense: torch.Tensor, model_dtype: torch.dtype) -> None:
    """Raise NumericalError for a dequantized weight [N, K] that the model's type, in which engines multiply, cannot
    hold."""
    if model_dtype is not torch.float16 or not dense.numel():
        return
    largest = max(abs(float(end)) for end in dense.aminmax())
    if not largest <= torch.finfo(model_dtype).max:
        raise NumericalError(f"{name}: dequantized, its weight reaches {largest:.4g}, more than float16 holds, in "
                             "which engines multiply; use --set dtype=bfloat16, or leave this linear out with a rule "
                             f"(match: '{name}', skip: true)")


def listed(layers: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """For each kind of repair that some of the layers needed: its heading, and their names."""
    layers = list(layers)
    found_kinds = [(heading, [layer["name"] for layer in layers if kind in kinds(layer)])
                   for kind, (heading, _) in KINDS.items()]
    found_kinds.append(("with too few tokens of their own", [one["name"] for one in layers if one.get("pooled")]))
    return [(heading, names) for heading, names in found_kinds if names]


def kinds(layer: Mapping[str, Any]) -> list[str]:
    """The repairs of a layer of a manifest, in a fixed order."""
    repaired = layer.get("repaired")
    return [kind for kind in KINDS if kind in repaired] if isinstance(repaired, Mapping) else []
