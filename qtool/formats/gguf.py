"""GGUF, the format of llama.cpp: blocks of 32 or 256 columns with everything that belongs to them.

A linear [N, K] is one tensor, uint8 [N, K / super * bytes of a block]; the file around it is written by
checkpoint/gguf_writer.py. Source: ggml-common.h; the bits are in _ggml_fields.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool import found, ops
from qtool.errors import CheckpointError, NumericalError
from qtool.formats._defaults import check_together as check_together
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._defaults import fused_conflicts as fused_conflicts
from qtool.formats._defaults import notes as notes
from qtool.formats._defaults import recognises as recognises
from qtool.formats._defaults import schemes as schemes
from qtool.formats._ggml_fields import TYPES, fields
from qtool.formats._stored import Read, expect
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor, TensorSpec

NAME = "gguf"
SUFFIXES = ("weight",)
LOADERS = (
    ("llama.cpp", "llama-cli -m DIR/*.gguf -p Hello"),
    ("llama-cpp-python", "from llama_cpp import Llama\nmodel = Llama(\"DIR/FILE.gguf\")\nprint(model(\"Hello\"))"),
)
TRITS = torch.tensor([1, 3, 9, 27, 81])


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme.grid not in TYPES:
        return (f"GGUF has no type for the {scheme.label} of {linear_name}; use one of its own: --method q4_k_m "
                f"(types: {', '.join(TYPES)})")
    width = found.load("grids", scheme.grid).super
    if shape[1] % width:
        return (f"{linear_name} has {shape[1]} columns and {scheme.grid} has blocks of {width}; a mixture such as "
                "q4_k_m chooses another type there, or use a rule with grid: q8_0 or q5_0 for it")
    return None


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """d and dmin are float16 whatever the dtype of the model."""
    return torch.float16


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """One tensor: the blocks of each row."""
    width = found.load("grids", scheme.grid).super
    return [TensorSpec(f"{linear_name}.weight", torch.uint8, (shape[0], shape[1] // width * TYPES[scheme.grid][1]))]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensor that layout announced. Raises NumericalError for a d or dmin that is not finite."""
    grid, (table, _, size) = found.load("grids", tensor.grid), fields(tensor.grid)
    rows, columns = tensor.codes.shape
    blocks = rows * columns // grid.super
    codes = tensor.codes ^ 128 if tensor.grid == "q8_0" else tensor.codes  # a signed byte
    taken = [_to_bytes(codes.reshape(blocks, grid.super)) if tensor.grid == "tq1_0" else codes.reshape(blocks, -1)]
    if grid.scales[0] != grid.scales[1]:
        scales = tensor.parts["scales"]
        taken.append((scales ^ 128 if tensor.grid == "q6_k" else scales).reshape(blocks, -1))
        taken += [tensor.parts["mins"].reshape(blocks, -1)] if grid.mins else []
    taken.append(_half_bytes(linear_name, tensor.parts["d"]))
    if grid.mins:
        dmin = tensor.parts["dmin"]
        taken.append(_half_bytes(linear_name, -dmin if grid.mins == 1 else dmin))
    return {f"{linear_name}.weight": ops.pack_fields(torch.cat(taken, 1), table, size).reshape(rows, -1)}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]. Raises CheckpointError for bits that no quantizer writes."""
    grid, (table, width, size) = found.load("grids", scheme.grid), fields(scheme.grid)
    where, (rows, columns) = f"{linear_name}.weight", shape
    per_row = columns // grid.super
    packed = expect(where, read(where), (torch.uint8,), (rows, per_row * size))
    parts = ops.unpack_fields(packed.reshape(-1, size), table, width)
    d, dmin = parts[:, width - (4 if grid.mins else 2):], parts[:, width - 2:]
    d, dmin = (one[:, :2].contiguous().view(torch.float16).float().reshape(rows, per_row) for one in (d, dmin))
    subs = grid.super // grid.sub
    if scheme.grid == "tq1_0":
        codes = _from_bytes(parts[:, :52])
    else:
        codes = parts[:, :grid.super] ^ 128 if scheme.grid == "q8_0" else parts[:, :grid.super]
    if codes.numel() and int(codes.max()) >= len(grid.levels):
        raise CheckpointError(f"{where}: has a code that {scheme.grid} does not have; the file is damaged, fetch it "
                              "again")
    scales = mins = torch.full((rows, per_row * subs), 1 if grid.mins else 0, dtype=torch.uint8)
    if grid.scales[0] != grid.scales[1]:
        scales = parts[:, grid.super:grid.super + subs].reshape(rows, -1)
        scales = scales ^ 128 if scheme.grid == "q6_k" else scales
        mins = parts[:, grid.super + subs:grid.super + 2 * subs].reshape(rows, -1) if grid.mins else mins
    else:
        scales = torch.zeros_like(mins)
    fitted: QuantizedTensor = grid.fitted(d, scales, -dmin if grid.mins == 1 else dmin, mins,
                                          codes.reshape(rows, columns).contiguous())
    return fitted


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K]."""
    decoded: torch.Tensor = found.load("grids", scheme.grid).decode(unpack(linear_name, read, scheme, shape, config))
    return decoded


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """Nothing: no quantization_config is written."""
    return {}



def _half_bytes(linear_name: str, value: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 2], little end first."""
    half = value.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise NumericalError(f"{linear_name}: a scale is not finite in float16; leave this linear unquantized with a "
                             "rule that skips it")
    return half.reshape(-1, 1).view(torch.uint8)


def _to_bytes(codes: torch.Tensor) -> torch.Tensor:
    """TQ1_0's bytes of five (the last four: four) codes 0 .. 2: [B, 256] -> uint8 [B, 52]. ceil(number * 256 / 243)."""
    digits = codes.int()
    made = []
    for start, width, count in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
        tile = digits[:, start:start + width * count].reshape(-1, count, width)
        number = sum((tile[:, index] * int(TRITS[4 - index]) for index in range(count)), torch.zeros_like(tile[:, 0]))
        made.append((number * 256 + 242) // 243)
    return torch.cat(made, 1).to(torch.uint8)


def _from_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse, uint8 [B, 256]."""
    made = []
    for start, width, count in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        tile = packed[:, start:start + width].int()
        made += [((tile * 3**index & 255) * 3 >> 8) for index in range(count)]
    return torch.cat(made, 1).to(torch.uint8)
