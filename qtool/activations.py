"""How engines round the inputs of a linear at run time."""

from __future__ import annotations

import torch

from qtool.recipe import Scheme

INT8_STEPS = 127.5  # compressed-tensors' half range; codes are still clamped to -128 .. 127
FP8_TOP = 448.0


def round_tokens(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """x [..., K] as an engine sees it: scale = absmax of the token over the half range, values at the nearest code."""
    top = INT8_STEPS if scheme.grid == "affine" else FP8_TOP
    scale = x.abs().amax(-1, keepdim=True).float() / top
    scaled = x / torch.where(scale == 0, 1.0, scale)
    if scheme.grid == "affine":
        codes = scaled.round().clamp(-128, 127)
    else:
        codes = scaled.clamp(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).float()
    return (codes * scale).to(x.dtype)
