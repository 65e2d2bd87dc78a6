"""GGUF files as a source: tensors dequantized one at a time under their Hugging Face names, config and tokenizer files.

The block layouts are the `gguf` package's, the config classes and the tokenizer transformers'.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from qtool.checkpoint.gguf_config import REMEDY, count
from qtool.checkpoint.gguf_config import values as config_values
from qtool.checkpoint.gguf_families import ARCHITECTURES, ROTARY, SPACE, Family, Part, map_tensors, stored_as
from qtool.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from qtool.checkpoint.header import AGAIN, read_json
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.tensor_io import read_into, sha256_files
from qtool.errors import CheckpointError, printable
from qtool.explained import Explained
from qtool.tensors import TensorSpec

DENSE = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
CHUNK_ELEMENTS = 1 << 22  # dequantized at a time; bounds the float32 temporaries
# Vocabularies (tokenizer.ggml.pre) in which each digit is a token of its own. transformers does not know them; the rule
# is llama.cpp's (src/llama-vocab.cpp).
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def open_gguf(path: Path, work_dir: Path | None = None, dtype: torch.dtype | None = None) -> Checkpoint:
    """Open a .gguf file; config.json and tokenizer files are written into work_dir. Raises CheckpointError.

    dtype: what tensors are read as; None: what the matrices are, or bfloat16 if they are quantized.
    """
    where = str(path)
    header = read_gguf_header(path)
    architecture = architecture_of(header, where)
    heads = count(header.metadata, f"{architecture}.attention.head_count", where)
    kv_heads = count(header.metadata, f"{architecture}.attention.head_count_kv", where, heads)
    refuse_undecodable(header, where)
    family = stored_as(architecture, header.tensors)
    parts = map_tensors(header.tensors, family, heads, kv_heads, where)
    dtype = dtype or dtype_of(header)
    temporary = None if work_dir is not None else tempfile.TemporaryDirectory(prefix="qtool-gguf-")
    folder = work_dir if work_dir is not None else Path(temporary.name) if temporary is not None else Path()
    folder.mkdir(parents=True, exist_ok=True)
    config = _write_config(path, header, family, dtype, folder)
    _write_tokenizer(path, header, folder)
    return Checkpoint(
        origin=where, name=path.stem, kind="gguf", config=config, directory=folder,
        specs={name: TensorSpec(name, dtype, part.shape) for name, part in parts.items()},
        fetch=lambda name, start, stop: _fetch(path, parts[name], dtype, start, stop),
        hash_files=lambda: sha256_files({path.name: path}),
        release=temporary.cleanup if temporary is not None else None,
        block_types={name: (part.tensor.kind.name.lower(), part.tensor.row_bytes * part.shape[0])
                     for name, part in parts.items()
                     if name.endswith(".weight") and len(part.shape) == 2 and part.tensor.kind not in DENSE},
        fetch_blocks=lambda name: _fetch_blocks(path, parts[name]),
    )


def architecture_of(header: GgufHeader, where: str) -> str:
    """The architecture, one of FAMILIES, of a file that holds a whole language model."""
    metadata = header.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model" or not header.tensors:
        raise CheckpointError(f"{where}: holds no model, but {printable(str(kind))}, and {len(header.tensors)} "
                              "tensors; give the file of the model itself")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{where}: is one of {metadata['split.count']} parts of a model; join them, with "
                              "llama.cpp's llama-gguf-split --merge FIRST-PART OUT.gguf")
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{where}: GGUF files of architecture '{printable(str(architecture))}' are not supported "
                              f"(supported: {', '.join(ARCHITECTURES)}); {REMEDY}")
    layers = count(metadata, f"{architecture}.block_count", where)
    if layers > len(header.tensors):
        raise CheckpointError(f"{where}: {architecture}.block_count is {layers}, but there are {len(header.tensors)} "
                              "tensors; download the file again")
    return str(architecture)


def refuse_undecodable(header: GgufHeader, where: str) -> None:
    """Raise CheckpointError for a type that the gguf package cannot decode."""
    seen: set[GGMLQuantizationType] = set()
    for tensor in header.tensors.values():
        if tensor.kind not in seen:
            seen.add(tensor.kind)
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.kind][1]), np.uint8), tensor.kind)
            except NotImplementedError:
                raise CheckpointError(f"{where}: tensor '{tensor.name}' has type {tensor.kind.name}, which gguf "
                                      f"cannot decode; {REMEDY}") from None


def dtype_of(header: GgufHeader) -> torch.dtype:
    """What tensors are read as: the element type of the matrices if none is quantized, else bfloat16."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return torch.float32
    return torch.float16 if kinds == {GGMLQuantizationType.F16} else torch.bfloat16


def _fetch(path: Path, part: Part, dtype: torch.dtype, start: int | None, stop: int | None) -> torch.Tensor:
    """The tensor, or its rows start .. stop. Rows in a changed order need all rows."""
    vector = len(part.shape) == 1
    rows = 1 if vector else part.shape[0]
    whole = start is None or stop is None or vector or part.heads > 0
    first, last = (0, rows) if whole or start is None or stop is None else (start, stop)
    tensor = _decode(path, part, dtype, part.start + first, last - first)
    if part.heads:
        tensor = _unpermute(tensor.reshape(part.shape), part.heads)
    if whole:
        tensor = tensor.reshape(part.shape)
        return tensor if start is None else tensor[start:stop].clone()
    return tensor


def _decode(path: Path, part: Part, dtype: torch.dtype, first: int, rows: int) -> torch.Tensor:
    """Dequantize `rows` rows to [rows, K] in chunks; float32 inside, then rounded to `dtype`."""
    tensor, columns = part.tensor, part.shape[-1]
    result = torch.empty((rows, columns), dtype=dtype)
    step = max(1, CHUNK_ELEMENTS // columns)
    with opened(path, tensor) as descriptor:
        for begin in range(0, rows, step):
            blocks = read_blocks(descriptor, tensor, first + begin, min(step, rows - begin))
            with np.errstate(all="ignore"):  # a scale that is inf or NaN is the caller's to judge
                values = torch.from_numpy(gguf.dequantize(blocks, tensor.kind))
            result[begin:begin + len(values)] = values - part.offset if part.offset else values
    return result


def _fetch_blocks(path: Path, part: Part) -> torch.Tensor:
    """The blocks of a matrix, uint8 [rows, bytes of a row], rows in the order of `_fetch`."""
    with opened(path, part.tensor) as descriptor:
        blocks = torch.from_numpy(read_blocks(descriptor, part.tensor, part.start, part.shape[0]))
    return _unpermute(blocks, part.heads) if part.heads else blocks


@contextmanager
def opened(path: Path, tensor: GgufTensor) -> Iterator[int]:
    """A descriptor of the file; what goes wrong with it is a CheckpointError that names the tensor."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{path}: tensor '{tensor.name}' cannot be read: {error}; {AGAIN}") from None


def read_blocks(descriptor: int, tensor: GgufTensor, first: int, count: int) -> np.ndarray:
    """The blocks of some rows, uint8 [count, bytes of a row]."""
    blocks = np.empty((count, tensor.row_bytes), np.uint8)
    if not read_into(descriptor, blocks.reshape(-1).data, tensor.offset + first * tensor.row_bytes):
        raise EOFError("the file became shorter")
    return blocks


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """From interleaved rotary pairs, llama.cpp's row order, back to two halves per head: [rows] or [rows, K]."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(tensor.shape).contiguous()


def _write_config(path: Path, header: GgufHeader, family: Family, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Write config.json and return it."""
    from transformers import AutoConfig

    divisors = {name: _fetch(path, Part(header.tensors[name], header.tensors[name].shape), torch.float32, None, None)
                for name in ROTARY if name in header.tensors}
    values = config_values(header.metadata, header.tensors, family, divisors, str(path))
    with Explained(path, "the metadata make no usable config", REMEDY):
        AutoConfig.for_model(family.model_type, architectures=[family.model_class], dtype=dtype, **values) \
            .save_pretrained(folder)
    return read_json(folder / "config.json")


def _write_tokenizer(path: Path, header: GgufHeader, folder: Path) -> None:
    """Write the tokenizer files; none for a file without vocabulary."""
    if "tokenizer.ggml.tokens" not in header.metadata:
        return
    check_vocabulary(header.metadata, str(path))
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer would parse the file again, slowly, for its config

    with tempfile.TemporaryDirectory(prefix="qtool-gguf-") as empty:  # where nothing but the file can be picked up
        link = Path(empty) / "model.gguf"
        link.symlink_to(path.resolve())
        with Explained(path, "the metadata make no usable tokenizer", REMEDY):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(empty, gguf_file=link.name)
            _split_as_llama_cpp(tokenizer, header.metadata)
            tokenizer.save_pretrained(folder)
            _drop_added(folder / "tokenizer.json", len(header.metadata["tokenizer.ggml.tokens"]))


def _split_as_llama_cpp(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Rules of llama.cpp that transformers does not follow: digits; the space before SentencePiece texts."""
    from tokenizers import normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.pre") in DIGITS_APART:
        backend.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    if metadata.get("tokenizer.ggml.model") == "llama":
        replace = normalizers.Replace(" ", SPACE)
        before = metadata.get("tokenizer.ggml.add_space_prefix", True)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if before else replace
        backend.pre_tokenizer = None


def _drop_added(path: Path, count: int) -> None:
    """transformers adds an <|endoftext|> of its own where the file has none; the embedding has no row for it."""
    content = read_json(path)
    kept = [entry for entry in content["added_tokens"] if entry["id"] < count]
    if len(kept) < len(content["added_tokens"]):
        path.write_text(json.dumps({**content, "added_tokens": kept}, ensure_ascii=False), encoding="utf-8")


def check_vocabulary(metadata: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError. The tokenizers library ends in errors of no class, or in a panic, for what is refused
    here."""
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.merges", [])
    if not _texts(tokens) or not _texts(merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens or .merges is not a list of texts; {REMEDY}")
    known = set(tokens)
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or " " in right or left not in known or right not in known or left + right not in known:
            raise CheckpointError(f"{where}: merge '{printable(merge)}' does not join two tokens to a third; {REMEDY}")
    for name in ("bos", "eos", "unknown", "padding"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            raise CheckpointError(f"{where}: tokenizer.ggml.{name}_token_id is {number!r}, and there are {len(tokens)} "
                                  f"tokens; {REMEDY}")
    for name in ("scores", "token_type"):
        values = metadata.get(f"tokenizer.ggml.{name}")
        if values is not None and (not isinstance(values, list) or len(values) != len(tokens) or _texts(values)):
            raise CheckpointError(f"{where}: tokenizer.ggml.{name} does not give one number per token; {REMEDY}")


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
