"""GPTQ checkpoints: weight-only integers of 2, 3, 4 or 8 bits. GPTQModel, vLLM (4 and 8 bits), transformers, SGLang.

Per linear P of shape [N, K] with G groups along K; note that everything is transposed:
    P.qweight  int32 [K bits / 32, N]   codes of a column of this matrix as one little-endian bit stream
    P.qzeros   int32 [G, N bits / 32]   zero points packed along N
    P.scales   float16 [G, N]
    P.g_idx    int32 [K]                the group of every input column
There are two conventions for zero points. "gptq" (v1) stores zero - 1, which old readers add back, so that a zero point
of 0 does not exist; "gptq_v2" stores the zero point. Symmetric weights are written as v1, which everything reads,
asymmetric ones as v2, which GPTQModel reads. Source: GPTQModel 7.7 nn_modules/qlinear, utils/model.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

import qtool
from qtool import ops
from qtool.errors import CheckpointError, PlanError
from qtool.formats._stored import (
    PACKABLE_BITS,
    Read,
    Stored,
    expect,
    group_index,
    order_obstacle,
    packable,
    quantization_config,
    refuse,
    refuse_odd,
    running_index,
    scheme_of,
    stored_linears,
)
from qtool.formats._targets import fused_conflicts, kind, patterns, with_fused
from qtool.ops import int4 as layouts
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec, group_count

__all__ = [
    "LOADERS", "NAME", "SUFFIXES", "check", "check_together", "config", "dequantize", "extra_files", "fused_conflicts",
    "layout", "notes", "pack", "recognises", "scale_dtype", "schemes", "unpack",
]
NAME = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # what the kernels of GPTQModel accept, besides one group per row
LOADERS = (
    ("GPTQModel", "from gptqmodel import GPTQModel\nmodel = GPTQModel.load(\"DIR\")\n"
                  "print(model.tokenizer.decode(model.generate(\"Hello\")[0]))"),
    ("vLLM (symmetric, 4 or 8 bits)",
     "from vllm import LLM\nllm = LLM(\"DIR\")\nprint(llm.generate(\"Hello\")[0].outputs[0].text)"),
    ("transformers (with optimum and gptqmodel installed)",
     "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
     "model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=\"auto\")\n"
     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest that works; None when it can."""
    columns = shape[1]
    reason = refuse(NAME, scheme, linear_name, shape)
    reason = reason or refuse_odd(NAME, linear_name, shape)
    if reason is None and scheme.group_size != -1 and scheme.group_size not in GROUP_SIZES:
        nearest = max(size for size in GROUP_SIZES if size <= max(int(scheme.group_size), 16) and columns % size == 0)
        reason = (f"no program loads {NAME} files with group_size {scheme.group_size} ({linear_name}); nearest: "
                  f"{nearest}, or --format compressed-tensors; sizes that load: -1, {', '.join(map(str, GROUP_SIZES))}")
    return reason


def check_together(schemes: Mapping[str, Scheme], others: Collection[str] = ()) -> str | None:
    """Why these linears cannot share a checkpoint; None when they can."""
    by_kind = {scheme.symmetric: name for name, scheme in schemes.items()}
    if len(by_kind) < 2:
        return None
    return (f"{NAME} has one convention for zero points per checkpoint, but {by_kind[True]} is symmetric and "
            f"{by_kind[False]} is not; nearest: make all linears the same, or --format compressed-tensors")


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    """What to know about who can load it."""
    found, kinds = [], {(scheme.bits, scheme.symmetric) for scheme in schemes.values()}
    if any(not symmetric for _, symmetric in kinds):
        found.append("asymmetric weights are written as gptq_v2, which only GPTQModel (and transformers through it) "
                     "loads; compressed-tensors holds zero points for vLLM too")
    if any(bits in (2, 3) for bits, _ in kinds):
        found.append("vLLM loads 4 and 8 bits of this format, not 2 or 3; GPTQModel loads them all")
    if len(set(schemes.values())) > 1:
        found.append("linears with different schemes are named under 'dynamic', which GPTQModel and vLLM follow "
                     "but transformers ignores")
    return found


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Scales are float16 whatever the dtype of the model."""
    return torch.float16


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]; a bias stays under its own name."""
    rows, columns = shape
    groups = group_count(columns, int(scheme.group_size))
    return [
        TensorSpec(f"{linear_name}.qweight", torch.int32, (columns * scheme.bits // 32, rows)),
        TensorSpec(f"{linear_name}.qzeros", torch.int32, (groups, rows * scheme.bits // 32)),
        TensorSpec(f"{linear_name}.scales", torch.float16, (groups, rows)),
        TensorSpec(f"{linear_name}.g_idx", torch.int32, (columns,)),
    ]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that float16 cannot hold exactly."""
    scale = packable(linear_name, tensor, torch.float16)
    columns = tensor.codes.shape[1]
    zeros = tensor.zero_point - 1 if tensor.symmetric else tensor.zero_point
    return {
        # packed in rows and turned round as words, of which there are fewer than codes
        f"{linear_name}.qweight": ops.pack_bits(tensor.codes, tensor.bits).T.contiguous(),
        f"{linear_name}.qzeros": ops.pack_bits(zeros.T, tensor.bits),
        f"{linear_name}.scales": scale.T.contiguous(),
        f"{linear_name}.g_idx": torch.arange(columns, dtype=torch.int32) // (columns // scale.shape[1]),
    }


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError when its columns are in activation order.

    `config`: the config.json they came with; without it, the convention that pack follows.
    """
    return _stored(linear_name, read, scheme, shape, config).quantized(linear_name, scheme)


def obstacle(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
             config: Mapping[str, Any] | None = None) -> str | None:
    """Why the codes cannot be kept as they are in another format: an order of columns, zero points that config.json
    denies; or None."""
    groups = 1 if scheme.group_size == -1 else -(-shape[1] // int(scheme.group_size))
    middle = 1 << (scheme.bits - 1)
    if scheme.symmetric and bool((_zeros(linear_name, read, scheme, shape, groups, config) != middle).any()):
        return "config.json calls it symmetric (sym), but its zero points are not"
    return order_obstacle(_index(linear_name, read, scheme, shape))


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K], whatever the order of the columns."""
    return _stored(linear_name, read, scheme, shape, config).dequantize()


def int4(linear_name: str, config: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """The tensor with the codes of a linear of 4 bits, and its layout."""
    return f"{linear_name}.qweight", layouts.TRANSPOSED


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. The commonest scheme is the rule, the others and the skipped linears are exceptions."""
    reason = check_together(schemes)
    if reason:
        raise PlanError(reason)
    base = Counter(schemes.values()).most_common(1)[0][0]
    form = "gptq" if base.symmetric else "gptq_v2"
    result: dict[str, Any] = {
        "quant_method": "gptq", "bits": base.bits, "group_size": base.group_size, "desc_act": False,
        "sym": base.symmetric, "lm_head": False, "checkpoint_format": form, "format": form, "pack_dtype": "int32",
    }
    left = [name for name in skipped if name != "lm_head"]
    quantized = with_fused(list(schemes))
    dynamic: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in patterns(with_fused(left), quantized)}
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != base:
            here = [name for name, other in schemes.items() if other == scheme]
            others = [*left, *(name for name, other in schemes.items() if other != scheme)]
            dynamic |= {f"+:{pattern}": {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric,
                                         "desc_act": False}
                        for pattern in patterns(with_fused(here), with_fused(others))}
    if dynamic:
        result["dynamic"] = dynamic
    kinds = list(dict.fromkeys(map(kind, schemes)))
    if {kind(name) for name in left} - set(kinds):
        result["modules_in_block_to_quantize"] = [[name] for name in kinds]
    return {**result, "meta": {"quantizer": [f"qtool:{qtool.__version__}"], "steps": list(step_names)}}


def extra_files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """quantize_config.json, where programs from before quantization_config look."""
    return {"quantize_config.json": dict(quantization_config)}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json (or quantize_config.json) says GPTQ."""
    return quantization_config(config).get("quant_method") == "gptq"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json and the headers; raises CheckpointError."""
    quantization = quantization_config(config)
    form = _convention(quantization)
    if form not in ("gptq", "gptq_v2") or quantization.get("pack_dtype", "int32") != "int32":
        words = quantization.get("pack_dtype")
        raise CheckpointError(f"config.json: checkpoint_format {form!r}, pack_dtype {words!r}: only gptq and gptq_v2 "
                              "in int32 words are read; start from the unquantized model")
    found = {name: _scheme(name, quantization, specs) for name in stored_linears(specs, "qweight")}
    if not found:
        raise CheckpointError("config.json says GPTQ, but no tensor is called *.qweight; fetch the model again")
    return found


def _convention(quantization: Mapping[str, Any]) -> str:
    return str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()


def _stored(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
            config: Mapping[str, Any] | None) -> Stored:
    rows, columns = shape
    bits = scheme.bits
    size = columns if scheme.group_size == -1 else int(scheme.group_size)
    groups = -(-columns // size)
    where = [f"{linear_name}.{suffix}" for suffix in SUFFIXES]
    words = expect(where[0], read(where[0]), (torch.int32,), (columns * bits // 32, rows))
    scale = expect(where[2], read(where[2]), FLOATING, (groups, rows))
    index = _index(linear_name, read, scheme, shape)
    codes = ops.unpack_bits(words.T, bits, columns)
    zeros = _zeros(linear_name, read, scheme, shape, groups, config)
    return Stored(codes, scale.T.contiguous(), zeros.T.contiguous(), index)


def _zeros(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int], groups: int,
           config: Mapping[str, Any] | None) -> torch.Tensor:
    """uint8 [G, N]."""
    rows, where, bits = shape[0], f"{linear_name}.qzeros", scheme.bits
    zeros = expect(where, read(where), (torch.int32,), (groups, -(-rows * bits // 32)))
    form = _convention(quantization_config(config)) if config is not None else "gptq" if scheme.symmetric else "gptq_v2"
    return ((ops.unpack_bits(zeros, bits, rows).int() + (form == "gptq")) & ((1 << bits) - 1)).to(torch.uint8)


def _index(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor | None:
    columns, where = shape[1], f"{linear_name}.g_idx"
    size = columns if scheme.group_size == -1 else int(scheme.group_size)
    groups = -(-columns // size)
    try:
        return group_index(where, read(where), columns, groups)
    except KeyError:  # some writers leave out what is no order
        return running_index(columns, groups, size)


def _scheme(linear_name: str, quantization: Mapping[str, Any],
            specs: Mapping[str, TensorSpec]) -> tuple[Scheme, tuple[int, int]]:
    values = {**quantization, **_override(linear_name, quantization.get("dynamic"))}
    bits, size = values.get("bits"), values.get("group_size", -1)
    scheme = scheme_of(linear_name, bits, size, values.get("sym", True))
    words, scales = specs[f"{linear_name}.qweight"], specs.get(f"{linear_name}.scales")
    if scheme.bits not in PACKABLE_BITS:
        raise CheckpointError(f"{linear_name}: {scheme.bits}-bit codes are not read; only 2, 3, 4 and 8 bits are")
    if scales is None or len(words.shape) != 2 or len(scales.shape) != 2 or words.shape[0] * 32 % scheme.bits:
        raise CheckpointError(f"{linear_name}: qweight {list(words.shape)} is no {scheme.bits}-bit matrix with scales; "
                              "the file does not fit the quantization_config in config.json")
    shape = (words.shape[1], words.shape[0] * 32 // scheme.bits)
    order = specs.get(f"{linear_name}.g_idx")
    if scales.shape[1] != shape[0] or (order is not None and order.shape != shape[1:]):
        raise CheckpointError(f"{linear_name}: {scheme.bits}-bit qweight {list(words.shape)} means a weight "
                              f"{list(shape)}, but scales or g_idx say otherwise; config.json belongs to another file")
    return scheme, shape


def _override(linear_name: str, dynamic: Any) -> Mapping[str, Any]:
    """The first rule of `dynamic` that matches decides."""
    for pattern, values in (dynamic.items() if isinstance(dynamic, Mapping) else ()):
        try:
            matches = re.match(pattern.removeprefix("+:").removeprefix("-:"), linear_name)
        except re.error as error:
            raise CheckpointError(f"config.json: dynamic rule {pattern!r} is no regular expression: {error}") from None
        if matches:
            return values if isinstance(values, Mapping) and not pattern.startswith("-:") else {}
    return {}
