"""The nodes of a decoder, named and wired as onnxruntime-genai's own builder does it.

Source: onnxruntime-genai, src/python/py/models (names, inputs, outputs); onnxruntime, docs/ContribOperators.md.
Everything is computed in one dtype. Weights that are not quantized stay in theirs and are cast, which onnxruntime does
once, when it loads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qtool.decode import Source
from qtool.errors import ModelError
from qtool.models.decoder import Decoder, rotary_caches
from qtool.onnx_graph import weights
from qtool.onnx_graph.builder import MICROSOFT, Graph
from qtool.onnx_graph.weights import Part
from qtool.tensors import TensorSpec

BATCH, LENGTH, TOTAL, PAST = "batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"
PAST_NAMES = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
PRESENT_NAMES = {"key": "present.%d.key", "value": "present.%d.value"}


@dataclass
class Drawing:
    """What the functions below share. used: the parameters that have found their place."""

    graph: Graph
    source: Source
    decoder: Decoder
    accuracy_level: int
    dtype: torch.dtype
    used: set[str] = field(default_factory=set)

    def stored(self, parameter: str) -> str:
        """The checkpoint's name of a parameter, which counts as used from now on."""
        self.used.add(parameter)
        return self.decoder.skeleton.source(parameter)


def draw(source: Source, decoder: Decoder, accuracy_level: int = 0, dtype: torch.dtype = torch.float32) -> Graph:
    """The graph of a decoder that computes in dtype.

    Raises InputError for a linear that MatMulNBits cannot hold, ModelError for a parameter that the graph does not use.
    """
    graph = Graph()
    here = Drawing(graph, source, decoder, accuracy_level, dtype)
    graph.input("input_ids", torch.int64, [BATCH, LENGTH])
    graph.input("attention_mask", torch.int64, [BATCH, TOTAL])
    graph.output("logits", dtype, [BATCH, LENGTH, decoder.vocabulary])
    for index in range(decoder.layers):
        for kind in ("key", "value"):
            graph.input(PAST_NAMES[kind] % index, dtype, [BATCH, decoder.key_heads, PAST, decoder.head_size])
            graph.output(PRESENT_NAMES[kind] % index, dtype, [BATCH, decoder.key_heads, TOTAL, decoder.head_size])
    lengths = _lengths(graph)
    caches = {kind: _caches(here, kind) for kind in dict.fromkeys(decoder.rope_kinds)}
    stream, addend = _embedding(here), ""
    for index in range(decoder.layers):
        stream, addend = _block(here, index, stream, addend, [*lengths, *caches[decoder.rope_kinds[index]]])
    final, _ = _norm(here, "model.norm.weight", f"/model/layers.{decoder.layers}/final_norm_layernorm", stream, addend)
    _head(here, final)
    unused = [name for name in decoder.skeleton.parameters if name not in here.used]
    if unused:
        raise ModelError(f"{source.origin}: the decoder graph has no place for {unused[0]} ({len(unused)} tensors)")
    return graph


def _lengths(graph: Graph) -> list[str]:
    """What GroupQueryAttention wants to know of the mask: [batch] tokens of each sequence less one, and the longest."""
    name = "/model/attn_mask_reformat/attn_mask_subgraph"
    total = graph.node("ReduceSum", f"{name}/ReduceSum", ["attention_mask", graph.constant([1], torch.int64)],
                       keepdims=0)
    less = graph.node("Sub", f"{name}/Sub", [total, graph.constant([1], torch.int64)])
    shape = graph.node("Shape", f"{name}/Shape", ["attention_mask"])
    longest = graph.node("Gather", f"{name}/Gather", [shape, graph.constant(1, torch.int64)], axis=0)
    return [graph.cast(less, torch.int32, f"{name}/Sub/Cast"), graph.cast(longest, torch.int32, f"{name}/Gather/Cast")]


def _caches(here: Drawing, kind: str) -> list[str]:
    decoder = here.decoder
    ending = f"_{kind.removesuffix('_attention')}" if kind else ""
    shape = (decoder.positions, decoder.head_size // 2)
    specs = tuple(TensorSpec(name + ending, here.dtype, shape) for name in ("cos_cache", "sin_cache"))
    return here.graph.part(Part("", specs, lambda: tuple(one.to(here.dtype) for one in rotary_caches(decoder, kind))))


def _embedding(here: Drawing) -> str:
    graph, tensor = here.graph, here.stored("model.embed_tokens.weight")
    table = graph.part(weights.plain(here.source, tensor, "model.embed_tokens.weight"))[0]
    rows = _computed(here, graph.node("Gather", "/model/embed_tokens/Gather", [table, "input_ids"]), tensor,
                  "/model/embed_tokens/Cast")
    scale = here.decoder.embedding_scale
    if scale is None:
        return rows
    return graph.node("Mul", "/model/embed_tokens/Mul", [rows, graph.constant(scale, here.dtype)])


def _block(here: Drawing, index: int, stream: str, addend: str, facts: list[str]) -> tuple[str, str]:
    """The residual stream after a block, as two values that are still to be added: the next norm does that."""
    def norm(which: str, *values: str) -> tuple[str, str]:
        return _norm(here, f"model.layers.{index}.{which}.weight", f"/model/layers.{index}/{which}", *values)

    inner, stream = norm("input_layernorm", stream, addend)
    attended = _attention(here, index, inner, facts)
    if not here.decoder.sandwich:
        inner, stream = norm("post_attention_layernorm", stream, attended)
        return stream, _mlp(here, index, inner)
    attended, _ = norm("post_attention_layernorm", attended)
    inner, stream = norm("pre_feedforward_layernorm", stream, attended)
    made, _ = norm("post_feedforward_layernorm", _mlp(here, index, inner))
    return stream, made


def _norm(here: Drawing, parameter: str, name: str, value: str, addend: str = "") -> tuple[str, str]:
    """(norm of value + addend, value + addend)"""
    graph, epsilon = here.graph, here.decoder.epsilon
    weight = graph.part(weights.vector(here.source, here.stored(parameter), f"{_initializer(name)}.weight",
                                       here.dtype, here.decoder.norm_offset))[0]
    if not addend:
        return graph.node("SimplifiedLayerNormalization", f"{name}/LayerNorm", [value, weight], axis=-1,
                          epsilon=epsilon, stash_type=1), value
    name += "/SkipLayerNorm"
    added = f"{name}/output_3"
    made = graph.node("SkipSimplifiedLayerNormalization", name, [value, addend, weight],
                      [f"{name}/output_0", "", "", added], MICROSOFT, epsilon=epsilon)
    return made, added


def _attention(here: Drawing, index: int, value: str, facts: list[str]) -> str:
    """facts: lengths and rotary caches."""
    graph, decoder = here.graph, here.decoder
    module, name = f"model.layers.{index}.self_attn", f"/model/layers.{index}/attn"
    states = []
    for letter in ("q", "k", "v"):
        made = _linear(here, f"{module}.{letter}_proj", f"{name}/{letter}_proj", value)
        if decoder.has(f"{module}.{letter}_norm.weight"):
            made = _head_norm(here, f"{module}.{letter}_norm.weight", f"{name}/{letter}_norm", made)
        states.append(made)
    window = decoder.windows[index]
    out = f"{name}/GroupQueryAttention"
    made = graph.node(
        "GroupQueryAttention", out, [*states, PAST_NAMES["key"] % index, PAST_NAMES["value"] % index, *facts],
        [f"{out}/output_0", PRESENT_NAMES["key"] % index, PRESENT_NAMES["value"] % index], MICROSOFT,
        num_heads=decoder.heads, kv_num_heads=decoder.key_heads, scale=decoder.scaling, do_rotary=1,
        rotary_interleaved=0, softcap=decoder.attention_cap or 0.0, local_window_size=-1 if window is None else window)
    return _linear(here, f"{module}.o_proj", f"{name}/o_proj", made)


def _head_norm(here: Drawing, parameter: str, name: str, value: str) -> str:
    """A norm over each head of [batch, length, heads x head_size]."""
    graph, size = here.graph, here.decoder.head_size
    weight = graph.part(weights.vector(here.source, here.stored(parameter), f"{_initializer(name)}.layernorm.weight",
                                       here.dtype, here.decoder.norm_offset))[0]
    heads = graph.node("Reshape", f"{name}/Reshape_1", [value, graph.constant([0, 0, -1, size], torch.int64)])
    made = graph.node("SimplifiedLayerNormalization", f"{name}/SimplifiedLayerNormalization", [heads, weight], axis=-1,
                      epsilon=here.decoder.epsilon, stash_type=1)
    return graph.node("Reshape", f"{name}/Reshape_2", [made, graph.constant([0, 0, -1], torch.int64)])


def _mlp(here: Drawing, index: int, value: str) -> str:
    graph, module, name = here.graph, f"model.layers.{index}.mlp", f"/model/layers.{index}/mlp"
    gate = _linear(here, f"{module}.gate_proj", f"{name}/gate_proj", value)
    up = _linear(here, f"{module}.up_proj", f"{name}/up_proj", value)
    if here.decoder.activation == "silu":
        chance = graph.node("Sigmoid", f"{name}/act_fn/Sigmoid", [gate])
        active = graph.node("Mul", f"{name}/act_fn/Mul", [gate, chance])
    else:
        active = graph.node("Gelu", f"{name}/act_fn/Gelu", [gate], approximate="tanh")
    both = graph.node("Mul", f"{name}/Mul", [active, up])
    return _linear(here, f"{module}.down_proj", f"{name}/down_proj", both)


def _linear(here: Drawing, module: str, name: str, value: str) -> str:
    """value x weightᵀ + bias."""
    graph, source = here.graph, here.source
    tensor = here.stored(f"{module}.weight")
    linear = tensor.removesuffix(".weight")
    if linear in source.schemes:
        rows, columns = weights.shape_of(source, linear)
        part, form = weights.quantized(source, linear, f"{_initializer(name)}.MatMulNBits", here.dtype)
        made = graph.node("MatMulNBits", f"{name}/MatMulNBits", [value, *graph.part(part)], domain=MICROSOFT, N=rows,
                          K=columns, bits=form.bits, block_size=form.size, accuracy_level=here.accuracy_level)
    else:
        weight = graph.part(weights.plain(source, tensor, f"{_initializer(name)}.MatMul.weight", transposed=True))[0]
        made = graph.node("MatMul", f"{name}/MatMul", [value, _computed(here, weight, tensor, f"{name}/MatMul/Cast")])
    if not here.decoder.has(f"{module}.bias"):
        return made
    bias = weights.vector(source, here.stored(f"{module}.bias"), f"{_initializer(name)}.Add.bias", here.dtype)
    return graph.node("Add", f"{name}/Add", [made, *graph.part(bias)])


def _head(here: Drawing, value: str) -> None:
    """A tied head multiplies by the transposed embedding, which is stored once."""
    graph, tied = here.graph, here.decoder.skeleton.tied
    if "lm_head.weight" in tied:
        tensor = here.stored("model.embed_tokens.weight")
        table = _computed(here, "model.embed_tokens.weight", tensor, "/lm_head/Cast")
        made = graph.node("FusedMatMul", "/lm_head/MatMul", [value, table], domain=MICROSOFT, transB=1)
    else:
        made = _linear(here, "lm_head", "/lm_head", value)
    cap = here.decoder.logit_cap
    if cap is not None:
        size = graph.constant(cap, here.dtype)
        ratio = graph.node("Div", "/lm_head/softcap/Div", [made, size])
        made = graph.node("Mul", "/lm_head/softcap/Mul", [graph.node("Tanh", "/lm_head/softcap/Tanh", [ratio]), size])
    graph.nodes[-1].output[0] = "logits"  # whichever node was the last


def _computed(here: Drawing, value: str, tensor: str, name: str) -> str:
    """A value that has the dtype of a tensor of the source, in that of the graph."""
    if weights.kept_dtype(here.source, tensor) == here.dtype:
        return value
    return here.graph.cast(value, here.dtype, name)


def _initializer(name: str) -> str:
    """/model/layers.0/attn/q_proj -> model.layers.0.attn.q_proj"""
    return name.removeprefix("/").replace("/", ".")
