"""compressed-tensors: what vLLM, SGLang and transformers read. One format, several ways to keep a linear:

    _ct_pack.py     pack-quantized         integers of 2, 3, 4 or 8 bits, weight-only
    _ct_float.py    float-quantized        FP8;  nvfp4-pack-quantized, mxfp4-pack-quantized: FP4 in groups
    _ct_int8.py     int-quantized          8-bit integers whose inputs are rounded as well (W8A8)
Source: compressed_tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from qtool.errors import CheckpointError
from qtool.formats import _ct_float, _ct_int8, _ct_pack
from qtool.formats._defaults import check_together as check_together
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._stored import Read, expect, order_obstacle, quantization_config, stored_linears
from qtool.formats._targets import fused_conflicts, patterns
from qtool.ops import int4 as layouts
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, INPUT_SCALE, QuantizedTensor, TensorSpec

__all__ = [
    "KV_SCALES", "LOADERS", "NAME", "SUFFIXES", "check", "check_together", "config", "dequantize", "extra_files",
    "fused_conflicts", "int4", "kv_scales", "layout", "notes", "obstacle", "pack", "recognises", "scale_dtype",
    "schemes", "unpack", "with_kv_cache",
]
NAME = "compressed-tensors"
SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
            "weight_global_scale", "input_scale")
KV_SCALES = ("k_scale", "v_scale")
WIDER = {"fp8": (torch.float32,)}
FORMS = {"pack-quantized": _ct_pack, "int-quantized": _ct_int8, "float-quantized": _ct_float,
         "naive-quantized": _ct_float, "nvfp4-pack-quantized": _ct_float, "mxfp4-pack-quantized": _ct_float}
LOADERS = (
    ("vLLM", "from vllm import LLM\nllm = LLM(\"DIR\")\nprint(llm.generate(\"Hello\")[0].outputs[0].text)"),
    ("transformers (with compressed-tensors installed)",
     "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
     "model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=\"auto\")\n"
     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme.activations == "outliers":
        return (f"{NAME} has no outliers apart (LLM.int8()), as {linear_name} asks for; nearest: activations: token, "
                "or --format bitsandbytes with --method llm-int8")
    return _kept_by(scheme).check(scheme, linear_name, shape)


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
    specs: list[TensorSpec] = _kept_by(scheme).layout(linear_name, shape, scheme, model_dtype)
    static = [TensorSpec(f"{linear_name}.{INPUT_SCALE}", model_dtype, (1,))] if scheme.activations == "tensor" else []
    return specs + static


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that is not finite."""
    tensors: dict[str, torch.Tensor] = _keeper(tensor.grid, tensor.activations).pack(linear_name, tensor)
    if INPUT_SCALE in tensor.extra:
        dtype = tensor.extra[INPUT_SCALE].dtype if model_dtype is None else model_dtype
        tensors[f"{linear_name}.{INPUT_SCALE}"] = tensor.extra[INPUT_SCALE].to(dtype)
    return tensors


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError when its columns are in activation order.

    `config`: the config.json they came with, when another program may have written them.
    """
    reader = _reader(linear_name, read, scheme)
    tensor: QuantizedTensor = reader.unpack(linear_name, read, scheme, shape, config is not None)
    if scheme.activations != "tensor":
        return tensor
    where = f"{linear_name}.{INPUT_SCALE}"
    scale = expect(where, read(where).reshape(-1), FLOATING, (1,))
    if not 0 < float(scale) < float("inf"):
        raise CheckpointError(f"{where} is {float(scale)}, not a positive number; the file is damaged")
    return replace(tensor, extra={**tensor.extra, INPUT_SCALE: scale})


def obstacle(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
             config: Mapping[str, Any] | None = None) -> str | None:
    """Why the codes cannot be kept as they are in another format: an order of columns, a scale of NVFP4 for the whole
    matrix that has no inverse; or None."""
    if scheme.grid == "nvfp4":
        return _ct_float.obstacle(linear_name, read)
    if _reader(linear_name, read, scheme) is not _ct_pack:
        return None
    return order_obstacle(_ct_pack.index_of(linear_name, read, scheme, shape[1], config is not None))


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K], whatever the order of the columns."""
    reader = _reader(linear_name, read, scheme)
    decoded: torch.Tensor = reader.dequantize(linear_name, read, scheme, shape, config is not None)
    return decoded


def int4(linear_name: str, config: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """The tensor with the codes of a linear of 4 bits (pack-quantized), and its layout."""
    return f"{linear_name}.{_ct_pack.LEAD}", layouts.ALONG_ROWS


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped` must name every other nn.Linear; unknown keys are errors for the readers."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    forms = {_form(scheme) for scheme in by_scheme}
    groups = {}
    for index, (scheme, names) in enumerate(by_scheme.items()):
        others = [*skipped, *(name for name, other in schemes.items() if other != scheme)]
        targets = ["Linear"] if len(by_scheme) == 1 else [f"re:{pattern}" for pattern in patterns(names, others)]
        groups[f"group_{index}"] = {
            "targets": targets, "weights": _kept_by(scheme).weights(scheme), "input_activations": _inputs(scheme),
            "output_activations": None, **({"format": _form(scheme)} if len(forms) > 1 else {}),
        }
    return {
        "quant_method": "compressed-tensors", "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": list(dict.fromkeys([*skipped, "lm_head"])),
        "config_groups": groups,
    }


def kv_scales(attention: str) -> list[TensorSpec]:
    """The scales of the keys and values that an attention module caches: the largest magnitude over 448 of E4M3."""
    return [TensorSpec(f"{attention}.{name}", torch.float32, (1,)) for name in KV_SCALES]


def with_kv_cache(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """The config that says so."""
    return {**quantization_config, "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": True,
                                                       "strategy": "tensor", "dynamic": False}}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json says compressed-tensors (of any kind; schemes() refuses the kinds that are not read)."""
    return quantization_config(config).get("quant_method") == "compressed-tensors"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json and the headers; raises CheckpointError.

    The headers give the K of a row with one group only up to a whole word: pass `read` to take it from weight_shape.
    """
    groups = _groups(quantization_config(config))
    found = {}
    for name in stored_linears(specs, "weight_scale"):
        form, weights, inputs = _group_of(name, groups)
        if f"{name}.{_lead(form)}" not in specs:
            raise CheckpointError(f"{name} has a weight_scale but no {_lead(form)} tensor, though config.json says "
                                  f"{form}; the checkpoint is damaged or of a kind that is not read")
        keeper = _ct_int8 if form == "naive-quantized" and weights.get("type", "int") == "int" else FORMS[form]
        scheme, shape = keeper.scheme(name, weights, specs, read)
        found[name] = scheme.model_copy(update={"activations": inputs}), shape
    lost = [name for name in stored_linears(specs, "weight_packed") if name not in found]
    if lost or not found:
        raise CheckpointError(f"{lost[0] if lost else 'the checkpoint'} has no weight_scale tensor: it is not stored "
                              "as this format says; start from the unquantized model")
    return found


def _kept_by(scheme: Scheme) -> ModuleType:
    return _keeper(scheme.grid, scheme.activations is not None)


def _reader(linear_name: str, read: Read, scheme: Scheme) -> ModuleType:
    """The same of what others may have written: integers whose inputs are not rounded, but one a byte."""
    kept = _kept_by(scheme)
    if kept is _ct_pack and scheme.bits == 8:
        try:
            read(f"{linear_name}.weight_shape")
        except KeyError:
            return _ct_int8
    return kept


def _keeper(grid: str, activations: bool) -> ModuleType:
    """The file that knows how such a linear is stored."""
    if grid != "affine":
        return _ct_float
    return _ct_int8 if activations else _ct_pack


def _form(scheme: Scheme) -> str:
    return _ct_float.FORMS[scheme.grid] if scheme.grid != "affine" else _kept_by(scheme).FORM


def _lead(form: str) -> str:
    return "weight_packed" if "pack" in form else "weight"


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    """What a config group says of the inputs: rounded to the type of the weights."""
    if scheme.activations is None:
        return None
    kind = "int" if scheme.grid == "affine" else "float"
    return {"num_bits": scheme.bits, "type": kind, "symmetric": True,
            "group_size": 128 if scheme.activations == "group" else None, "strategy": scheme.activations,
            "dynamic": scheme.activations != "tensor"}


def _activations(where: str, inputs: Any) -> str | None:
    """What a Scheme calls this; CheckpointError for a way of rounding that is not read."""
    if inputs is None:
        return None
    said = inputs if isinstance(inputs, Mapping) else {}
    kind = said.get("strategy"), said.get("dynamic"), said.get("group_size")
    known = {("token", True, None): "token", ("group", True, 128): "group", ("tensor", False, None): "tensor"}
    if kind not in known or said.get("num_bits") != 8 or said.get("symmetric", True) is not True:
        raise CheckpointError(f"{where} rounds its inputs in a way that is not read (read: 8 bits, symmetric, dynamic "
                              "per token or per group of 128, or static per tensor); start from the unquantized model")
    return known[kind]


Group = tuple[list[str], str, Mapping[str, Any], str | None]


def _groups(quantization: Mapping[str, Any]) -> list[Group]:
    """(targets, form, weights, inputs) of every config group that can be read."""
    found: list[Group] = []
    groups = quantization.get("config_groups")
    for name, group in (groups.items() if isinstance(groups, Mapping) else ()):
        weights = group.get("weights") if isinstance(group, Mapping) else None
        form = (group.get("format") if isinstance(group, Mapping) else None) or quantization.get("format")
        if not isinstance(weights, Mapping) or form not in FORMS:
            raise CheckpointError(f"config.json: quantization_config.config_groups.{name} is stored as {form!r}, which "
                                  f"is not read (read: {', '.join(FORMS)}); start from the unquantized model")
        inputs = _activations(f"config.json: quantization_config.config_groups.{name}", group.get("input_activations"))
        found.append(([str(target) for target in group.get("targets") or ()], str(form), weights, inputs))
    if not found:
        raise CheckpointError("config.json: quantization_config has no config_groups, so bits and groups are not known")
    return found


def _group_of(linear_name: str, groups: Sequence[Group]) -> tuple[str, Mapping[str, Any], str | None]:
    """The group of a linear: by exact name, then by regular expression, then by class, as the library looks them up."""
    ranked = [(_rank(linear_name, group[0]), group) for group in groups]
    best = min(rank for rank, _ in ranked)
    if best == 3 and len(groups) > 1:
        raise CheckpointError(f"{linear_name}: no config group of quantization_config names it")
    _, form, weights, inputs = next(group for rank, group in ranked if rank == best)
    return form, weights, inputs


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
