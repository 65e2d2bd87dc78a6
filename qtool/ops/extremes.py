"""Brings what is fitted into the range where float32 can add up squared errors. Powers of two change no other bit."""

from __future__ import annotations

import torch

SMALL, LARGE = 2.0**-40, 2.0**40  # of the largest weight; between these all is taken as it is
DEAD = 2.0**-20  # of the mean importance, for columns that have none: their weights are rounded as well as others allow
LEAST = 2.0**-12  # of the largest importance in a sub-block
WIDE = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # types of scales with float32's exponents


def in_range(weight: torch.Tensor, group: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight [N, K] and None, or, of a matrix of very large or very small weights, each group over a power of two.

    Then the second is these powers, float32 [N, K / group], and a scale that is fitted is to be multiplied with them.
    Types of scales that do not have such powers are left alone.
    """
    if scale_dtype not in WIDE or not weight.numel():
        return weight, None
    largest = max(abs(float(end)) for end in weight.aminmax())
    if largest == 0 or SMALL <= largest <= LARGE or not largest < float("inf"):
        return weight, None
    tile = weight.reshape(weight.shape[0], -1, group)
    low, high = tile.aminmax(dim=-1)
    span = torch.maximum(low.abs(), high.abs())
    power = (span.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(2.0**-126, 2.0**126)
    power = torch.where(span > 0, power, 1.0)
    return (tile / power[..., None]).reshape(weight.shape), power


def back(scale: torch.Tensor, power: torch.Tensor | None, scale_dtype: torch.dtype) -> torch.Tensor:
    """A fitted scale [N, G], float32, in the units of the weight: a number of its type, never zero or infinite."""
    if power is None:
        return scale
    kind = torch.finfo(scale_dtype)
    product = scale * power
    size = product.abs().clamp(kind.tiny, kind.max)
    return torch.where(product < 0, -size, size)


def weighing(importance: torch.Tensor) -> torch.Tensor:
    """importance [K] over a power of two near its mean; what is zero in it becomes a small part of the mean.

    Without that, groups of columns that calibration text left at zero would have no error to be fitted by.
    """
    live = importance > 0
    mean = float(importance[live].double().mean()) if bool(live.any()) else 0.0
    if not 0 < mean < float("inf"):
        return torch.ones_like(importance)
    unit = torch.frexp(torch.tensor(mean, dtype=torch.float64)).exponent
    scaled = torch.ldexp(importance.double(), -unit).float()
    return torch.where(scaled > 0, scaled, DEAD)


def levelled(importance: torch.Tensor, group: int) -> torch.Tensor:
    """importance [K] with nothing in a group far below its largest value.

    A closed form for a scale and a minimum needs two columns that count; beside a single one it is lost to rounding.
    """
    tile = importance.reshape(-1, group)
    return torch.maximum(tile, tile.amax(-1, keepdim=True) * LEAST).reshape(importance.shape)
