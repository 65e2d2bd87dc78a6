"""How engines round the inputs of a linear at run time."""

from __future__ import annotations

import torch

from qtool import ops
from qtool.recipe import Scheme

INT8_STEPS = 127.5  # compressed-tensors' half range; codes are still clamped to -128 .. 127
FP8_TOP = 448.0
INT8_TOP = 127.0  # LLM.int8()'s largest code


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

    Outlier columns, those with any |x| >= threshold (none at threshold 0), are multiplied with the dequantized weight
    columns, both in the dtype of x, and summed in float32. The rest is rounded to int8 with one scale per token and
    multiplied as integers. Outliers and scales are those of x in float16; a token that has a NaN there, or an infinity
    that is no outlier, gets NaN. Source: arXiv 2208.07339; bitsandbytes int8_vectorwise_quant, int8_mixed_scaled_mm.
    """
    half = x.half()
    outliers = outlier_mask(half, threshold)
    columns = outliers.any(0).nonzero().flatten()
    small = half.masked_fill(outliers, 0.0).float()
    largest = small.abs().amax(1) if small.shape[1] else small.new_zeros(len(small))
    rounded = (small * torch.where(largest != 0, INT8_TOP / largest, 0.0)[:, None]).round().nan_to_num(0.0)
    rounded[:, columns] = 0
    product = ops.multiply_int8(rounded.to(torch.int8), codes, largest / INT8_TOP, absmax / INT8_TOP)
    if len(columns):
        weight = (codes[:, columns].float() * (absmax[:, None] / INT8_TOP)).to(x.dtype)
        product.addmm_(x[:, columns].float(), weight.float().T)
    return product


def outlier_mask(half: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which inputs (float16) LLM.int8() takes for outliers."""
    return half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
