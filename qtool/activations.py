"""How engines round the inputs of a linear at run time."""

from __future__ import annotations

import torch

from qtool import ops
from qtool.recipe import Scheme

INT8_STEPS = 127.5  # compressed-tensors' half range; codes are still clamped to -128 .. 127
FP8_TOP = 448.0
GROUP = 128  # columns of a token that share a scale beside weights in blocks
CLIPPED = tuple(1 - step / 20 for step in range(16))  # parts of the range that a static scale of integers tries
INT8_TOP = 127.0  # LLM.int8()'s largest code


def round_inputs(x: torch.Tensor, scheme: Scheme, static: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] as an engine sees it: values at the nearest code times a scale, which is the absmax of the token, or
    of each 128 columns of it, over the top; or `static` [1], where the scheme's activations say "tensor"."""
    if scheme.activations == "group":
        return _rounded(x.unflatten(-1, (-1, GROUP)), scheme, None).flatten(-2)
    return _rounded(x, scheme, static if scheme.activations == "tensor" else None)


def input_codes(x: torch.Tensor, scheme: Scheme, static: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x [..., K], float32, and what they are multiplied with: [..., 1], or [1] where `static` is."""
    scale = x.abs().amax(-1, keepdim=True).float() / _top(scheme) if static is None else static.float()
    return _codes(x / torch.where(scale == 0, 1.0, scale), scheme), scale


def _rounded(x: torch.Tensor, scheme: Scheme, static: torch.Tensor | None) -> torch.Tensor:
    codes, scale = input_codes(x, scheme, static)
    return (codes * scale).to(x.dtype)


def _codes(scaled: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return scaled.round().clamp(-128, 127) if scheme.grid == "affine" else to_fp8(scaled)


def to_fp8(scaled: torch.Tensor) -> torch.Tensor:
    """float32: the E4M3 value nearest to each of `scaled`, at most 448 in size."""
    return scaled.clamp(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).float()


def static_scale(largest: torch.Tensor, sample: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The one scale [1] in `dtype` of inputs with this largest |x| (any shape), of which `sample` [T, K] are some.

    FP8 covers the whole range. Of integers, whose steps are all of one size, the range with the least squared error.
    """
    whole = (largest.max().float() / _top(scheme)).clamp_min(torch.finfo(torch.float16).tiny).reshape(1)
    if scheme.grid != "affine":
        return whole.to(dtype)
    tried = [(whole * part).to(dtype) for part in CLIPPED]
    fixed = scheme.model_copy(update={"activations": "tensor"})
    errors = [(round_inputs(sample, fixed, scale) - sample).square().sum(dtype=torch.float64) for scale in tried]
    return tried[int(torch.stack(errors).argmin())]


def _top(scheme: Scheme) -> float:
    return INT8_STEPS if scheme.grid == "affine" else FP8_TOP


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
