"""What the formats of small floats share: sign and magnitude, and FP8's scales that rows share."""

from __future__ import annotations

import torch

from qtool.errors import CheckpointError
from qtool.formats._stored import expect, per_row
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor

ZERO = {"fp8": 126, "nvfp4": 7, "mxfp4": 7}  # the code that stands for zero: as many levels below as above
SIGN = {"fp8": 0x80, "nvfp4": 8, "mxfp4": 8}
BLOCK = 128


def to_bits(tensor: QuantizedTensor) -> torch.Tensor:
    """uint8 [N, K]: sign and magnitude of the small floats that codes stand for."""
    steps = tensor.codes - ZERO[tensor.grid]  # from zero, in bytes; torch.where would take thirty times as long
    negative = steps >> 7
    return steps.view(torch.int8).abs().view(torch.uint8).bitwise_or_(negative.mul_(SIGN[tensor.grid]))


def from_bits(linear_name: str, bits: torch.Tensor, grid: str) -> torch.Tensor:
    """The codes of sign and magnitude uint8 [N, K]; CheckpointError for a NaN."""
    zero, sign = ZERO[grid], SIGN[grid]
    magnitude, negative = bits & (sign - 1), bits >> (sign.bit_length() - 1)
    if int(magnitude.max() if bits.numel() else 0) > zero:
        raise CheckpointError(f"{linear_name}.weight holds NaN; the file is damaged, fetch it again")
    all_ones = negative * 255
    return magnitude.bitwise_xor_(all_ones).add_(negative).add_(zero)  # -m is ~m + 1


def shared_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the stored scales of an FP8 linear [N, K]."""
    if scheme.strategy == "block":
        return shape[0] // BLOCK, shape[1] // BLOCK
    return (1,) if scheme.strategy == "tensor" else (shape[0], 1)


def once(scale: torch.Tensor, strategy: str | None) -> torch.Tensor:
    """The scales [N, G] as they are stored, each of those that rows share once."""
    if strategy == "block":
        return scale[::BLOCK].contiguous()
    return scale[:1, 0].contiguous() if strategy == "tensor" else scale


def every_row(where: str, stored: torch.Tensor, scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    """[N, G] of the stored scales of an FP8 linear [N, K], checked."""
    if scheme.strategy == "block":
        return expect(where, stored, FLOATING, shared_shape(scheme, shape)).repeat_interleave(BLOCK, 0)
    return expect(where, per_row(stored, shape[0]), FLOATING, (shape[0], 1))


def refuse_blocks(name: str, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot have scales for blocks of 128 x 128, or None."""
    if shape[0] % BLOCK == 0 and shape[1] % BLOCK == 0:
        return None
    return (f"{name} with blocks of 128 x 128: {linear_name} has {shape[0]} outputs and {shape[1]} inputs, and readers "
            "take both for multiples of 128; nearest: --method fp8 (a scale per channel), or a rule that skips it")
