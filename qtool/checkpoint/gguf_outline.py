"""A GGUF file taken as it is: which parts its tensors play, from names and sizes alone, without a config.

What is unusual, or wrong, is left to open_gguf, which makes a model of it and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint.gguf_config import count
from qtool.checkpoint.gguf_families import EMBEDDING, HEAD, ROTARY, Family, Part, map_tensors, stored_as
from qtool.checkpoint.gguf_file import architecture_of, check_vocabulary, refuse_undecodable
from qtool.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header

BIASED = {"attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
          "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")}
ALWAYS_BIASED = ("attn_q", "attn_k", "attn_v")  # in models of type qwen2 and qwen2_moe
DENSE_ONLY = ("ffn_gate", "ffn_up", "ffn_down")  # no layer of a model with experts has them
TOKENS = "tokenizer.ggml.tokens"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class GgufOutline:
    """A file that holds exactly the tensors of a model of its family, in the sizes that its metadata give.

    parts: Hugging Face name -> where in the file it is, those of one tensor in its order.
    """

    path: Path
    header: GgufHeader
    family: Family
    parts: dict[str, Part]
    layers: int
    heads: int
    kv_heads: int
    experts: int

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head, too."""
        return HEAD not in self.header.tensors


def outline(path: Path) -> GgufOutline | None:
    """None where it is not certain that the file is such a one. Raises CheckpointError for what no reader takes."""
    where, header = str(path), read_gguf_header(path)
    metadata, tensors = header.metadata, header.tensors
    architecture = architecture_of(header, where)
    layers = count(metadata, f"{architecture}.block_count", where)
    heads = count(metadata, f"{architecture}.attention.head_count", where)
    kv_heads = count(metadata, f"{architecture}.attention.head_count_kv", where, heads)
    refuse_undecodable(header, where)
    family = stored_as(architecture, tensors)
    parts = map_tensors(tensors, family, heads, kv_heads, where)
    hidden = count(metadata, f"{architecture}.embedding_length", where)
    middle = count(metadata, f"{architecture}.feed_forward_length", where)
    if TOKENS in metadata:
        check_vocabulary(metadata, where)
    made = _shapes(family, tensors, hidden, middle, heads, kv_heads)
    if made is None or {name: one.shape for name, one in tensors.items() if name not in ROTARY} != _all(made, layers,
                                                                                                        tensors):
        return None
    if EMBEDDING not in tensors or len(metadata.get(TOKENS, ())) != tensors[EMBEDDING].shape[0]:
        return None
    experts = tensors["blk.0.ffn_gate_exps.weight"].shape[0] if family.experts else 0
    ordered = dict(sorted(parts.items(), key=lambda one: (one[1].tensor.offset, one[1].start)))
    return GgufOutline(path, header, family, ordered, layers, heads, kv_heads, experts)


def _shapes(family: Family, tensors: Mapping[str, GgufTensor], hidden: int, middle: int, heads: int,
            kv_heads: int) -> Shapes | None:
    """The tensors of a layer, as blk.0 should have them; None where the file says too little."""
    def rows(base: str, axis: int = 0) -> int:
        shape = tensors[f"blk.0.{base}.weight"].shape if f"blk.0.{base}.weight" in tensors else ()
        return shape[axis] if len(shape) > axis + 1 else 0

    fused = "attn_qkv" in family.layer
    size = rows("attn_qkv") // (heads + 2 * kv_heads) if fused else rows("attn_q") // heads
    experts, inner, shared = rows("ffn_gate_exps"), rows("ffn_gate_exps", 1), rows("ffn_gate_shexp")
    queries, keys = heads * size, kv_heads * size
    known: Shapes = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_qkv": (queries + 2 * keys, hidden), "attn_output": (hidden, queries),
        "attn_q_norm": (size,), "attn_k_norm": (size,),
        "ffn_gate": (middle, hidden), "ffn_up": (2 * middle if fused else middle, hidden), "ffn_down": (hidden, middle),
        "ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, inner, hidden),
        "ffn_up_exps": (experts, inner, hidden), "ffn_down_exps": (experts, hidden, inner),
        "ffn_gate_inp_shexp": (hidden,), "ffn_gate_shexp": (shared, hidden), "ffn_up_shexp": (shared, hidden),
        "ffn_down_shexp": (hidden, shared),
    }
    made = {f"{base}.weight": known.get(base, (hidden,)) for base in family.layer
            if not (family.experts and base in DENSE_ONLY)}
    always = ALWAYS_BIASED if family.model_type.startswith("qwen2") else ()
    for key, bases in (("", always), *BIASED.items()):
        if bases and (not key or (key in family.biases and f"blk.0.{bases[0]}.bias" in tensors)):
            made |= {f"{base}.bias": known[base][:1] for base in bases}
    return made if size else None


def _all(layer: Shapes, layers: int, tensors: Mapping[str, GgufTensor]) -> Shapes:
    """The tensors that a file with such layers has; the vocabulary is as large as the embedding."""
    embedding = tensors[EMBEDDING].shape if EMBEDDING in tensors else ()
    hidden = layer["attn_norm.weight"][0]
    made: Shapes = {EMBEDDING: (*embedding[:1], hidden), "output_norm.weight": (hidden,)}
    if HEAD in tensors:
        made[HEAD] = made[EMBEDDING]
    return made | {f"blk.{index}.{name}": shape for index in range(layers) for name, shape in layer.items()}
