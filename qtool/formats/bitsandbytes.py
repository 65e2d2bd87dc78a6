"""bitsandbytes linears, NF4, FP4 and LLM.int8(): what transformers loads with bitsandbytes, on GPUs and on CPUs.

Per linear P of shape [N, K] in blocks of B consecutive weights (n = N K / B blocks):
    P.weight                             uint8 [N K / 2, 1]   two codes a byte, the first in the high nibble
    P.weight.absmax                      float32 [n]; with double quantization uint8 [n], codes of the nested table
    P.weight.quant_map                   float32 [16]         the value of every code
    P.weight.nested_absmax               float32 [n / 256]    double quantization only, as is
    P.weight.nested_quant_map            float32 [256]
    P.weight.quant_state.bitsandbytes__nf4 (or __fp4)         uint8, a JSON object: type, block, dtype, shape
LLM.int8(): P.weight int8 [N, K], P.SCB float32 [N] (the absmax of each row), P.weight_format uint8 [] (0: by rows).
The bytes are those that bitsandbytes makes of the same codes; only the JSON of double quantization is filled up with
blanks, because the length of its nested_offset is not known before the weights are read.
Source: bitsandbytes 0.50 functional.QuantState; transformers quantizers/quantizer_bnb_4bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from qtool import found
from qtool.errors import CheckpointError, NumericalError
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._defaults import fused_conflicts as fused_conflicts
from qtool.formats._stored import Read, expect, quantization_config, stored_linears
from qtool.recipe import OUTLIER_THRESHOLD, Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec

NAME = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
SUFFIXES = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
            f"{STATE}nf4", f"{STATE}fp4", "SCB", "weight_format")
LOADERS = (
    ("transformers (with bitsandbytes installed)",
     "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
     "model = AutoModelForCausalLM.from_pretrained(\"DIR\")\n"
     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
)
GRIDS, INT8 = ("nf4", "fp4"), "vectorwise-int8"
NESTED_RUN = 256
OFFSET_WIDTH = 24  # of nested_offset: no float64 has a longer shortest form
MAX_STATE_BYTES = 4096
# sign and magnitude of fp4: the bit pattern of every level, ascending
PATTERNS = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme.grid == INT8:
        return None if scheme.activations == "outliers" else (
            f"LLM.int8() rounds its inputs at run time; {linear_name} needs activations: outliers")
    if scheme.grid not in GRIDS:
        return (f"bitsandbytes holds the nf4, fp4 and vectorwise-int8 grids, not the {scheme.label} of {linear_name}; "
                "nearest: --method nf4, or --format compressed-tensors")
    if scheme.activations is not None:
        return f"bitsandbytes rounds no inputs beside {scheme.grid} weights; leave activations out for {linear_name}"
    if shape[1] % int(scheme.group_size):
        return (f"group_size {scheme.group_size} does not divide the {shape[1]} input columns of {linear_name}; "
                "qtool's blocks do not run across rows: use 32 or 64, or a rule that skips this linear")
    return None


def check_together(schemes: Mapping[str, Scheme], others: Collection[str] = ()) -> str | None:
    """Why these linears cannot share a checkpoint: config.json names one type for all."""
    kinds = {(scheme.grid, scheme.double_quant) for scheme in schemes.values()}
    return None if len(kinds) == 1 else "bitsandbytes wants one grid for all linears, with or without double_quant"


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    return ["vLLM from 0.28 on has no bitsandbytes support; transformers loads this"]


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    if scheme.grid == INT8:
        return [TensorSpec(f"{linear_name}.weight", torch.int8, tuple(shape)),
                TensorSpec(f"{linear_name}.SCB", torch.float32, (shape[0],)),
                TensorSpec(f"{linear_name}.weight_format", torch.uint8, ())]
    count = shape[0] * shape[1]
    blocks = count // int(scheme.group_size)
    name = f"{linear_name}.weight"
    state = _state(scheme.grid, int(scheme.group_size), model_dtype, shape, 0.0 if scheme.double_quant else None)
    specs = [TensorSpec(name, torch.uint8, ((count + 1) // 2, 1)),
             TensorSpec(f"{name}.absmax", torch.uint8 if scheme.double_quant else torch.float32, (blocks,)),
             TensorSpec(f"{name}.quant_map", torch.float32, (16,))]
    if scheme.double_quant:
        specs += [TensorSpec(f"{name}.nested_absmax", torch.float32, (math.ceil(blocks / NESTED_RUN),)),
                  TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,))]
    return [*specs, TensorSpec(f"{linear_name}.{STATE}{scheme.grid}", torch.uint8, (len(state),))]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that is not finite."""
    if model_dtype is None and tensor.grid != INT8:
        raise ValueError(f"{linear_name}: the dtype of the model goes into the file, and none was given")
    if not bool(torch.isfinite(tensor.scale).all()):
        raise NumericalError(f"{linear_name}: a scale is not finite; leave this linear unquantized with a rule")
    name, shape = f"{linear_name}.weight", tuple(tensor.codes.shape)
    if tensor.grid == INT8:
        return {name: found.load("grids", INT8).signed_codes(tensor),
                f"{linear_name}.SCB": tensor.extra["absmax"],
                f"{linear_name}.weight_format": torch.zeros((), dtype=torch.uint8)}
    patterns = torch.tensor(PATTERNS[tensor.grid], dtype=torch.uint8)[tensor.codes.long()].flatten()
    patterns = torch.nn.functional.pad(patterns, (0, len(patterns) % 2))
    tensors = {name: (patterns[::2] << 4 | patterns[1::2])[:, None], f"{name}.quant_map": quant_map(tensor.grid)}
    offset = None
    if tensor.extra:
        offset = float(tensor.extra["nested_offset"])
        tensors |= {f"{name}.absmax": tensor.extra["nested_codes"],
                    f"{name}.nested_absmax": tensor.extra["nested_absmax"],
                    f"{name}.nested_quant_map": found.load("grids", tensor.grid).dynamic_table()}
    else:
        tensors[f"{name}.absmax"] = tensor.scale.float().flatten()
    state = _state(tensor.grid, tensor.group_size, model_dtype or torch.float32, shape, offset)
    tensors[f"{linear_name}.{STATE}{tensor.grid}"] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return tensors


def quant_map(grid: str) -> torch.Tensor:
    """float32 [16]: the value of every bit pattern."""
    table = torch.zeros(16)
    table[torch.tensor(PATTERNS[grid])] = found.load("grids", grid).GRID.levels
    return table


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError for another table of values."""
    rows, columns = shape
    if scheme.grid == INT8:
        return _unpack_int8(linear_name, read, shape)
    size, reason = int(scheme.group_size), obstacle(linear_name, read, scheme, shape)
    if reason:
        raise CheckpointError(f"{linear_name}: {reason}; read it as dense weights instead (qtool export --to hf)")
    codes = torch.tensor(PATTERNS[scheme.grid]).argsort().to(torch.uint8)
    scale, extra = _scales(linear_name, read, rows * columns // size)
    codes = codes[_patterns(linear_name, read, rows * columns).long()].reshape(shape)
    zero_point = torch.zeros(rows, columns // size, dtype=torch.uint8)
    return QuantizedTensor(codes, scale.reshape(rows, -1), zero_point, 4, size, True, extra, scheme.grid)


def obstacle(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
             config: Mapping[str, Any] | None = None) -> str | None:
    """Why the codes cannot be kept as they are in another format, or None."""
    size, where = int(scheme.group_size), f"{linear_name}.weight.quant_map"
    if scheme.grid == INT8:
        return None
    if shape[1] % size:
        return f"its blocks of {size} run across rows of {shape[1]}, so its codes cannot be kept as they are"
    table = expect(where, read(where), (torch.float32,), (16,))
    return None if torch.equal(table, quant_map(scheme.grid)) else f"its quant_map is not the table of {scheme.grid}"


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K], whatever the table, also where blocks run across rows."""
    if scheme.grid == INT8:
        decoded: torch.Tensor = found.load("grids", INT8).decode(_unpack_int8(linear_name, read, shape))
        return decoded
    count, size = shape[0] * shape[1], int(scheme.group_size)
    where = f"{linear_name}.weight.quant_map"
    table = expect(where, read(where), (torch.float32,), (16,))
    scale, _ = _scales(linear_name, read, math.ceil(count / size))
    values = table[_patterns(linear_name, read, count).long()]
    return (values * scale.repeat_interleave(size)[:count]).reshape(shape)


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped`: every other nn.Linear."""
    scheme = next(iter(schemes.values()))
    eight = scheme.grid == INT8
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": not eight, "_load_in_8bit": eight, "load_in_4bit": not eight, "load_in_8bit": eight,
        "bnb_4bit_quant_type": "fp4" if eight else scheme.grid, "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": "float32" if eight else "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": scheme.outlier_threshold,
        "llm_int8_skip_modules": list(dict.fromkeys([*skipped, "lm_head"])),
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    }


def recognises(config: Mapping[str, Any]) -> bool:
    return quantization_config(config).get("quant_method") == "bitsandbytes"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every 4-bit linear, from the JSON that lies beside each; raises CheckpointError."""
    said = quantization_config(config)
    if said.get("load_in_8bit"):
        return _int8_schemes(specs, _threshold(said))
    found_schemes = {}
    for name in specs:
        linear, mark, grid = name.partition(f".{STATE}")
        if mark:
            state = _read_state(name, specs[name], read)
            scheme = Scheme(grid=grid if grid in GRIDS else "nf4", group_size=state["blocksize"],
                            double_quant="nested_offset" in state)
            found_schemes[linear] = scheme, (state["shape"][0], state["shape"][1])
    if not found_schemes:
        raise CheckpointError("the checkpoint says bitsandbytes, but no linear has a quant_state; it is damaged, or "
                              "was saved before it was quantized")
    return found_schemes


def _threshold(said: Mapping[str, Any]) -> float:
    threshold = said.get("llm_int8_threshold", OUTLIER_THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        raise CheckpointError(f"llm_int8_threshold in the quantization_config is {threshold!r}, not a number from 0 "
                              f"on; {OUTLIER_THRESHOLD} is the usual one")
    return float(threshold)


def _int8_schemes(specs: Mapping[str, TensorSpec], threshold: float) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    scheme = Scheme(grid=INT8, bits=8, group_size=-1, activations="outliers", outlier_threshold=threshold)
    shapes = {name: specs.get(f"{name}.weight") for name in stored_linears(specs, "SCB")}
    bad = [name for name, spec in shapes.items() if spec is None or len(spec.shape) != 2]
    if bad or not shapes:
        raise CheckpointError(f"{bad[0] if bad else 'the checkpoint'} says 8-bit bitsandbytes but has no int8 weight "
                              "with an SCB beside it; it is damaged, or was saved before it was quantized")
    return {name: (scheme, (spec.shape[0], spec.shape[1])) for name, spec in shapes.items() if spec is not None}


def _unpack_int8(linear_name: str, read: Read, shape: tuple[int, int]) -> QuantizedTensor:
    where = f"{linear_name}.weight", f"{linear_name}.SCB"
    codes = expect(where[0], read(where[0]), (torch.int8,), shape)
    absmax = expect(where[1], read(where[1]), (torch.float32,), (shape[0],))
    if codes.numel() and int(codes.min()) == -128:
        raise CheckpointError(f"{linear_name}.weight holds -128, which LLM.int8() does not write; the file is damaged")
    tensor: QuantizedTensor = found.load("grids", INT8).from_signed(codes, absmax)
    return tensor


def _state(grid: str, block: int, dtype: torch.dtype, shape: tuple[int, ...], offset: float | None) -> bytes:
    said: dict[str, Any] = {"quant_type": grid, "blocksize": block, "dtype": str(dtype).removeprefix("torch."),
                            "shape": list(shape)}
    if offset is None:
        return json.dumps(said).encode()
    said |= {"nested_blocksize": NESTED_RUN, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(said)
    return (text + " " * (OFFSET_WIDTH - len(json.dumps(offset)))).encode()


def _read_state(name: str, spec: TensorSpec, read: Read | None) -> dict[str, Any]:
    if read is None:
        raise ValueError(f"{name}: the shape of the linear is in this tensor, so a way to read it is needed")
    if spec.nbytes > MAX_STATE_BYTES or spec.dtype is not torch.uint8:
        raise CheckpointError(f"{name}: {spec.nbytes} bytes of {spec.dtype} are no JSON description of a linear")
    try:
        state = json.loads(bytes(read(name).flatten().tolist()))
        shape, block = state["shape"], state["blocksize"]
        good = len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 24 for size in shape) and block in (
            32, 64, 128, 256, 512, 1024, 2048, 4096)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise CheckpointError(f"{name} holds no valid description (quant_type, blocksize, shape); fetch the file again")
    return dict(state)


def _patterns(linear_name: str, read: Read, count: int) -> torch.Tensor:
    """uint8 [count]: the four bits of every weight."""
    where, words = f"{linear_name}.weight", read(f"{linear_name}.weight")
    words = words.contiguous().view(torch.uint8).flatten()  # quant_storage may have given the bytes another name
    expect(where, words, (torch.uint8,), ((count + 1) // 2,))
    return torch.stack((words >> 4, words & 15), -1).flatten()[:count]


def _scales(linear_name: str, read: Read, blocks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """float32 [n], and the nested form that they came from."""
    where = f"{linear_name}.weight.absmax"
    absmax = read(where)
    if absmax.dtype in FLOATING:
        return expect(where, absmax, FLOATING, (blocks,)).float(), {}
    expect(where, absmax, (torch.uint8,), (blocks,))
    table = read(f"{linear_name}.weight.nested_quant_map")
    expect(f"{where}: nested_quant_map", table, (torch.float32,), (256,))
    runs = read(f"{linear_name}.weight.nested_absmax")
    expect(f"{where}: nested_absmax", runs, (torch.float32,), (math.ceil(blocks / NESTED_RUN),))
    offset = torch.tensor(_offset(linear_name, read))
    scale = table[absmax.long()] * runs.repeat_interleave(NESTED_RUN)[:blocks] + offset
    return scale, {"nested_codes": absmax, "nested_absmax": runs, "nested_offset": offset}


def _offset(linear_name: str, read: Read) -> float:
    for grid in GRIDS:
        try:
            stored = read(f"{linear_name}.{STATE}{grid}")
        except KeyError:
            continue
        return float(json.loads(bytes(stored.flatten().tolist()))["nested_offset"])
    raise CheckpointError(f"{linear_name} has no quant_state; the checkpoint is damaged")
