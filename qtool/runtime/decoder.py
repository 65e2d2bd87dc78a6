"""Llama-like decoders with one native op per block and token, over caches of keys and values that are made beforehand.

It computes in float32 what the transformers module that `load` gives computes; what a family computes is taken from
transformers' modules and config (models/decoder.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qtool.decode import Source
from qtool.models import decoder as families
from qtool.ops.blocks import DecoderBlock
from qtool.ops.checks_packed import PRODUCTS
from qtool.ops.packed import PackedWeight, multiply_packed
from qtool.runtime.linear import PackedLinear
from qtool.runtime.load import fill

EMPTY = torch.empty(0)


class Decoder:
    """One sequence at a time. capacity: positions that it has room for.

    rounded: the inputs of all linears in blocks are rounded to 8 bits, as llama.cpp does; faster for 4-bit integers.
    """

    def __init__(self, model: nn.Module, facts: families.Decoder, capacity: int, rounded: bool = False) -> None:
        core: Any = model.model
        self.capacity, self.epsilon, self.length = capacity, facts.epsilon, 0
        shape = (facts.key_heads, capacity, facts.head_size)
        self.blocks = [DecoderBlock(*_parts(layer), torch.zeros(shape), torch.zeros(shape), window or capacity,
                                    facts.epsilon, facts.scaling, rounded)
                       for layer, window in zip(core.layers, facts.windows, strict=True)]
        self.cos, self.sin = families.rotary_caches(replace(facts, positions=capacity))
        self.embedding, self.norm, self.head = core.embed_tokens.weight, core.norm.weight, _weight(model.lm_head)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits [V], float32, after the next tokens: ids int64 [T], T from 1."""
        start, stop = self.length, self.length + len(ids)
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens do not fit into a cache of {self.capacity}")
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        hidden = self.embedding[ids].float()
        for block in self.blocks:
            hidden = block(hidden, cos, sin, start)
        self.length = stop
        last = torch.nn.functional.rms_norm(hidden[-1:], self.norm.shape, self.norm, self.epsilon)
        return multiply_packed(last, self.head)[0]

    @torch.inference_mode()
    def generate(self, ids: torch.Tensor, count: int, stop: Sequence[int] = ()) -> torch.Tensor:
        """`count` tokens, fewer if one of `stop` comes, each the most likely one after those before it; int64."""
        made: list[int] = []
        self.length, step = 0, ids
        while len(made) < count:
            made.append(int(self.step(step).argmax()))
            if made[-1] in stop:
                break
            step = torch.tensor(made[-1:])
        return torch.tensor(made)


def open_decoder(source: Source, capacity: int, rounded: bool = False) -> tuple[Decoder | None, str]:
    """A decoder of a checkpoint on the CPU, or None and why there is none. Raises ModelError as `load` does."""
    family = source.config.get("model_type")
    if family not in families.FAMILIES:
        return None, f"no native step is known for model type '{family}'"
    facts = families.describe(source.directory, source.config, source.specs)
    reason = _unlike(facts)
    if reason is None:
        model = fill(facts.skeleton, source, torch.device("cpu"))
        reason = _unusable(model)
        if reason is None:
            return Decoder(model, facts, capacity, rounded), ""
    return None, reason


def _unlike(facts: families.Decoder) -> str | None:
    """What in a family the native step does not compute, or None."""
    sizes = (facts.hidden, facts.heads * facts.head_size, facts.head_size)
    unlike = {
        "norms around both parts": facts.sandwich, "capped scores": facts.attention_cap is not None,
        "capped logits": facts.logit_cap is not None, "offsets of norms": facts.norm_offset != 0.0,
        "scaled embeddings": facts.embedding_scale is not None, facts.activation: facts.activation != "silu",
        "several rotary caches": len(set(facts.rope_kinds)) > 1, "odd sizes": any(size % 8 for size in sizes),
    }
    return next((f"the native step has no {what}" for what, there in unlike.items() if there), None)


def _unusable(model: nn.Module) -> str | None:
    linears = [module for name, module in model.named_modules() if name.rpartition(".")[2] in (*PRODUCTS, "lm_head")]
    if not all(isinstance(module, PackedLinear) and not module.rounds for module in linears):
        return "its linears round their inputs"
    if any(module.in_features % 8 for module in linears):
        return "the native step has no odd sizes"
    return None


def _parts(layer: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention if name in PRODUCTS[:4] else mlp, name) for name in PRODUCTS]
    norms = [layer.input_layernorm, getattr(attention, "q_norm", None), getattr(attention, "k_norm", None),
             layer.post_attention_layernorm]
    weights = [EMPTY if norm is None else norm.weight.float() for norm in norms]
    layout: list[int] = []
    for linear in linears:
        weight = _weight(linear)
        weights += [*weight.tensors, EMPTY if linear.bias is None else linear.bias]
        layout += [weight.kind, weight.group, weight.rows]
    return tuple(weights), tuple(layout)


def _weight(linear: Any) -> PackedWeight:
    weight: PackedWeight = linear.weight
    return weight
