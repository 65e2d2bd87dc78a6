"""What the key/value section of a GGUF file says about a model, from the values of its Hugging Face config.

The inverse of gguf_config.py. llama.cpp computes each architecture in one way; a config that asks for another is
refused, because the file would load and be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType

from qtool.checkpoint import gguf_general, gguf_tokenizer
from qtool.checkpoint.gguf_config import SCALED_BY_WIDTH
from qtool.checkpoint.gguf_families import FAMILIES, ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT, Family, written_as
from qtool.checkpoint.gguf_writer import GgufModel
from qtool.errors import PlanError

INSTEAD = "export this model to another format"
ROTATED_SHARE = ("phi3",)  # architectures whose models may rotate a part of each head
WINDOWED = {"gemma2": 2, "gemma3": 6}  # one layer in so many sees everything, the others a window


def describe(config: Mapping[str, Any], directory: Path, rows: int, name: str, source: Path | None = None,
             parameters: Mapping[str, tuple[int, ...]] | None = None) -> GgufModel:
    """Everything that the file says beside its tensors. Raises PlanError for what GGUF or llama.cpp cannot express.

    config: all values of the text model, defaults included, rotary settings under rope_parameters (as transformers 5
    has them).  directory: where its tokenizer and card are.  rows: of the embedding.  name: of the model.  source: the
    GGUF file that it comes from, whose vocabulary is then kept as it is.  parameters: shapes, by Hugging Face names.
    """
    model_type = str(config.get("model_type"))
    family = written_as(model_type)
    if family is None:
        known = ", ".join(one for family in FAMILIES for one in (family.model_type, *family.also))
        raise PlanError(f"model type '{model_type}' is not written as GGUF (written: {known}); {INSTEAD}")
    _refuse(config, family)
    keys = GGUFWriter(None, family.architecture)
    keys.add_type("model")
    gguf_general.add(keys, directory, config, name, parameters or {})
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    _sizes(keys, config, family, head_size)
    rotary = _rope(keys, config, family, head_size)
    _windows(keys, config, family)
    gguf_tokenizer.add(keys, directory, config, rows, source)
    return GgufModel(family, config["num_attention_heads"], _kv_heads(config), keys.kv_data[0], rotary,
                     _notes(config, family))


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _refuse(config: Mapping[str, Any], family: Family) -> None:
    """What the architecture in llama.cpp fixes must be what the config says."""
    def expect(key: str, value: Any, wanted: Any) -> None:
        if value != wanted:
            raise PlanError(f"config.json: {key} is {value!r}, and llama.cpp computes {family.architecture} models "
                            f"with {wanted!r}; {INSTEAD}")

    expect("hidden_act", config.get("hidden_activation") or config.get("hidden_act"), family.activation)
    for key, value in family.fixed.items():
        expect(key, config.get(key), value)
    if family.architecture in SCALED_BY_WIDTH:
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        by_width = layers == SCALED_BY_WIDTH[family.architecture]
        expect("query_pre_attn_scalar", config["query_pre_attn_scalar"],
               config["hidden_size"] // heads if by_width else config["head_dim"])
        expect("use_bidirectional_attention", config.get("use_bidirectional_attention") or False, False)
    if family.architecture == "gemma2":
        expect("tie_word_embeddings", config.get("tie_word_embeddings"), True)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not config.get(key):
                raise PlanError(f"config.json: {key} is {config.get(key)!r}, and llama.cpp computes gemma2 models with "
                                f"one; {INSTEAD}")
    if family.architecture == "gemma3":
        expect("attn_logit_softcapping", config.get("attn_logit_softcapping"), None)


def _sizes(keys: GGUFWriter, config: Mapping[str, Any], family: Family, head_size: int) -> None:
    keys.add_block_count(config["num_hidden_layers"])
    keys.add_context_length(config["max_position_embeddings"])
    keys.add_embedding_length(config["hidden_size"])
    keys.add_feed_forward_length(config["intermediate_size"])
    keys.add_head_count(config["num_attention_heads"])
    keys.add_head_count_kv(_kv_heads(config))
    keys.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if family.head_dim or head_size * config["num_attention_heads"] != config["hidden_size"]:
        keys.add_key_length(head_size)
        keys.add_value_length(head_size)
    if family.architecture == "llama":
        keys.add_vocab_size(config["vocab_size"])
    if family.experts:
        count = config.get("num_experts") or config["num_local_experts"]
        keys.add_expert_count(count)
        keys.add_expert_used_count(config["num_experts_per_tok"])
        if family.expert_keys[1] != "intermediate_size":
            keys.add_expert_feed_forward_length(config[family.expert_keys[1]])
        if "shared_expert_intermediate_size" in config:
            keys.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _rope(keys: GGUFWriter, config: Mapping[str, Any], family: Family, head_size: int) -> dict[str, torch.Tensor]:
    """The keys of the rotary embedding; returns its divisors where it is scaled frequency by frequency."""
    every = config["rope_parameters"]
    near = every.get("sliding_attention")
    rope = every.get("full_attention", every)
    keys.add_rope_freq_base(float(rope["rope_theta"]))
    if near is not None:
        if near.get("rope_type", "default") != "default":
            raise PlanError(f"config.json: rope_parameters.sliding_attention is scaled ({near['rope_type']}), which "
                            f"GGUF has no key for; {INSTEAD}")
        keys.add_rope_freq_base_swa(float(near["rope_theta"]))
    rotated = int(head_size * rope.get("partial_rotary_factor", 1.0))
    if rotated != head_size and family.architecture not in ROTATED_SHARE:
        raise PlanError(f"config.json: rotates {rotated} of {head_size} elements of a head, which "
                        f"{family.architecture} models of llama.cpp do not; {INSTEAD}")
    if family.architecture in ("llama", *ROTATED_SHARE):
        keys.add_rope_dimension_count(rotated)
    return _scaling(keys, config, rope, rotated)


def _scaling(keys: GGUFWriter, config: Mapping[str, Any], rope: Mapping[str, Any],
             rotated: int) -> dict[str, torch.Tensor]:
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "default":
        if config.get("model_type") == "phi3":
            keys.add_rope_scaling_orig_ctx_len(original or config["max_position_embeddings"])
        return {}
    if kind == "linear":
        keys.add_rope_scaling_type(RopeScalingType.LINEAR)
        keys.add_rope_scaling_factor(float(rope["factor"]))
        return {}
    if kind == "yarn" and not any(rope.get(key) for key in ("mscale", "mscale_all_dim", "attention_factor")):
        keys.add_rope_scaling_type(RopeScalingType.YARN)
        keys.add_rope_scaling_factor(float(rope["factor"]))
        keys.add_rope_scaling_orig_ctx_len(original or config["max_position_embeddings"])
        keys.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        keys.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
        return {}
    if kind == "llama3":
        return {ROPE_FREQUENCIES: _llama3(rope, rotated)}
    if kind == "longrope":
        return _longrope(keys, config, rope, original)
    raise PlanError(f"config.json: rotary scaling {kind!r} with {sorted(rope)} cannot be said in GGUF; {INSTEAD}")


def _llama3(rope: Mapping[str, Any], rotated: int) -> torch.Tensor:
    """float32 [rotated / 2]: what each frequency is divided by.

    https://github.com/meta-llama/llama-models, models/llama3/model.py
    """
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()


def _longrope(keys: GGUFWriter, config: Mapping[str, Any], rope: Mapping[str, Any],
              original: int | None) -> dict[str, torch.Tensor]:
    """Divisors for texts up to the original context and for longer ones. https://arxiv.org/abs/2402.13753"""
    if config.get("model_type") != "phi3" or not original:
        raise PlanError("config.json: longrope scaling without original_max_position_embeddings, or of a model that is "
                        f"no phi3, cannot be said in GGUF; {INSTEAD}")
    ratio = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    keys.add_rope_scaling_orig_ctx_len(original)
    keys.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or usual))
    return {ROPE_LONG: torch.tensor(rope["long_factor"], dtype=torch.float32),
            ROPE_SHORT: torch.tensor(rope["short_factor"], dtype=torch.float32)}


def _windows(keys: GGUFWriter, config: Mapping[str, Any], family: Family) -> None:
    """Sliding windows and soft caps."""
    if "sliding_window" in family.keys:
        keys.add_sliding_window(config.get("sliding_window") or 0)
    pattern = WINDOWED.get(family.architecture)
    if pattern is not None:
        layers = [kind == "sliding_attention" for kind in config["layer_types"]]
        if layers != [index % pattern < pattern - 1 for index in range(len(layers))]:
            keys.add_sliding_window_pattern(layers)
    for key, add in (("attn_logit_softcapping", keys.add_attn_logit_softcapping),
                     ("final_logit_softcapping", keys.add_final_logit_softcapping)):
        if key in family.keys and config.get(key):
            add(float(config[key]))


def _notes(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    window, context = config.get("sliding_window"), config["max_position_embeddings"]
    switched_off = config.get("use_sliding_window") is False
    if not window or window >= context or switched_off or family.architecture in WINDOWED:
        return ()
    return (f"the model attends to the last {window} tokens; llama.cpp has no such window for {family.architecture} "
            "and attends to all, so that longer texts come out differently",)
