"""The skeleton of a plain decoder from its names and shapes alone, for recipes that run nothing.

Importing transformers and building the model on the meta device takes longer than rounding a small model. Where a
checkpoint holds exactly the tensors, in exactly the shapes, that its config.json implies for one of the families
below, nothing else is needed. Everything unusual, and everything wrong, is left to skeleton.build, which says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtool.models import tokenizer
from qtool.models.skeleton import Skeleton
from qtool.tensors import TensorSpec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MAX_TOKENIZER_BYTES = 64 << 20
COUNTS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
MAYBE_COUNTS = ("num_key_value_heads", "head_dim")
STATED = (*COUNTS, "num_key_value_heads", "max_position_embeddings")
SLIDING = {"mistral": ("sliding_window",), "qwen2": ("use_sliding_window",),  # that the class would fill in
           "qwen3": ("use_sliding_window", "head_dim")}


def build(directory: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Skeleton | None:
    """What skeleton.build would give, with a model of bare linears; None where that is not certain."""
    family = config.get("model_type")
    plain = family in FAMILIES and "auto_map" not in config and "quantization_config" not in config
    if not plain or not all(_is_count(config.get(key)) for key in COUNTS):
        return None
    if not all(config.get(key) is None or _is_count(config[key]) for key in MAYBE_COUNTS):
        return None
    if config["num_hidden_layers"] > len(specs):
        return None
    tied = bool(config.get("tie_word_embeddings", "lm_head.weight" not in specs))
    linears, parameters = _shapes(str(family), config, tied)
    if {name: spec.shape for name, spec in specs.items()} != parameters or not _tokenizer_fits(directory, config):
        return None
    dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), None)
    return Skeleton(
        model=_model(linears), blocks=tuple(f"model.layers.{index}" for index in range(config["num_hidden_layers"])),
        parameters=parameters, tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        head=None if tied else "lm_head", embeddings=("model.embed_tokens.weight",), routers=(), expert_layers=(),
        ignored=(), hidden=config["hidden_size"], vocabulary=config["vocab_size"],
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32, model_type=str(family))


def stated(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What skeleton.config_values would give of this config.json, as far as a model computes with it; None where that
    is not certain, because it leaves out what its class has a default for, or has another kind of value there."""
    family, rope = str(config.get("model_type")), config.get("rope_parameters")
    if family not in FAMILIES or not all(_is_count(config.get(key)) for key in STATED):
        return None
    if rope is None:  # as before transformers 5
        rope = {"rope_theta": config.get("rope_theta"), "rope_type": "default"}
    elif "rope_theta" in config:
        return None
    usual = isinstance(rope, Mapping) and set(rope) == {"rope_theta", "rope_type"} and rope["rope_type"] == "default"
    numbers = usual and all(isinstance(one, int | float) for one in (rope["rope_theta"], config.get("rms_norm_eps")))
    if not numbers or not isinstance(config.get("hidden_act"), str) or config.get("rope_scaling"):
        return None
    if not all(key in config for key in SLIDING.get(family, ())) or config.get("use_sliding_window"):
        return None
    if not all(config.get(key) is None or _is_count(config[key]) for key in ("head_dim", "sliding_window")):
        return None
    window = {"sliding_window": None} if "use_sliding_window" in config else {}
    return {**config, "rope_parameters": dict(rope), **window}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shapes(family: str, config: Mapping[str, Any],
            tied: bool) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Linear -> (N, K), and every parameter -> shape, in the order of the model."""
    hidden, middle, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    attention_bias = family == "qwen2" or (family != "mistral" and bool(config.get("attention_bias", False)))
    mlp_bias = family == "llama" and bool(config.get("mlp_bias", False))
    members = {
        "self_attn.q_proj": (heads * head, hidden, attention_bias), "self_attn.k_proj": (keys, hidden, attention_bias),
        "self_attn.v_proj": (keys, hidden, attention_bias),
        "self_attn.o_proj": (hidden, heads * head, attention_bias and family != "qwen2"),
        "mlp.gate_proj": (middle, hidden, mlp_bias), "mlp.up_proj": (middle, hidden, mlp_bias),
        "mlp.down_proj": (hidden, middle, mlp_bias),
    }
    linears: dict[str, tuple[int, int]] = {}
    parameters: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        for path, (rows, columns, bias) in members.items():
            linears[prefix + path] = (rows, columns)
            parameters[f"{prefix}{path}.weight"] = (rows, columns)
            if bias:
                parameters[f"{prefix}{path}.bias"] = (rows,)
            if path == "self_attn.o_proj" and family == "qwen3":
                parameters |= {f"{prefix}self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        parameters |= {f"{prefix}{name}.weight": (hidden,)
                       for name in ("input_layernorm", "post_attention_layernorm")}
    parameters["model.norm.weight"] = (hidden,)
    if not tied:
        parameters["lm_head.weight"] = (vocabulary, hidden)
    return linears, parameters


def _model(linears: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Modules with nothing but these linears, on the meta device."""
    root = nn.Module()
    for path, (rows, columns) in linears.items():
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(name, nn.Linear(columns, rows, bias=False, device="meta"))
    return root


def _tokenizer_fits(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether there is no tokenizer, or one with a tokenizer.json whose tokens all have a row in the embedding."""
    if not tokenizer.present(directory):
        return True
    path = directory / "tokenizer.json"
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            return False
        data = json.loads(path.read_bytes())
        known = set(data["model"]["vocab"]) | {entry["content"] for entry in data.get("added_tokens", [])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # or a list of [token, score]
        return False
    return len(known) <= config["vocab_size"]
