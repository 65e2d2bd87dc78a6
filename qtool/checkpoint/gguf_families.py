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

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece has in a space's place
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
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
MIXTRAL = {"ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
           "ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_gate_inp": "block_sparse_moe.gate"}
SHARED = {"ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
          "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}


EXPERT = r"(?<=\.)experts\.(\d+)(?=\.)"  # the number of an expert in a Hugging Face name
GEMMA_KEYS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Family:
    """One kind of model. The table is read in both directions, by the reader and by the writer.

    architecture: general.architecture.  model_type, model_class: what config.json names.  layer: GGUF name -> Hugging
    Face name in a decoder layer; {} is the expert.  also: further model types that are written as this one.  keys: what
    its config takes from the metadata beside what all do.  head_dim: its config states the head size.  fixed: config
    values that GGUF implies.  biases: config keys that ask for them.  expert_keys: config keys of the number and
    the size of experts.  activation: the one that the architecture implies.  permuted: the rows of q and k have
    llama.cpp's order, rotary pairs side by side.  norm_offset: what GGUF adds to every norm weight.
    """

    architecture: str
    model_type: str
    model_class: str
    layer: Mapping[str, str]
    also: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    head_dim: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    expert_keys: tuple[str, str] = ("num_experts", "moe_intermediate_size")
    activation: str = "silu"
    permuted: bool = False
    norm_offset: float = 0.0

    @property
    def experts(self) -> bool:
        return "ffn_gate_exps" in self.layer

    @property
    def inverse(self) -> dict[str, str]:
        """Hugging Face name -> GGUF name, in a layer."""
        return {theirs: ours for ours, theirs in self.layer.items()}


FAMILIES = (
    Family("llama", "llama", "LlamaForCausalLM", USUAL, also=("mistral",), head_dim=True, permuted=True,
           biases=("attention_bias", "mlp_bias")),
    Family("llama", "mixtral", "MixtralForCausalLM", {**ATTENTION, "ffn_norm": "post_attention_layernorm", **MIXTRAL},
           head_dim=True, permuted=True, expert_keys=("num_local_experts", "intermediate_size")),
    Family("qwen2", "qwen2", "Qwen2ForCausalLM", USUAL),
    Family("qwen3", "qwen3", "Qwen3ForCausalLM", {**USUAL, **QK_NORMS}, head_dim=True, biases=("attention_bias",)),
    Family("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", {**USUAL, **EXPERTS, **SHARED},
           fixed={"norm_topk_prob": False}),
    Family("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", {**USUAL, **QK_NORMS, **EXPERTS}, head_dim=True,
           fixed={"norm_topk_prob": True}, biases=("attention_bias",)),
    Family("gemma2", "gemma2", "Gemma2ForCausalLM", {**ATTENTION, **MLP, **FOUR_NORMS}, head_dim=True, keys=GEMMA_KEYS,
           activation="gelu_pytorch_tanh", norm_offset=1.0),
    Family("gemma3", "gemma3_text", "Gemma3ForCausalLM", {**ATTENTION, **MLP, **FOUR_NORMS, **QK_NORMS}, head_dim=True,
           keys=GEMMA_KEYS, activation="gelu_pytorch_tanh", norm_offset=1.0),
    Family("phi3", "phi3", "Phi3ForCausalLM",
           {"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
           keys=("sliding_window", "original_max_position_embeddings")),
)
ARCHITECTURES = tuple(dict.fromkeys(family.architecture for family in FAMILIES))
# No weights, but divisors of rotary frequencies: Llama 3's, and those of long and short texts (longrope)
ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROTARY = (ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT)


def stored_as(architecture: str, tensors: Mapping[str, GgufTensor]) -> Family:
    """The family of a file of one of ARCHITECTURES: those with and without experts may share one."""
    here = [family for family in FAMILIES if family.architecture == architecture]
    stacked = "blk.0.ffn_gate_exps.weight" in tensors
    return next((family for family in here if family.experts == stacked), here[0])


def written_as(model_type: str) -> Family | None:
    """The family in which a model of this type is written; None: GGUF files of it are not written."""
    return next((family for family in FAMILIES if model_type in (family.model_type, *family.also)), None)


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


def map_tensors(tensors: Mapping[str, GgufTensor], family: Family, heads: int, kv_heads: int,
                where: str) -> dict[str, Part]:
    """Hugging Face name -> where it is, sorted by name. Raises CheckpointError for a tensor that has no place."""
    parts: dict[str, Part] = {}
    for tensor in tensors.values():
        if tensor.name in ROTARY:
            continue
        name = _name(tensor.name, family)
        if name is None:
            raise CheckpointError(f"{where}: tensor '{tensor.name}' has no place in a {family.architecture} model; use "
                                  "the safetensors version of this model")
        if "{}" in name:
            if len(tensor.shape) != 3:
                raise CheckpointError(f"{where}: tensor '{tensor.name}' {list(tensor.shape)} should stack the experts "
                                      "of a layer in three dimensions; download the file again")
            experts, rows, columns = tensor.shape
            parts |= {name.format(index): Part(tensor, (rows, columns), index * rows) for index in range(experts)}
            continue
        shape = (1, *tensor.shape) if "shared_expert_gate" in name and len(tensor.shape) == 1 else tensor.shape
        count = permuted_heads(name, family, heads, kv_heads)
        if count and tensor.shape[0] % (2 * count):
            raise CheckpointError(f"{where}: the {tensor.shape[0]} rows of tensor '{tensor.name}' do not divide into "
                                  f"{count} heads of an even size; the metadata belongs to another model")
        parts[name] = Part(tensor, shape, heads=count, offset=norm_offset(tensor.name, family))
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


def gguf_name(name: str, family: Family) -> tuple[str, int | None] | None:
    """The GGUF tensor that holds a Hugging Face tensor, and which expert of it that is; None: there is no such one."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, inside, suffix = match.groups()
    if layer is None:
        outside = next((ours for ours, theirs in OUTSIDE.items() if theirs == inside), None)
        return None if outside is None else (f"{outside}.{suffix}", None)
    expert = re.search(EXPERT, inside)
    base = family.inverse.get(re.sub(EXPERT, "experts.{}", inside))
    if base is None:
        return None
    return f"blk.{layer}.{base}.{suffix}", int(expert[1]) if expert else None


def norm_offset(name: str, family: Family) -> float:
    """What the GGUF tensor `name` has more than the Hugging Face one."""
    return family.norm_offset if name.endswith("norm.weight") else 0.0


def permuted_heads(name: str, family: Family, heads: int, kv_heads: int) -> int:
    """For how many heads the rows of the Hugging Face tensor `name` are permuted; 0: they are not."""
    return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2], 0) if family.permuted else 0
