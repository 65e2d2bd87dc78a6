"""GGUF files, by the gguf package's own reader, dequantizers and table of names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qtool.independent.store import Reader

EXPERT = re.compile(r".*\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)")
STACKS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def linears(path: Path, names: Iterable[str]) -> dict[str, Reader]:
    """What gives the weight of each linear, float32 [N, K] in Hugging Face's order of rows. names: theirs."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def said(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = said("general.architecture")
    known = {text: one for one, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(known, said(f"{architecture}.block_count"))
    heads = said(f"{architecture}.attention.head_count")
    turned = {"q_proj": heads, "k_proj": said(f"{architecture}.attention.head_count_kv") or heads}
    found: dict[str, Reader] = {}
    for name in names:
        expert = EXPERT.fullmatch(name)
        where = (f"blk.{expert[1]}.ffn_{STACKS.get(expert[3], '?')}_exps.weight" if expert
                 else f"{table.get_name(name)}.weight")
        rows = turned.get(name.rpartition(".")[2]) if architecture == "llama" else None
        found[name] = (partial(_decoded, tensors[where], int(expert[2]) if expert else None, rows) if where in tensors
                       else f"the gguf package has no tensor for it ({where})")
    return found


def _decoded(tensor: Any, expert: int | None, heads: int | None) -> np.ndarray:
    """heads: of rotary pairs that lie side by side, llama.cpp's order, where Hugging Face has two halves."""
    import gguf

    data = tensor.data if expert is None else tensor.data[expert]
    values: np.ndarray = gguf.dequantize(data, tensor.tensor_type)
    if heads:
        values = values.reshape(heads, -1, 2, values.shape[-1]).transpose(0, 2, 1, 3).reshape(values.shape)
    return values
