"""compressed-tensors' "pack-quantized": weight-only integers of 2, 3, 4 or 8 bits.

Per linear P of shape [N, K] with G groups along K:
    P.weight_packed      int32 [N, ceil(K bits / 32)]   codes of a row as one little-endian bit stream
    P.weight_scale       model dtype [N, G]
    P.weight_shape       int64 [2], N and K
    P.weight_zero_point  int32 [ceil(N bits / 32), G]   asymmetric only; packed along N
The library speaks of signed codes and adds 2^(bits-1) when it stores them: in the file lie our unsigned codes.
Source: compressed_tensors 0.20 compressors/pack_quantized. Its versions up to 0.17 keep floor(32 / bits) codes in each
word, which differs for 3 bits only: the dense stream is written, both are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qtool import ops
from qtool.errors import CheckpointError
from qtool.formats._stored import (
    PACKABLE_BITS,
    Read,
    Stored,
    expect,
    group_index,
    packable,
    per_row,
    refuse,
    running_index,
    scheme_of,
)
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec, group_count

FORM = "pack-quantized"
LEAD = "weight_packed"


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    return refuse("compressed-tensors", scheme, linear_name, shape)


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    rows, columns = shape
    groups = group_count(columns, int(scheme.group_size))
    specs = [
        TensorSpec(f"{linear_name}.weight_packed", torch.int32, (rows, _words(columns, scheme.bits))),
        TensorSpec(f"{linear_name}.weight_scale", model_dtype, (rows, groups)),
        TensorSpec(f"{linear_name}.weight_shape", torch.int64, (2,)),
    ]
    if not scheme.symmetric:
        specs.append(TensorSpec(f"{linear_name}.weight_zero_point", torch.int32, (_words(rows, scheme.bits), groups)))
    return specs


def pack(linear_name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that is not finite."""
    scale = packable(linear_name, tensor, tensor.scale.dtype)
    tensors = {
        f"{linear_name}.weight_packed": ops.pack_bits(tensor.codes, tensor.bits),
        f"{linear_name}.weight_scale": scale,
        f"{linear_name}.weight_shape": torch.tensor(tensor.codes.shape, dtype=torch.int64),
    }
    if not tensor.symmetric:
        zeros = ops.pack_bits(tensor.zero_point, tensor.bits, transposed=True)
        tensors[f"{linear_name}.weight_zero_point"] = zeros
    return tensors


def weights(scheme: Scheme) -> dict[str, Any]:
    """What a config group says of the weights."""
    channel = scheme.group_size == -1
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric,
            "group_size": None if channel else scheme.group_size,
            "strategy": "channel" if channel else "group", "dynamic": False, "actorder": None}


def _words(count: int, bits: int) -> int:
    return (count * bits + 31) // 32


def stored(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> Stored:
    rows, columns = shape
    where = f"{linear_name}.weight_shape"
    recorded = expect(where, read(where), (torch.int64, torch.int32), (2,)).tolist()
    if recorded != [rows, columns]:
        raise CheckpointError(f"{where} says {recorded}, but the other tensors and config.json say {[rows, columns]}; "
                              "the file is damaged or its quantization_config is another's")
    scale = per_row(read(f"{linear_name}.weight_scale"), rows)
    size = columns if scheme.group_size == -1 else int(scheme.group_size)
    groups = -(-columns // size)
    expect(f"{linear_name}.weight_scale", scale, FLOATING, (rows, groups))
    codes = _codes(linear_name, read(f"{linear_name}.weight_packed"), rows, columns, scheme.bits)
    zero_point = torch.full((rows, groups), 1 << (scheme.bits - 1), dtype=torch.uint8)
    if not scheme.symmetric:
        zero_point = _zero_point(linear_name, read(f"{linear_name}.weight_zero_point"), rows, groups, scheme.bits)
    return Stored(codes, scale.contiguous(), zero_point, index_of(linear_name, read, scheme, columns, foreign))


def index_of(linear_name: str, read: Read, scheme: Scheme, columns: int, foreign: bool) -> torch.Tensor | None:
    """The group of every column; None when equal runs follow each other.

    Versions before 0.20 kept a weight_g_idx for actorder "group"; an entry of -1 says that it is not used.
    """
    size = columns if scheme.group_size == -1 else int(scheme.group_size)
    groups, where = -(-columns // size), f"{linear_name}.weight_g_idx"
    running = running_index(columns, groups, size)
    try:
        tensor = read(where) if foreign else None
    except KeyError:
        return running
    return running if tensor is None or bool((tensor == -1).any()) else group_index(where, tensor, columns, groups)


def _codes(linear_name: str, words: torch.Tensor, rows: int, columns: int, bits: int) -> torch.Tensor:
    per_word = 32 // bits
    loose = -(-columns // per_word)
    if words.shape == (rows, loose) and loose != _words(columns, bits):  # 3 bits by compressed-tensors up to 0.17
        expect(f"{linear_name}.weight_packed", words, (torch.int32,), (rows, loose))
        shifts = torch.arange(per_word, dtype=torch.int32) * bits
        codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return codes.view(rows, -1)[:, :columns].to(torch.uint8).contiguous()
    expect(f"{linear_name}.weight_packed", words, (torch.int32,), (rows, _words(columns, bits)))
    return ops.unpack_bits(words, bits, columns)


def _zero_point(linear_name: str, words: torch.Tensor, rows: int, groups: int, bits: int) -> torch.Tensor:
    where, per_word = f"{linear_name}.weight_zero_point", 32 // bits
    if words.dtype == torch.int8:  # kept as they are, signed: by old versions, or one for the whole tensor
        signed = words.reshape(1, 1).expand(rows, groups) if words.numel() == 1 else words
        unsigned = expect(where, signed, (torch.int8,), (rows, groups)).int() + (1 << (bits - 1))
        if bool(((unsigned < 0) | (unsigned >> bits > 0)).any()):
            raise CheckpointError(f"{where}: a value is no signed number of {bits} bits; the file is damaged")
        return unsigned.to(torch.uint8)
    loose = -(-rows // per_word)
    if words.shape == (loose, groups) and loose != _words(rows, bits):
        return _codes(linear_name, words.T.contiguous(), groups, rows, bits).T.contiguous()
    expect(where, words, (torch.int32,), (_words(rows, bits), groups))
    return ops.unpack_bits(words, bits, rows, transposed=True)


def scheme(linear_name: str, said: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None) -> tuple[Scheme, tuple[int, int]]:
    """Scheme and [N, K] of a linear, from what its config group says of the weights and from the headers."""
    packed, scale = specs[f"{linear_name}.weight_packed"], specs.get(f"{linear_name}.weight_scale")
    if scale is None or len(packed.shape) != 2:
        raise CheckpointError(f"{linear_name}: weight_packed {list(packed.shape)} lacks a dimension or weight_scale")
    if said.get("type", "int") != "int":
        raise CheckpointError(f"{linear_name}: pack-quantized weights are integers, not of type {said.get('type')}")
    bits, size = said.get("num_bits", 8), said.get("group_size")
    size = -1 if size is None else size
    found = scheme_of(linear_name, bits, size, said.get("symmetric", True))
    if found.bits not in PACKABLE_BITS:
        raise CheckpointError(f"{linear_name}: {found.bits}-bit codes are not read; only 2, 3, 4 and 8 bits are")
    rows, groups = packed.shape[0], scale.shape[-1] if scale.shape else 1
    if read is not None:
        recorded = read(f"{linear_name}.weight_shape").tolist()
        if len(recorded) != 2 or recorded[0] != rows or recorded[1] <= 0:
            raise CheckpointError(f"{linear_name}.weight_shape says {recorded}, but weight_packed has {rows} rows")
        columns = recorded[1]
    else:
        columns = packed.shape[1] * 32 // found.bits if size == -1 else groups * size
    if packed.shape[1] not in (_words(columns, found.bits), -(-columns // (32 // found.bits))):
        raise CheckpointError(f"{linear_name}.weight_packed {list(packed.shape)} cannot hold {columns} codes of "
                              f"{found.bits} bits a row; the file does not fit the quantization_config in config.json")
    return found, (rows, columns)


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError when its columns are in activation order."""
    return stored(linear_name, read, scheme, shape, foreign).quantized(linear_name, scheme)


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> torch.Tensor:
    """float32 [N, K], whatever the order of the columns."""
    return stored(linear_name, read, scheme, shape, foreign).dequantize()
