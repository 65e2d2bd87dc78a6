"""Whether llama.cpp would load a GGUF file: names, keys, sizes and types, from its own tables and checks.

Source: llama.cpp src/llama-model.cpp and src/llama-vocab.cpp; the tables of the gguf package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header

SIZES = ("block_count", "context_length", "embedding_length", "attention.head_count", "feed_forward_length")
VOCABULARY = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
TOKENS = ("bos", "eos", "unknown", "padding")


def faults(path: Path) -> list[str]:
    """One sentence for each. Raises CheckpointError for a header that cannot be read."""
    from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    header = read_gguf_header(path)
    name = header.metadata.get("general.architecture")
    architecture = next((one for one, text in MODEL_ARCH_NAMES.items() if text == name), None)
    if architecture is None:
        return [f"general.architecture is {name!r}, which llama.cpp does not know"]
    wanted = [*(f"{name}.{key}" for key in SIZES), *VOCABULARY]
    problems = [f"the key {key} is missing" for key in wanted if key not in header.metadata]
    patterns = [re.escape(TENSOR_NAMES[one]).replace(r"\{bid\}", r"\d+") for one in MODEL_TENSORS[architecture]]
    known = re.compile(f"(?:{'|'.join(patterns)})(?:\\.(?:weight|bias))?")
    problems += [f"{tensor}: llama.cpp knows no such tensor of {name}" for tensor in header.tensors
                 if not known.fullmatch(tensor)]
    return problems or [*_sizes(header, str(name)), *_blocks(header, str(name)), *_types(header.tensors),
                        *_vocabulary(header)]


def _sizes(header: GgufHeader, name: str) -> Iterator[str]:
    """Shapes that the keys give."""
    said, tensors = header.metadata, header.tensors
    if any(type(said[f"{name}.{key}"]) is not int for key in SIZES):
        return  # one for each layer, in some families
    width, inner = said[f"{name}.embedding_length"], said[f"{name}.feed_forward_length"]
    wanted: dict[str, tuple[str, int, int]] = {
        "token_embd.weight": ("embedding_length", 1, width), "output_norm.weight": ("embedding_length", 0, width),
        "output.weight": ("embedding_length", 1, width), "blk.0.attn_norm.weight": ("embedding_length", 0, width),
        "blk.0.ffn_down.weight": ("feed_forward_length", 1, inner),
    }
    head = said.get(f"{name}.attention.key_length", width // max(said[f"{name}.attention.head_count"], 1))
    wanted["blk.0.attn_q.weight"] = ("attention.head_count", 0, head * said[f"{name}.attention.head_count"])
    for tensor, (key, axis, size) in wanted.items():
        shape = tensors[tensor].shape if tensor in tensors else None
        if shape is not None and (axis >= len(shape) or shape[axis] != size):
            yield f"{tensor} is {list(shape)}, but by {name}.{key} it has {size} on side {axis}"


def _blocks(header: GgufHeader, name: str) -> Iterator[str]:
    """Every block has the tensors of the first in the same shapes, and there are as many as the key says."""
    said, blocks = header.metadata[f"{name}.block_count"], dict[int, dict[str, tuple[int, ...]]]()
    for tensor, one in header.tensors.items():
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", tensor):
            blocks.setdefault(int(match[1]), {})[match[2]] = one.shape
    if sorted(blocks) != list(range(said)):
        yield f"{name}.block_count is {said}, but the file has tensors of {len(blocks)} blocks"
        return
    for index, own in blocks.items():
        if different := sorted({*own.items()} ^ {*blocks[0].items()}):
            yield f"blk.{index}.{different[0][0]}: blocks 0 and {index} do not have the same tensors in the same shapes"


def _types(tensors: Mapping[str, GgufTensor]) -> Iterator[str]:
    for name, one in tensors.items():
        if len(one.shape) == 1 and one.kind.name != "F32":
            yield f"{name} is {one.kind.name}; vectors are F32, others make llama.cpp stop"
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in tensors:
            yield f"{name} is missing"


def _vocabulary(header: GgufHeader) -> Iterator[str]:
    said: Mapping[str, Any] = header.metadata
    tokens, rows = said["tokenizer.ggml.tokens"], header.tensors["token_embd.weight"].shape[0] \
        if "token_embd.weight" in header.tensors else None
    if not isinstance(tokens, list):
        yield "tokenizer.ggml.tokens is no list"
        return
    if rows is not None and len(tokens) != rows:
        yield f"there are {len(tokens)} tokens and {rows} rows of token_embd.weight"
    if len(set(tokens)) != len(tokens):
        yield "a token is there twice"
    for key in PER_TOKEN:
        if key in said and len(said[key]) != len(tokens):
            yield f"{key} has {len(said[key])} entries for {len(tokens)} tokens"
    for name in TOKENS:
        number = said.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            yield f"tokenizer.ggml.{name}_token_id is {number}, and there are {len(tokens)} tokens"
