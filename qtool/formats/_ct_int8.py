"""compressed-tensors' "int-quantized": 8-bit integer weights for engines that round the inputs too (W8A8).

Per linear P of shape [N, K]:
    P.weight        int8 [N, K], our codes less 128
    P.weight_scale  model dtype [N, 1], one per output channel ([1] in files of others: one for the matrix)
The inputs are rounded at run time, one scale per token: nothing about them is in the file. Others also keep weights in
this way whose inputs stay as they are, in groups, or with P.weight_zero_point int8.
Source: compressed_tensors 0.20 compressors/naive_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qtool import found
from qtool.errors import CheckpointError
from qtool.formats._stored import Read, expect, packable, per_row, scheme_of
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec

FORM = "int-quantized"
MIDDLE = 128


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if (scheme.bits, scheme.group_size, scheme.symmetric) != (8, -1, True):
        return (f"compressed-tensors rounds inputs only beside symmetric 8-bit weights with one scale per channel, not "
                f"the {scheme.label} of {linear_name}; nearest: --bits 8 --group-size -1 --symmetric")
    if scheme.activations == "group":
        return f"activations: group goes with blocks of fp8, not with {linear_name}; nearest: activations: token"
    return None


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    return [TensorSpec(f"{linear_name}.weight", torch.int8, tuple(shape)),
            TensorSpec(f"{linear_name}.weight_scale", model_dtype, (shape[0], 1))]


def pack(linear_name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that is not finite."""
    scale = packable(linear_name, tensor, tensor.scale.dtype)
    return {f"{linear_name}.weight": (tensor.codes.to(torch.int16) - MIDDLE).to(torch.int8),
            f"{linear_name}.weight_scale": scale}


def weights(scheme: Scheme) -> dict[str, Any]:
    """What a config group says of the weights."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": "channel",
            "dynamic": False}


def scheme(linear_name: str, said: Mapping[str, Any], specs: Mapping[str, TensorSpec],
           read: Read | None) -> tuple[Scheme, tuple[int, int]]:
    """Scheme and [N, K] of a linear, from what its config group says of the weights and from the headers."""
    shape, strategy = specs[f"{linear_name}.weight"].shape, said.get("strategy")
    if said.get("type", "int") != "int" or strategy not in ("channel", "tensor", "group") or len(shape) != 2:
        raise CheckpointError(f"{linear_name}: int-quantized weights are read with one scale per channel, group or "
                              f"matrix, not {said.get('type')} per {strategy}")
    size = said.get("group_size") if strategy == "group" else -1
    kept = scheme_of(linear_name, said.get("num_bits", 8), size, said.get("symmetric", True))
    if kept.bits != 8 or (kept.group_size != -1 and shape[1] % int(kept.group_size)):
        raise CheckpointError(f"{linear_name}: int-quantized weights are read with 8 bits in equal groups, not "
                              f"{kept.label} of {shape[1]} columns")
    return kept, (shape[0], shape[1])


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]."""
    rows, columns = shape
    size = columns if scheme.group_size == -1 else int(scheme.group_size)
    where, groups = f"{linear_name}.weight_scale", columns // size
    scale = expect(where, per_row(read(where), rows), FLOATING, (rows, groups))
    stored = expect(f"{linear_name}.weight", read(f"{linear_name}.weight"), (torch.int8,), shape)
    zero_point = torch.full((rows, groups), MIDDLE, dtype=torch.uint8)
    if not scheme.symmetric:
        where = f"{linear_name}.weight_zero_point"
        zero_point = _unsigned(expect(where, per_row(read(where), rows), (torch.int8,), (rows, groups)))
    return QuantizedTensor(_unsigned(stored), scale.contiguous(), zero_point, 8, size, scheme.symmetric,
                           activations=scheme.activations is not None)


def _unsigned(signed: torch.Tensor) -> torch.Tensor:
    return (signed.to(torch.int16) + MIDDLE).to(torch.uint8)


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> torch.Tensor:
    """float32 [N, K]."""
    decoded: torch.Tensor = found.load("grids", "affine").decode(unpack(linear_name, read, scheme, shape, foreign))
    return decoded
