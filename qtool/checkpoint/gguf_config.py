"""What a GGUF file says about its model, as the values of a Hugging Face config.

transformers (5.23) has such a translation too, but it ignores the head size of Qwen 3, the sizes of experts, soft caps
and every rotary scaling: the model runs, and is wrong. Here what cannot be expressed is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qtool.checkpoint.gguf_families import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT, Family
from qtool.checkpoint.gguf_header import GgufTensor
from qtool.errors import CheckpointError

REMEDY = "use the safetensors version of this model"
# GGUF key below the architecture -> config key
KEYS = {
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
# The layer counts of the two Gemmas (27B) whose attention is scaled by hidden size / heads instead of the head size
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# config key -> the tensor that tells
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
LLAMA3_CONTEXTS = tuple(1 << power for power in range(10, 18))


def values(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], family: Family,
           divisors: Mapping[str, torch.Tensor], where: str) -> dict[str, Any]:
    """Values for the config class of the family. divisors: the rotary tensors, float32. Raises CheckpointError.

    Sizes that the tensors have are taken from them, so that a forgotten key cannot make the model another one.
    """
    architecture = family.architecture

    def said(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    hidden = count(metadata, f"{architecture}.embedding_length", where)
    heads = count(metadata, f"{architecture}.attention.head_count", where)
    kv_heads = count(metadata, f"{architecture}.attention.head_count_kv", where, heads)
    head_size = _head_size(tensors, heads, kv_heads, where)
    taken = {target: shortest(said(key)) for key, target in KEYS.items() if target in family.keys}
    result: dict[str, Any] = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "num_hidden_layers": count(metadata, f"{architecture}.block_count", where),
        "intermediate_size": count(metadata, f"{architecture}.feed_forward_length", where),
        "max_position_embeddings": count(metadata, f"{architecture}.context_length", where),
        "rms_norm_eps": _epsilon(metadata, f"{architecture}.attention.layer_norm_rms_epsilon", where),
        "vocab_size": shape_of(tensors, "token_embd.weight", 2, where)[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **{key: value or None for key, value in taken.items() if value is not None},  # 0: no such window or cap
        **{target: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, target in TOKENS.items()},
        **family.fixed,
    }
    if family.head_dim or head_size != hidden // heads:
        result["head_dim"] = head_size
    if family.experts:
        experts = shape_of(tensors, "blk.0.ffn_gate_exps.weight", 3, where)
        result |= {**dict(zip(family.expert_keys, experts[:2], strict=True)),
                   "num_experts_per_tok": count(metadata, f"{architecture}.expert_used_count", where)}
    if "blk.0.ffn_gate_shexp.weight" in tensors:
        result["shared_expert_intermediate_size"] = shape_of(tensors, "blk.0.ffn_gate_shexp.weight", 2, where)[0]
    for key, tensor in BIASES.items():
        if tensor in tensors and key in family.biases:
            result[key] = True
    if architecture in SCALED_BY_WIDTH:
        by_width = result["num_hidden_layers"] == SCALED_BY_WIDTH[architecture]
        result["query_pre_attn_scalar"] = hidden // heads if by_width else head_size
        result |= _layer_types(said("attention.sliding_window_pattern"), result["num_hidden_layers"], where)
    rope = _rope(said, architecture, head_size, divisors, where)
    if architecture == "gemma3":
        near = {"rope_type": "default", "rope_theta": shortest(said("rope.freq_base_swa") or 10000.0)}
        return {**result, "rope_parameters": {"full_attention": rope, "sliding_attention": near}}
    return {**result, "rope_parameters": rope}


def count(metadata: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive number below 2^31 from the metadata. Raises CheckpointError."""
    value = metadata.get(key, default)
    if type(value) is not int or not 1 <= value < 1 << 31:
        shown = "absent" if value is None else repr(value)[:80]
        raise CheckpointError(f"{where}: {key} is {shown}, not one positive number; {REMEDY}")
    return value


def _layer_types(pattern: Any, layers: int, where: str) -> dict[str, list[str]]:
    """Which layers see a window only, where the file says so: for each layer, or with one whole layer in every n."""
    if pattern is None:
        return {}
    if type(pattern) is int and 1 <= pattern <= layers:
        pattern = [index % pattern < pattern - 1 for index in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise CheckpointError(f"{where}: attention.sliding_window_pattern does not tell of {layers} layers; {REMEDY}")
    return {"layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in pattern]}


def _epsilon(metadata: Mapping[str, Any], key: str, where: str) -> float:
    value = metadata.get(key)
    if type(value) is not float or not 0 < value < 1:
        raise CheckpointError(f"{where}: {key} is {repr(value)[:80]}, not a small positive number; {REMEDY}")
    return float(shortest(value))


def shape_of(tensors: Mapping[str, GgufTensor], name: str, dimensions: int, where: str) -> tuple[int, ...]:
    """Shape of a tensor that must be there with that many dimensions. Raises CheckpointError."""
    if name not in tensors or len(tensors[name].shape) != dimensions:
        raise CheckpointError(f"{where}: there is no tensor '{name}' of {dimensions} dimensions; {REMEDY}")
    return tensors[name].shape


def _head_size(tensors: Mapping[str, GgufTensor], heads: int, kv_heads: int, where: str) -> int:
    fused = "blk.0.attn_qkv.weight" in tensors
    rows = shape_of(tensors, "blk.0.attn_qkv.weight" if fused else "blk.0.attn_q.weight", 2, where)[0]
    parts = heads + 2 * kv_heads if fused else heads
    if rows % parts:
        raise CheckpointError(f"{where}: the {rows} rows of the first attention layer do not divide into {heads} heads "
                              f"and {kv_heads} key-value heads; the metadata belongs to another model")
    return rows // parts


def _rope(said: Any, architecture: str, head_size: int, divisors: Mapping[str, torch.Tensor],
          where: str) -> dict[str, Any]:
    """rope_parameters: base frequency, share of the head that is rotated, scaling."""
    base = shortest(said("rope.freq_base") or 10000.0)
    rotated = said("rope.dimension_count") or head_size
    if type(base) is not float or type(rotated) is not int or not 0 < rotated <= head_size:
        raise CheckpointError(f"{where}: rotates {rotated!r} of {head_size} elements per head by {base!r}; {REMEDY}")
    rope = {"rope_type": "default", "rope_theta": base}
    if rotated != head_size:
        if architecture != "phi3":
            raise CheckpointError(f"{where}: rotates {rotated} of {head_size} elements per head, which {architecture} "
                                  f"models in transformers cannot; {REMEDY}")
        rope["partial_rotary_factor"] = rotated / head_size
    if ROPE_FREQUENCIES in divisors:
        return {**rope, **_llama3(divisors[ROPE_FREQUENCIES].double(), base, head_size, where)}
    if ROPE_LONG in divisors and ROPE_SHORT in divisors:
        factors = {name: [shortest(value) for value in divisors[tensor].tolist()]
                   for name, tensor in (("long_factor", ROPE_LONG), ("short_factor", ROPE_SHORT))}
        if any(len(values) != rotated // 2 for values in factors.values()):
            raise CheckpointError(f"{where}: {ROPE_LONG} or {ROPE_SHORT} has no value for each of {rotated // 2} "
                                  f"frequencies; {REMEDY}")
        return {**rope, "rope_type": "longrope", **factors}
    factor = said("rope.scaling.factor") or said("rope.scale_linear")
    kind = said("rope.scaling.type") or ("linear" if factor not in (None, 1.0) else "none")
    if kind == "none":
        return rope
    original = said("rope.scaling.original_context_length")
    known = kind == "linear" or (kind == "yarn" and type(original) is int)
    if not known or type(factor) is not float or not factor >= 1:
        raise CheckpointError(f"{where}: rotary scaling {kind!r} by {factor!r} is not supported; {REMEDY}")
    rope |= {"rope_type": kind, "factor": shortest(factor)}
    return rope if kind == "linear" else {**rope, "original_max_position_embeddings": original}


def _llama3(divisors: torch.Tensor, base: float, head_size: int, where: str) -> dict[str, Any]:
    """Find the Llama 3 parameters whose frequency divisors (float64 [head_size / 2]) these are.

    Frequencies that turn less than once in the context are divided by `factor`, those that turn more than four times
    by 1, between them smoothly. https://github.com/meta-llama/llama-models, models/llama3/model.py
    """
    factor = float(divisors.max())
    frequencies = base ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    if divisors.shape == frequencies.shape and factor >= 1:
        for context in LLAMA3_CONTEXTS:
            turns = (context * frequencies / (2 * math.pi)).clamp(1.0, 4.0)
            smooth = (turns - 1.0) / 3.0
            if torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
                return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": context}
    raise CheckpointError(f"{where}: the rotary divisors in rope_freqs.weight follow no known rule; {REMEDY}")


def shortest(value: Any) -> Any:
    """A float that was stored in 32 bits, as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value
