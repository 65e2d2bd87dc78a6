"""Which GGUF type each tensor gets under a name such as q4_k_m: llama.cpp's mixtures, so that a name means the same.

Source: llama.cpp src/llama-quant.cpp (formats.md 6.4). Types for blocks of 256 fall back where a row does not divide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# mixture -> (general.file_type, the type of most tensors)
MIXTURES = {
    "q4_0": (2, "q4_0"), "q4_1": (3, "q4_1"), "q8_0": (7, "q8_0"), "q5_0": (8, "q5_0"), "q5_1": (9, "q5_1"),
    "q2_k": (10, "q2_k"), "q3_k_s": (11, "q3_k"), "q3_k_m": (12, "q3_k"), "q3_k_l": (13, "q3_k"),
    "q4_k_s": (14, "q4_k"), "q4_k_m": (15, "q4_k"), "q5_k_s": (16, "q5_k"), "q5_k_m": (17, "q5_k"),
    "q6_k": (18, "q6_k"), "iq4_nl": (25, "iq4_nl"), "iq4_xs": (30, "iq4_xs"), "tq1_0": (36, "tq1_0"),
    "tq2_0": (37, "tq2_0"),
}
# where a row is no multiple of 256; all the others have blocks of 32
FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
             "tq1_0": "q4_0", "tq2_0": "q4_0"}
ROLES = {  # the last part of a linear's name -> what llama.cpp calls the tensor
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "gate_up_proj": "ffn_up", "down_proj": "ffn_down",
    "w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down",
}
OUTPUT, EMBEDDING = "output", "token_embd"
EIGHT_EXPERTS_Q5 = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")  # attn_output there


@dataclass(frozen=True)
class Shape:
    """What of a model the rules look at. calibrated: with statistics of the inputs, as with an importance matrix."""

    layers: int
    heads: int
    kv_heads: int
    experts: int
    calibrated: bool


def role_of(linear: str) -> str:
    """The role of a linear by its name; feed-forward names of other kinds count as ffn_up."""
    return ROLES.get(re.split(r"\.", linear)[-1], "ffn_up")


def choose(mixture: str, role: str, layer: int, columns: int, model: Shape) -> str | None:
    """The type of a tensor with rows of `columns`; None: no type fits, it stays dense. layer: of the block, from 0."""
    default = MIXTURES[mixture][1]
    if role == OUTPUT:
        found = "q8_0" if default == "q8_0" or columns % (256 if default in FALLBACKS else 32) else "q6_k"
    elif role == EMBEDDING:
        found = "q4_k" if default.startswith("tq") else default
    else:
        found = _in_block(mixture, default, role, layer, model)
    if columns % 256:
        found = FALLBACKS.get(found, found)
    return None if columns % 32 else found


def _in_block(mixture: str, default: str, role: str, layer: int, model: Shape) -> str:
    if role == "attn_v":
        return _values(mixture, default, layer, model)
    if role == "attn_k" and model.experts == 8:
        return "q8_0"
    if role == "ffn_down":
        return _down(mixture, default, layer, model)
    if role == "attn_output":
        if model.experts == 8 and mixture in EIGHT_EXPERTS_Q5:
            return "q5_k"
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mixture, default)
    return default


def _values(mixture: str, default: str, layer: int, model: Shape) -> str:
    if model.experts == 8:
        return "q8_0"
    grouped = model.heads // max(model.kv_heads, 1) >= 4
    found = {
        "q2_k": "q4_k" if grouped else "q3_k", "q3_k_m": "q5_k" if layer < 2 else "q4_k", "q3_k_l": "q5_k",
        "q4_k_s": "q5_k" if layer < 4 else "q4_k", "iq4_nl": "q5_k" if grouped else default,
        "iq4_xs": "q5_k" if grouped else default,
    }.get(mixture, default)
    if mixture in ("q4_k_m", "q5_k_m") and more(layer, model.layers):
        found = "q6_k"
    if model.layers == 80 and model.heads != model.kv_heads and found in ("q3_k", "q4_k"):  # of 70B models
        found = "q5_k"
    return found


def _down(mixture: str, default: str, layer: int, model: Shape) -> str:
    early = layer < model.layers // 8
    if mixture in ("q4_k_m", "q5_k_m"):
        return "q6_k" if more(layer, model.layers) else default
    if mixture in ("q4_0", "q5_0"):
        return {"q4_0": "q4_1", "q5_0": "q5_1"}[mixture] if early and model.calibrated else default
    if mixture in ("iq4_nl", "iq4_xs"):
        return "q5_k" if early and not model.calibrated else default
    return {"q2_k": "q3_k", "q3_k_m": "q5_k" if layer < model.layers // 16 else "q4_k", "q3_k_l": "q5_k",
            "q4_k_s": "q5_k" if early else default}.get(mixture, default)


def more(layer: int, layers: int) -> bool:
    """The layers that get more bits: the first and last eighth, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
