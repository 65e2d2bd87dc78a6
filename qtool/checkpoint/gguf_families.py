"""What GGUF calls otherwise than Hugging Face, as data: names, row orders and offsets of each architecture.

Sources: gguf's tensor_mapping, the conversion scripts of llama.cpp, and transformers' GGUF loader (5.23).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.checkpoint.gguf_header import GgufTensor
from qtool.errors import CheckpointError

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = "model.layers.{}."
ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
USUAL = {**ATTENTION, **MLP, "ffn_norm": "post_attention_layernorm"}
FOUR_NORMS = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
              "post_ffw_norm": "post_feedforward_layernorm"}
EXPERTS = {"ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
           "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp": "mlp.gate"}
SHARED = {"ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
          "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}


GEMMA_KEYS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Family:
    """One GGUF architecture.

    model_type, model_class: what config.json names.  layer: GGUF name -> Hugging Face name in a decoder layer; {} is
    the expert.  keys: what its config takes from the metadata beside what all do.  head_dim: its config states the
    head size.  fixed: config values that GGUF implies.  permuted: the rows of q and k have llama.cpp's order, rotary
    pairs side by side.  norm_offset: what GGUF adds to every norm weight.
    """

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    keys: tuple[str, ...] = ()
    head_dim: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", USUAL, head_dim=True, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", USUAL),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**USUAL, **QK_NORMS}, head_dim=True),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", {**USUAL, **EXPERTS, **SHARED}),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", {**USUAL, **QK_NORMS, **EXPERTS}, head_dim=True,
                       fixed={"norm_topk_prob": True}),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", {**ATTENTION, **MLP, **FOUR_NORMS}, head_dim=True, keys=GEMMA_KEYS,
                     norm_offset=1.0),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**ATTENTION, **MLP, **FOUR_NORMS, **QK_NORMS}, head_dim=True,
                     keys=GEMMA_KEYS, norm_offset=1.0),
    "phi3": Family("phi3", "Phi3ForCausalLM",
                   {"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
                    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
                   keys=("sliding_window", "original_max_position_embeddings")),
}
ROPE_FREQUENCIES = "rope_freqs.weight"  # no weight, but the divisors of Llama 3's rotary frequencies


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside a GGUF tensor.

    shape: of the result.  start: the first row (of shape[-1] elements) in the GGUF tensor.  heads: undo the order of q
    and k rows for that many heads, 0: none.  offset: subtract this.
    """

    tensor: GgufTensor
    shape: tuple[int, ...]
    start: int = 0
    heads: int = 0
    offset: float = 0.0


def map_tensors(tensors: Mapping[str, GgufTensor], architecture: str, heads: int, kv_heads: int,
                where: str) -> dict[str, Part]:
    """Hugging Face name -> where it is, sorted by name. Raises CheckpointError for a tensor that has no place."""
    family = FAMILIES[architecture]
    parts: dict[str, Part] = {}
    for tensor in tensors.values():
        if tensor.name == ROPE_FREQUENCIES:
            continue
        name = _name(tensor.name, family)
        if name is None:
            raise CheckpointError(f"{where}: tensor '{tensor.name}' has no place in a {architecture} model; use the "
                                  "safetensors version of this model")
        if "{}" in name:
            if len(tensor.shape) != 3:
                raise CheckpointError(f"{where}: tensor '{tensor.name}' {list(tensor.shape)} should stack the experts "
                                      "of a layer in three dimensions; download the file again")
            experts, rows, columns = tensor.shape
            parts |= {name.format(index): Part(tensor, (rows, columns), index * rows) for index in range(experts)}
            continue
        shape = (1, *tensor.shape) if "shared_expert_gate" in name and len(tensor.shape) == 1 else tensor.shape
        parts[name] = Part(tensor, shape, heads=_heads(tensor, name, family, heads, kv_heads, where),
                           offset=family.norm_offset if tensor.name.endswith("norm.weight") else 0.0)
    return dict(sorted(parts.items()))


def _name(name: str, family: Family) -> str | None:
    match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, base, suffix = match.groups()
    inside = (OUTSIDE if layer is None else family.layer).get(base)
    if inside is None:
        return None
    return f"{inside}.{suffix}" if layer is None else LAYER.format(layer) + f"{inside}.{suffix}"


def _heads(tensor: GgufTensor, name: str, family: Family, heads: int, kv_heads: int, where: str) -> int:
    """For how many heads the rows of this tensor are permuted."""
    count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2], 0) if family.permuted else 0
    if count and tensor.shape[0] % (2 * count):
        raise CheckpointError(f"{where}: the {tensor.shape[0]} rows of tensor '{tensor.name}' do not divide into "
                              f"{count} heads of an even size; the metadata belongs to another model")
    return count
