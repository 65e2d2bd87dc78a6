"""How engines round the inputs of a linear at run time."""

from __future__ import annotations

import torch

from qtool.recipe import Scheme

INT8_STEPS = 127.5  # compressed-tensors' half range; codes are still clamped to -128 .. 127
FP8_TOP = 448.0
OUTLIER = 6.0  # LLM.int8(): a column with an input this large is multiplied in floating point


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


def mixed_product(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, threshold: float) -> torch.Tensor:
    """LLM.int8(): x [T, K] times the transposed weight, [T, N] float32; codes int8 [N, K], absmax float32 [N].

    Input columns with any |x| >= threshold are multiplied in floating point with the dequantized weight columns. The
    rest is rounded to int8, one scale per token, and multiplied as integers; the sums are exact.
    Source: arXiv 2208.07339; bitsandbytes int8_vectorwise_quant, int8_mixed_scaled_mm.
    """
    half = x.half()
    large = half.abs() >= threshold
    columns = large.any(0)
    rows = torch.where(large, 0.0, half.float()).abs().amax(1, keepdim=True)
    inverse = torch.where(rows != 0, 127.0 / rows, 0.0)
    rounded = (torch.where(large, 0.0, half.float()) * inverse).round()
    rounded[:, columns] = 0
    # float64 holds sums of products of 8-bit integers exactly
    sums = rounded.double() @ codes.double().T
    product = (sums.float() * (rows * absmax[None])) / (127.0 * 127.0)
    dense = codes[:, columns].float() * absmax[:, None] / 127.0
    return product + x[:, columns].float() @ dense.T
