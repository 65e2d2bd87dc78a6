"""LLM.int8()'s weights: -127 .. 127 with one scale per row, the largest weight of the row as float16 has it, over 127.

Source: arXiv 2208.07339; bitsandbytes int8_vectorwise_quant. The row's absmax is kept in extra["absmax"], float32 [N].
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qtool.grids._levels import LevelGrid, midpoints
from qtool.recipe import Scheme
from qtool.tensors import NO_CODES, QuantizedTensor

TOP, ZERO = 127, 127  # the largest step; the code that stands for zero
GRID = LevelGrid("vectorwise-int8", 8, torch.arange(-127.0, 128.0), midpoints(torch.arange(-127.0, 128.0)), (-1,))
JOINT, FREE_SCALES = False, False
check, width, decode = GRID.check, GRID.width, GRID.decode
steps, solve_columns, refine_columns = GRID.steps, GRID.solve_columns, GRID.refine_columns


def reach(scheme: Scheme, scale_dtype: torch.dtype) -> float:
    """The largest |weight| that float16, from which codes are made, can hold."""
    return float(torch.finfo(torch.float16).max)


def fit(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor | None = None,
        shrink_steps: int = 1, signed: bool = False, rounds: int = 0) -> QuantizedTensor:
    """Always the absmax: that is what the type means."""
    return _with_rows(NO_CODES, weight.half().abs().amax(1).float(), weight.shape[1])


def encode(weight: torch.Tensor, fitted: QuantizedTensor) -> QuantizedTensor:
    """round(W * (127 / absmax)) of the float16 weight, half to even, in this order of operations."""
    absmax = fitted.extra["absmax"]
    inverse = torch.where(absmax != 0, TOP / absmax, 0.0)
    rounded = (weight.half().float() * inverse[:, None]).round().clamp(-TOP, TOP)
    return replace(fitted, codes=(rounded + ZERO).to(torch.uint8))


def signed_codes(tensor: QuantizedTensor) -> torch.Tensor:
    """int8 [N, K], as they are stored."""
    return (tensor.codes.to(torch.int16) - ZERO).to(torch.int8)


def from_signed(codes: torch.Tensor, absmax: torch.Tensor) -> QuantizedTensor:
    """Of stored codes int8 [N, K], none of them -128, and the absmax of each row float32 [N]."""
    return _with_rows((codes.to(torch.int16) + ZERO).to(torch.uint8), absmax, codes.shape[1])


def _with_rows(codes: torch.Tensor, absmax: torch.Tensor, columns: int) -> QuantizedTensor:
    return replace(GRID.fitted((absmax / TOP)[:, None], columns, codes), extra={"absmax": absmax})
