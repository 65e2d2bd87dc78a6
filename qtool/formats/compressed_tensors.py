"""compressed-tensors, scheme "pack-quantized": weight-only integers of 2, 3, 4 or 8 bits. vLLM, SGLang, transformers.

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

import re
from collections.abc import Iterable, Mapping, Sequence
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
    quantization_config,
    refuse,
    running_index,
    scheme_of,
    stored_linears,
)
from qtool.formats._targets import fused_conflicts, patterns
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec, group_count

__all__ = [
    "LOADERS", "NAME", "SUFFIXES", "check", "check_together", "config", "dequantize", "extra_files", "fused_conflicts",
    "layout", "notes", "pack", "recognises", "scale_dtype", "schemes", "unpack",
]
NAME = "compressed-tensors"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
LOADERS = (
    ("vLLM", "from vllm import LLM\nllm = LLM(\"DIR\")\nprint(llm.generate(\"Hello\")[0].outputs[0].text)"),
    ("transformers (with compressed-tensors installed)",
     "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
     "model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=\"auto\")\n"
     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    return refuse(NAME, scheme, linear_name, shape)


def check_together(schemes: Mapping[str, Scheme]) -> str | None:
    """Why these linears cannot share a checkpoint: they always can."""
    return None


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    """What to know about who can load it."""
    bits = {scheme.bits for scheme in schemes.values()}
    found = []
    if 3 in bits:
        found.append("3-bit codes are written in the dense layout of compressed-tensors 0.20; "
                     "transformers with an older compressed-tensors reads them wrong, and vLLM has no 3-bit kernel")
    if 2 in bits:
        found.append("vLLM has no 2-bit kernel; transformers decompresses 2-bit weights when it loads them")
    if any(not scheme.symmetric for scheme in schemes.values()):
        found.append("vLLM loads zero points; transformers with compressed-tensors 0.18 to 0.20 "
                     + ("cannot when linears have different schemes" if len(set(schemes.values())) > 1 else
                        "does so only with quantization_config=CompressedTensorsConfig(dequantize=True)"))
    return found


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Scales are kept in the dtype of the model."""
    return model_dtype


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    rows, columns = shape
    groups = group_count(columns, int(scheme.group_size))
    specs = [
        TensorSpec(f"{linear_name}.weight_packed", torch.int32, (rows, _words(columns, scheme.bits))),
        TensorSpec(f"{linear_name}.weight_scale", scale_dtype(model_dtype), (rows, groups)),
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


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError when its columns are in activation order.

    `config`: the config.json they came with, when another program may have written them.
    """
    return _stored(linear_name, read, scheme, shape, config is not None).quantized(linear_name, scheme)


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K], whatever the order of the columns."""
    return _stored(linear_name, read, scheme, shape, config is not None).dequantize()


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped` must name every other nn.Linear; unknown keys are errors for the readers."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for index, (scheme, names) in enumerate(by_scheme.items()):
        others = [*skipped, *(name for name, other in schemes.items() if other != scheme)]
        targets = ["Linear"] if len(by_scheme) == 1 else [f"re:{pattern}" for pattern in patterns(names, others)]
        channel = scheme.group_size == -1
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric,
                        "group_size": None if channel else scheme.group_size,
                        "strategy": "channel" if channel else "group", "dynamic": False, "actorder": None},
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": list(dict.fromkeys([*skipped, "lm_head"])),
        "config_groups": groups,
    }


def extra_files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """No files beside config.json."""
    return {}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json says compressed-tensors (of any kind; schemes() refuses the kinds that are not read)."""
    return quantization_config(config).get("quant_method") == "compressed-tensors"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json and the headers; raises CheckpointError.

    The headers give the K of a row with one group only up to a whole word: pass `read` to take it from weight_shape.
    """
    groups = _weight_groups(quantization_config(config))
    found = {name: _scheme(name, _weights_of(name, groups), specs, read)
             for name in stored_linears(specs, "weight_packed")}
    lost = [name for name in stored_linears(specs, "weight_scale") if name not in found]
    if lost or not found:
        raise CheckpointError(f"{lost[0] if lost else 'the checkpoint'} has no weight_packed tensor: only "
                              "pack-quantized integers of this format are read; start from the unquantized model")
    return found


def _words(count: int, bits: int) -> int:
    return (count * bits + 31) // 32


def _stored(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], foreign: bool) -> Stored:
    rows, columns = shape
    where = f"{linear_name}.weight_shape"
    recorded = expect(where, read(where), (torch.int64, torch.int32), (2,)).tolist()
    if recorded != [rows, columns]:
        raise CheckpointError(f"{where} says {recorded}, but the other tensors and config.json say {[rows, columns]}; "
                              "the file is damaged or its quantization_config is another's")
    scale = read(f"{linear_name}.weight_scale")
    if scale.numel() == 1:  # one scale per tensor
        scale = scale.reshape(1, 1).expand(rows, 1)
    size = columns if scheme.group_size == -1 else int(scheme.group_size)
    groups = -(-columns // size)
    expect(f"{linear_name}.weight_scale", scale, FLOATING, (rows, groups))
    codes = _codes(linear_name, read(f"{linear_name}.weight_packed"), rows, columns, scheme.bits)
    zero_point = torch.full((rows, groups), 1 << (scheme.bits - 1), dtype=torch.uint8)
    if not scheme.symmetric:
        zero_point = _zero_point(linear_name, read(f"{linear_name}.weight_zero_point"), rows, groups, scheme.bits)
    index = _foreign_index(linear_name, read, columns, groups) if foreign else None
    if index is None:
        index = running_index(columns, groups, size)
    return Stored(codes, scale.contiguous(), zero_point, index)


def _foreign_index(linear_name: str, read: Read, columns: int, groups: int) -> torch.Tensor | None:
    """The weight_g_idx that versions before 0.20 kept for actorder "group"; an entry of -1 says that it is not used."""
    where = f"{linear_name}.weight_g_idx"
    try:
        tensor = read(where)
    except KeyError:
        return None
    return None if bool((tensor == -1).any()) else group_index(where, tensor, columns, groups)


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
    if words.dtype == torch.int8:  # one per tensor is kept as it is, signed
        return (expect(where, words.reshape(1, 1), (torch.int8,), (1, 1)).int() + (1 << (bits - 1))).to(
            torch.uint8).expand(rows, groups).contiguous()
    loose = -(-rows // per_word)
    if words.shape == (loose, groups) and loose != _words(rows, bits):
        return _codes(linear_name, words.T.contiguous(), groups, rows, bits).T.contiguous()
    expect(where, words, (torch.int32,), (_words(rows, bits), groups))
    return ops.unpack_bits(words, bits, rows, transposed=True)


def _weight_groups(quantization: Mapping[str, Any]) -> list[tuple[list[str], Mapping[str, Any]]]:
    """(targets, weights) of every config group that can be read."""
    found = []
    groups = quantization.get("config_groups")
    for name, group in (groups.items() if isinstance(groups, Mapping) else ()):
        weights = group.get("weights") if isinstance(group, Mapping) else None
        form = (group.get("format") if isinstance(group, Mapping) else None) or quantization.get("format")
        if not isinstance(weights, Mapping) or weights.get("type", "int") != "int" or form != "pack-quantized":
            raise CheckpointError(f"config.json: quantization_config.config_groups.{name} is stored as {form!r}; only "
                                  "pack-quantized integers are read; start from the unquantized model")
        found.append(([str(target) for target in group.get("targets") or ()], weights))
    if not found:
        raise CheckpointError("config.json: quantization_config has no config_groups, so bits and groups are not known")
    return found


def _weights_of(linear_name: str, groups: Sequence[tuple[list[str], Mapping[str, Any]]]) -> Mapping[str, Any]:
    """The group of a linear: by exact name, then by regular expression, then by class, as the library looks them up."""
    ranked = [(_rank(linear_name, targets), weights) for targets, weights in groups]
    best = min(rank for rank, _ in ranked)
    if best == 3 and len(groups) > 1:
        raise CheckpointError(f"{linear_name}: no config group of quantization_config names it")
    return next(weights for rank, weights in ranked if rank == best)


def _rank(linear_name: str, targets: Iterable[str]) -> int:
    ranks = [3]
    for target in targets:
        if target == linear_name:
            ranks.append(0)
        elif target.startswith("re:"):
            try:
                ranks.append(1 if re.match(target.removeprefix("re:"), linear_name) else 3)
            except re.error as error:
                raise CheckpointError(f"config.json: the target {target!r} is no regular expression: {error}") from None
        elif target == "Linear":
            ranks.append(2)
    return min(ranks)


def _scheme(linear_name: str, weights: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None) -> tuple[Scheme, tuple[int, int]]:
    packed, scale = specs[f"{linear_name}.weight_packed"], specs.get(f"{linear_name}.weight_scale")
    if scale is None or len(packed.shape) != 2:
        raise CheckpointError(f"{linear_name}: weight_packed {list(packed.shape)} lacks a dimension or weight_scale")
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    size = -1 if size is None else size
    scheme = scheme_of(linear_name, bits, size, weights.get("symmetric", True))
    if scheme.bits not in PACKABLE_BITS:
        raise CheckpointError(f"{linear_name}: {scheme.bits}-bit codes are not read; only 2, 3, 4 and 8 bits are")
    rows, groups = packed.shape[0], scale.shape[-1] if scale.shape else 1
    if read is not None:
        recorded = read(f"{linear_name}.weight_shape").tolist()
        if len(recorded) != 2 or recorded[0] != rows or recorded[1] <= 0:
            raise CheckpointError(f"{linear_name}.weight_shape says {recorded}, but weight_packed has {rows} rows")
        columns = recorded[1]
    else:
        columns = packed.shape[1] * 32 // scheme.bits if size == -1 else groups * size
    if packed.shape[1] not in (_words(columns, scheme.bits), -(-columns // (32 // scheme.bits))):
        raise CheckpointError(f"{linear_name}.weight_packed {list(packed.shape)} cannot hold {columns} codes of "
                              f"{scheme.bits} bits a row; the file does not fit the quantization_config in config.json")
    return scheme, (rows, columns)
