"""Sixteen levels learned for each linear: a scalar codebook by Lloyd's method (Lloyd-Max), one scale per row or group.

The levels are those of least error over the weights in units of their scale, each weighted by the square of the scale
and, where there is text, by diag(H); then scales are searched for these levels, and again. Stored in AQLM's layout,
formats/aqlm.py, as bitsandbytes decodes with its own table whatever the file's quant_map says.
Source: Lloyd, Least squares quantization in PCM (1982); SqueezeLLM, arXiv 2306.07629, for weights and their importance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from qtool.grids._levels import LevelGrid, midpoints
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor

JOINT, FREE_SCALES = False, False
COUNT, BINS, LLOYD_ROUNDS, TURNS = 16, 1 << 14, 60, 2
CHUNK = 1 << 18  # weights at a time
UNIFORM = torch.linspace(-1.0, 1.0, COUNT)
GRID = LevelGrid("lloyd4", 4, UNIFORM, midpoints(UNIFORM))
check, width, reach = GRID.check, GRID.width, GRID.reach


def fit(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor | None = None,
        shrink_steps: int = 1, signed: bool = False, rounds: int = 0) -> QuantizedTensor:
    """Scales of weight [N, K] as LevelGrid.fit has them, and extra["levels"] [16] in scale_dtype."""
    group = width(scheme, weight.shape[1])
    importance = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    fitted = GRID.fit(weight, scheme, scale_dtype)
    levels = UNIFORM.to(weight.device)
    for _ in range(TURNS):
        levels = learned(weight, fitted.scale.float(), importance, group).to(scale_dtype).float()
        fitted = _with(levels).fit(weight, scheme, scale_dtype, importance, shrink_steps, signed, rounds)
    return replace(fitted, extra={"levels": levels.to(scale_dtype)})


def learned(weight: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor, group: int) -> torch.Tensor:
    """Levels float32 [16], ascending, of least error over weight [N, K] in units of scale [N, G].

    In bins that are far narrower than levels are apart. Begins with as many levels in a place as the cube root of the
    weight there, which is best for many levels (Panter and Dite, 1951).
    """
    device = weight.device
    weight, scale, importance = weight.cpu(), scale.cpu(), importance.cpu()  # a GPU adds in any order
    mass, total = torch.zeros(2, BINS, dtype=torch.float64)
    rows = max(1, CHUNK // max(weight.shape[1], 1))
    for some, steps in zip(weight.split(rows), scale.split(rows), strict=True):
        ratio = (some.reshape(*steps.shape, group) / steps[..., None]).clamp(-1, 1).double()
        heavy = importance.double().reshape(1, -1, group) * steps.double().square()[..., None]
        place = ((ratio + 1) * (BINS / 2)).long().clamp(0, BINS - 1).flatten()
        mass += torch.bincount(place, heavy.expand_as(ratio).flatten(), BINS)
        total += torch.bincount(place, (heavy * ratio).flatten(), BINS)
    if not float(mass.sum()) > 0:
        return UNIFORM.to(device)
    smooth = mass.reshape(256, -1).sum(1).pow(1 / 3).repeat_interleave(BINS // 256).cumsum(0)
    wanted = (torch.arange(COUNT).double() + 0.5) / COUNT * smooth[-1]
    middle = (torch.arange(BINS).double() + 0.5) * (2 / BINS) - 1
    levels = middle[torch.searchsorted(smooth, wanted).clamp_max(BINS - 1)]
    for _ in range(LLOYD_ROUNDS):
        chosen = torch.bucketize(middle, midpoints(levels))
        cells = torch.zeros_like(levels).index_add_(0, chosen, mass)
        means = torch.zeros_like(levels).index_add_(0, chosen, total) / cells
        levels = torch.where(cells > 0, means, levels).sort().values
    return levels.float().to(device)


def encode(weight: torch.Tensor, fitted: QuantizedTensor) -> QuantizedTensor:
    """Every weight [N, K] at the nearest level."""
    return _of(fitted).encode(weight, fitted)


def decode(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [N, K]."""
    return _of(tensor).decode(tensor)


def learnable(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """What the format stores as real numbers: levels [16] and scales [N, G], copies in float32."""
    return {"levels": tensor.extra["levels"].float().clone(), "scales": tensor.scale.float().clone()}


def smooth(tensor: QuantizedTensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [N, K] of the tensor's codes, differentiable in `values`."""
    levels = torch.nn.functional.embedding(tensor.codes.long(), values["levels"][:, None])
    return (levels.reshape(*tensor.scale.shape, -1) * values["scales"][..., None]).flatten(1)


def stored(tensor: QuantizedTensor, values: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """The tensor with these values, rounded to the dtypes that it has; levels that changed places are put in order."""
    levels = values["levels"].detach().to(tensor.extra["levels"].dtype)
    order = levels.float().argsort(stable=True)
    codes = order.argsort().to(torch.uint8)[tensor.codes.long()]
    return replace(tensor, codes=codes, scale=values["scales"].detach().to(tensor.scale.dtype),
                   extra={**tensor.extra, "levels": levels[order]})


def solve_columns(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, fitted: QuantizedTensor,
                  group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.solve_columns."""
    return _of(fitted).solve_columns(weight, shift, factor, fitted, group_index)


def refine_columns(gradient: torch.Tensor, hessian: torch.Tensor, part: QuantizedTensor,
                   group_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.refine_columns."""
    return _of(part).refine_columns(gradient, hessian, part, group_index)


def _of(tensor: QuantizedTensor) -> LevelGrid:
    return _with(tensor.extra["levels"].float())


def _with(levels: torch.Tensor) -> LevelGrid:
    return replace(GRID, levels=levels, edges=midpoints(levels))
