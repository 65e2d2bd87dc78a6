"""The facts of a decoder that a graph in another framework needs: sizes, norms, attention, rotary caches.

They are taken from transformers' own modules and config, so their defaults are those of transformers. A family is
listed here when its blocks have one of the two layouts below and nothing else in them computes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool.errors import ModelError
from qtool.models import skeleton
from qtool.models.skeleton import Skeleton
from qtool.tensors import TensorSpec

# Model types with input_layernorm -> attention -> add -> post_attention_layernorm -> MLP -> add ...
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma")
# ... and those with a norm before and after both attention and the MLP.
SANDWICH = ("gemma2", "gemma3_text")
FAMILIES = (*PLAIN, *SANDWICH)
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length of the input
ROWS = 4096  # positions computed at once


@dataclass(frozen=True)
class Decoder:
    """A decoder whose tensors are called model.layers.I.self_attn.q_proj and so on.

    windows: of each block, how many positions (itself among them) a token sees; None: all before it.
    scaling: of the products of queries and keys.  attention_cap, logit_cap: s tanh(x / s), None: not used.
    norm_offset: added to the weights of norms.  embedding_scale: factor of the embeddings.
    rope_kinds: of each block, which of its rotary caches it uses.
    """

    skeleton: Skeleton
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float
    activation: str
    windows: tuple[int | None, ...]
    scaling: float
    attention_cap: float | None
    logit_cap: float | None
    norm_offset: float
    embedding_scale: float | None
    rope_kinds: tuple[str, ...]

    @property
    def sandwich(self) -> bool:
        return self.skeleton.model_type in SANDWICH

    def has(self, parameter: str) -> bool:
        return parameter in self.skeleton.parameters


def describe(directory: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Decoder:
    """Raises ModelError for a family that is not listed, or a detail of it that has no place in Decoder."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{directory}: no decoder graph is known for model type '{family}'; known: "
                         f"{', '.join(FAMILIES)}")
    bones = skeleton.build(directory, config, specs)
    model: Any = bones.model
    settings, attention = model.config, [model.get_submodule(name).self_attn for name in bones.blocks]
    heads, head_size = settings.num_attention_heads, attention[0].head_dim
    gemma = family.startswith("gemma")
    _refuse_rope(directory, settings)
    if getattr(settings, "use_bidirectional_attention", False):
        raise ModelError(f"{directory}/config.json: use_bidirectional_attention has no place in the decoder graph")
    return Decoder(
        skeleton=bones, layers=len(bones.blocks), hidden=bones.hidden, heads=heads,
        key_heads=settings.num_key_value_heads, head_size=head_size, vocabulary=bones.vocabulary,
        positions=settings.max_position_embeddings, epsilon=settings.rms_norm_eps,
        activation=_activation(directory, settings),
        windows=tuple(settings.sliding_window if family == "mistral" else getattr(one, "sliding_window", None)
                      for one in attention),
        scaling=attention[0].scaling, attention_cap=getattr(attention[0], "attn_logit_softcapping", None),
        logit_cap=getattr(settings, "final_logit_softcapping", None) if gemma else None,
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=bones.hidden**0.5 if gemma else None,
        rope_kinds=tuple(settings.layer_types) if family == "gemma3_text" else ("",) * len(bones.blocks))


def rotary_caches(decoder: Decoder, kind: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 [positions, head_size / 2], as transformers computes them in float32.

    kind: an entry of rope_kinds.
    """
    meta: Any = decoder.skeleton.model.model.rotary_emb  # type: ignore[union-attr]
    rotary = type(meta)(meta.config)  # frequencies on the CPU
    parts = []
    for start in range(0, decoder.positions, ROWS):
        place = torch.arange(start, min(start + ROWS, decoder.positions))[None]
        pair = rotary(torch.empty(0), place, *([kind] if kind else []))
        parts.append([one[0, :, :decoder.head_size // 2] for one in pair])
    cos, sin = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return cos.contiguous(), sin.contiguous()


def _activation(directory: Path, settings: Any) -> str:
    name = getattr(settings, "hidden_activation", None) or getattr(settings, "hidden_act", None)
    if name not in ("silu", "gelu_pytorch_tanh"):
        raise ModelError(f"{directory}/config.json: activation {name!r} is not among those of the decoder graph (silu, "
                         "gelu_pytorch_tanh)")
    return str(name)


def _refuse_rope(directory: Path, settings: Any) -> None:
    given = settings.rope_parameters
    by_kind = [given] if "rope_type" in given else list(given.values())
    for one in by_kind:
        if one["rope_type"] not in FIXED_ROPE:
            raise ModelError(f"{directory}/config.json: rope type '{one['rope_type']}' changes with the length of the "
                             f"input, which the decoder graph does not do; it does {', '.join(FIXED_ROPE)}")
        if one.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{directory}/config.json: partial_rotary_factor {one['partial_rotary_factor']} has no "
                             "place in the decoder graph; only whole heads are rotated")
