"""How codes and scales become bytes, and who loads them. One file is one format; its name is the format's name.

A format is a module with
    NAME, LOADERS                             its name; (program, three lines that load a directory) for the model card
    check(scheme, linear_name, shape)         why it cannot hold a linear, with the nearest scheme that works; else None
    scale_dtype(model_dtype)                  the dtype in which it keeps scales
    layout(linear_name, shape, scheme, dtype) names, dtypes and shapes of what pack will return, before any data
    pack(linear_name, tensor)                 QuantizedTensor -> those tensors
    unpack(linear_name, read, scheme, shape)  the inverse; dequantize(...) also takes column orders that unpack refuses
    config(schemes, skipped, steps)           the quantization_config of config.json; extra_files(it) -> more JSON files
    check_together(schemes, others)           why these linears cannot share one checkpoint, or None; others: dense ones
    notes(schemes), fused_conflicts(schemes)  what a user should know about who can load the result
    KV_SCALES, kv_scales(attention), with_kv_cache(config)       where scales of cached keys and values have a place
    SUFFIXES, recognises(config), schemes(config, specs, read)   for reading checkpoints, also those of other programs
and, where the usual does not hold,
    METADATA                                  what the safetensors files say of themselves
    CONFIG_KEYS                               the names of the quantization_config in config.json
    adapted(config)                           the rest of config.json as its readers want it
    WIDER                                     grid -> dtypes whose values its scales may have too, as float32 tensors
    int4(linear_name, config)                 the tensor with 4-bit codes, its layout (ops/int4.py)
    stacked(spec), members(spec)              a tensor of an expert as a part of the one for all of its kind; of such a
                                              one, the names of its parts (checkpoint/stacks.py)
    check_model(model_type, linears)          why a model with these quantized linears cannot be held, or None
    obstacle(linear_name, read, scheme, shape, config)           why the codes cannot be kept in another format, or None
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch

from qtool import found
from qtool.formats._stored import QUANTIZATION_KEYS, quantization_config
from qtool.formats._targets import fused_name, fused_sets
from qtool.recipe import Scheme
from qtool.tensors import TensorSpec

__all__ = [
    "QUANTIZATION_KEYS", "check_model", "fused_name", "fused_sets", "load", "members", "names", "placing",
    "quantization_config", "recognise", "stored_bytes", "with_quantization",
]


def names() -> list[str]:
    """The formats there are, as a user types them, e.g. 'compressed-tensors'."""
    return found.names("formats")


def load(name: str) -> ModuleType:
    """The module of the format called `name`. Raises RecipeError, with the nearest name, when there is none."""
    return found.load("formats", name)


def recognise(config: Mapping[str, Any]) -> ModuleType | None:
    """The format in which a checkpoint with this config.json is stored; None when it is none of ours."""
    return next((module for module in map(load, names()) if module.recognises(config)), None)


def placing(format_: ModuleType, quantized: Iterable[str]) -> Callable[[TensorSpec], TensorSpec]:
    """How tensors that stay dense lie in a checkpoint of this format in which the linears `quantized` are."""
    stacked = getattr(format_, "stacked", None)
    if stacked is None or not any(".experts." in name for name in quantized):
        return lambda spec: spec
    return stacked  # type: ignore[no-any-return]


def check_model(format_: ModuleType, model_type: str, linears: Iterable[str]) -> str | None:
    """Why a checkpoint of this format cannot hold a model in which the linears `linears` are quantized, or None."""
    found: str | None = getattr(format_, "check_model", lambda *_: None)(model_type, linears)
    return found


def members(format_: ModuleType) -> Callable[[TensorSpec], list[str]]:
    """What tells the names of the parts of a tensor in a file, none if it is no stack."""
    return getattr(format_, "members", lambda spec: [])


def with_quantization(config: Mapping[str, Any], format_: ModuleType, said: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the quantization_config `said` ({}: none), as readers of the format look for it."""
    adapted = getattr(format_, "adapted", dict)(config)
    return {**adapted, **{key: dict(said) for key in getattr(format_, "CONFIG_KEYS", ("quantization_config",)) if said}}


def stored_bytes(format_: ModuleType, linear_name: str, shape: tuple[int, int], scheme: Scheme,
                 model_dtype: torch.dtype) -> int:
    """Bytes of one linear [N, K] in a format, scales and zero points included."""
    return sum(spec.nbytes for spec in format_.layout(linear_name, shape, scheme, model_dtype))
