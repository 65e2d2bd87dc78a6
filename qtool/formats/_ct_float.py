"""compressed-tensors' floating-point weights: FP8 (float-quantized), FP4 in groups (nvfp4- and mxfp4-pack-quantized).

Per linear P of shape [N, K]:
    FP8     P.weight float8_e4m3fn [N, K];  P.weight_scale model dtype [N, 1], [1] or [N / 128, K / 128]
    NVFP4   P.weight_packed uint8 [N, K / 2], low nibble first;  P.weight_scale float8_e4m3fn [N, K / 16];
            P.weight_global_scale float32 [1], a divisor
    MXFP4   P.weight_packed likewise;  P.weight_scale uint8 [N, K / 32], the exponent of a power of two plus 127
A code is the index of a level; in the file lies sign and magnitude.
Source: compressed_tensors 0.20 compressors/{naive_quantized, nvfp4, mxfp4}; OCP MX 1.0; arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qtool import found
from qtool.errors import CheckpointError, NumericalError
from qtool.formats._small_floats import every_row, from_bits, once, refuse_blocks, shared_shape, to_bits
from qtool.formats._stored import Read, expect, nearest_group
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor, TensorSpec

FORMS = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
GROUPS = {"fp8": -1, "nvfp4": 16, "mxfp4": 32}
EXPONENT_BIAS = 127


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme.grid not in FORMS:
        return (f"compressed-tensors does not hold the {scheme.grid} grid of {linear_name}; "
                f"nearest: --format {'aqlm' if scheme.grid.startswith(('aqlm-', 'lloyd')) else 'bitsandbytes'}")
    if scheme.strategy is None and scheme.group_size != GROUPS[scheme.grid]:
        return (f"compressed-tensors holds {scheme.grid} with group size {GROUPS[scheme.grid]}, not the "
                f"{scheme.group_size} of {linear_name}; nearest: --group-size {GROUPS[scheme.grid]}")
    if scheme.activations and scheme.grid != "fp8":
        return (f"activations: {scheme.activations} is written beside fp8 or 8-bit integer weights, not the "
                f"{scheme.grid} of {linear_name}; leave it out")
    if scheme.activations == "group" and scheme.strategy != "block":
        return f"activations: group goes with strategy: block, which {linear_name} has not; nearest: activations: token"
    if scheme.strategy == "block":
        return refuse_blocks("compressed-tensors", linear_name, shape)
    size = int(scheme.group_size)
    if size != -1 and shape[1] % size:
        return (f"group_size {size} of {scheme.grid} does not divide the {shape[1]} input columns of {linear_name}; "
                f"nearest: another grid, group size {nearest_group(size, shape[1])}, or a rule that skips it")
    return None


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    rows, columns = shape
    if scheme.grid == "fp8":
        return [TensorSpec(f"{linear_name}.weight", torch.float8_e4m3fn, (rows, columns)),
                TensorSpec(f"{linear_name}.weight_scale", model_dtype, shared_shape(scheme, shape))]
    kind = torch.float8_e4m3fn if scheme.grid == "nvfp4" else torch.uint8
    specs = [TensorSpec(f"{linear_name}.weight_packed", torch.uint8, (rows, columns // 2)),
             TensorSpec(f"{linear_name}.weight_scale", kind, (rows, columns // GROUPS[scheme.grid]))]
    if scheme.grid == "nvfp4":
        specs.append(TensorSpec(f"{linear_name}.weight_global_scale", torch.float32, (1,)))
    return specs


def pack(linear_name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that is not finite."""
    if not bool(torch.isfinite(tensor.scale).all()):
        raise NumericalError(f"{linear_name}: a scale is not finite; leave this linear unquantized with a rule")
    bits = to_bits(tensor)
    if tensor.grid == "fp8":
        return {f"{linear_name}.weight": bits.view(torch.float8_e4m3fn),
                f"{linear_name}.weight_scale": once(tensor.scale, tensor.strategy)}
    tensors = {f"{linear_name}.weight_packed": bits[:, ::2] | bits[:, 1::2] << 4}
    if tensor.grid == "nvfp4":
        grid = found.load("grids", "nvfp4")
        tensors[f"{linear_name}.weight_scale"] = grid.local_scales(tensor)
        tensors[f"{linear_name}.weight_global_scale"] = tensor.extra["global_scale"]
    else:
        exponent = tensor.scale.float().log2().round().to(torch.int32) + EXPONENT_BIAS
        tensors[f"{linear_name}.weight_scale"] = exponent.to(torch.uint8)
    return tensors


def weights(scheme: Scheme) -> dict[str, Any]:
    """What a config group says of the weights."""
    common = {"num_bits": scheme.bits, "type": "float", "symmetric": True}
    if scheme.strategy == "block":
        return {**common, "group_size": None, "strategy": "block", "block_structure": [128, 128], "dynamic": False}
    if scheme.grid == "fp8":
        return {**common, "group_size": None, "strategy": scheme.strategy or "channel", "dynamic": False}
    if scheme.grid == "nvfp4":
        return {**common, "group_size": 16, "strategy": "tensor_group", "dynamic": False,
                "scale_dtype": "torch.float8_e4m3fn"}
    return {**common, "group_size": 32, "strategy": "group", "dynamic": False, "scale_dtype": "torch.uint8"}


def scheme(linear_name: str, said: Mapping[str, Any], specs: Mapping[str, TensorSpec],
           read: Read | None) -> tuple[Scheme, tuple[int, int]]:
    """Scheme and [N, K] of a linear, from what its config group says of the weights and from the headers."""
    kind = said.get("type"), said.get("num_bits"), said.get("strategy"), said.get("group_size")
    known: dict[tuple[Any, ...], str] = {
        ("float", 8, "channel", None): "fp8", ("float", 8, "tensor", None): "fp8", ("float", 8, "block", None): "fp8",
        ("float", 4, "tensor_group", 16): "nvfp4", ("float", 4, "group", 32): "mxfp4"}
    grid = known.get(kind)
    blocks = said.get("block_structure")
    if grid is None or (kind[2] == "block" and list(blocks if isinstance(blocks, list) else []) != [128, 128]):
        raise CheckpointError(f"{linear_name}: weights of type {kind[0]}, {kind[1]} bits, strategy {kind[2]}, group "
                              f"size {kind[3]}, blocks {blocks} are not read; start from the unquantized model")
    lead = specs[f"{linear_name}.{'weight' if grid == 'fp8' else 'weight_packed'}"].shape
    if len(lead) != 2:
        raise CheckpointError(f"{linear_name}: its weights have shape {list(lead)}, not two dimensions")
    bits = 8 if grid == "fp8" else 4
    shape = lead[0], lead[1] * (1 if grid == "fp8" else 2)
    if kind[2] == "channel" or grid != "fp8":
        return Scheme(grid=grid, bits=bits, group_size=GROUPS[grid]), shape
    return Scheme(grid=grid, bits=bits, group_size=128 if kind[2] == "block" else -1, strategy=kind[2]), shape


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]."""
    rows, columns = shape
    extra: dict[str, torch.Tensor] = {}
    scale = read(f"{linear_name}.weight_scale")
    where = f"{linear_name}.weight_scale"
    if scheme.grid == "fp8":
        stored = read(f"{linear_name}.weight")
        bits = expect(f"{linear_name}.weight", stored, (torch.float8_e4m3fn,), shape).view(torch.uint8)
        scale = every_row(where, scale, scheme, shape)
    else:
        packed = read(f"{linear_name}.weight_packed")
        packed = expect(f"{linear_name}.weight_packed", packed, (torch.uint8,), (rows, columns // 2))
        bits = torch.stack((packed & 15, packed >> 4), -1).reshape(rows, columns)
        scale, extra = _group_scales(linear_name, read, scheme.grid, scale, (rows, columns // GROUPS[scheme.grid]))
    codes = from_bits(linear_name, bits, scheme.grid)
    group = columns if scheme.group_size == -1 else int(scheme.group_size)
    return QuantizedTensor(codes, scale.contiguous(), torch.zeros(scale.shape, dtype=torch.uint8), scheme.bits, group,
                           True, extra, scheme.grid, strategy=scheme.strategy)


def obstacle(linear_name: str, read: Read) -> str | None:
    """Of NVFP4: why formats that multiply where this one divides cannot keep its scales, or None."""
    divisor = read(f"{linear_name}.weight_global_scale").reshape(-1)
    if divisor.numel() == 1 and found.load("grids", "nvfp4").multiplier(divisor) is None:
        return (f"its weight_global_scale, {float(divisor):.9g}, has no float32 inverse that gives every scale again, "
                "so it cannot be kept exactly")
    return None


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> torch.Tensor:
    """float32 [N, K]."""
    decoded: torch.Tensor = found.load("grids", scheme.grid).decode(unpack(linear_name, read, scheme, shape, foreign))
    return decoded


def _group_scales(linear_name: str, read: Read, grid: str, scale: torch.Tensor,
                  shape: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The scales that stored ones stand for, float32 [N, G], and what goes with them."""
    where = f"{linear_name}.weight_scale"
    if grid == "mxfp4":
        exponent = expect(where, scale, (torch.uint8,), shape).to(torch.int32) - EXPONENT_BIAS
        return torch.ldexp(torch.ones(shape), exponent), {}
    expect(where, scale, (torch.float8_e4m3fn,), shape)
    divisor = read(f"{linear_name}.weight_global_scale").reshape(-1)
    expect(f"{linear_name}.weight_global_scale", divisor, (torch.float32,), (1,))
    if not float(divisor) > 0:
        raise CheckpointError(f"{linear_name}.weight_global_scale is {float(divisor)}, not positive; "
                              "the file is damaged")
    effective: torch.Tensor = found.load("grids", "nvfp4").effective(scale, divisor)
    return effective, {"global_scale": divisor}
