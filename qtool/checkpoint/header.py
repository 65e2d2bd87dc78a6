"""Strict reading of the two kinds of text in a checkpoint: JSON files and the headers of safetensors files.

Nothing that a file says about itself is believed before it has been compared with the size of the file.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointError, printable
from qtool.files import open_regular, read_limited
from qtool.tensors import DTYPE_NAMES, TensorSpec

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
MAX_JSON_BYTES = 64 << 20
MAX_DIMENSIONS = 64  # PyTorch's own limit
AGAIN = "download the file again"

Placed = dict[str, tuple[TensorSpec, int]]  # tensor name -> what it is, and where in the file its bytes begin


def read_header(path: Path) -> Placed:
    """The tensors of a safetensors file with their absolute byte offsets, in the order of the data.

    Raises CheckpointError naming the file and the tensor.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), size, str(path))
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file does not exist; {AGAIN}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) < length:
        raise CheckpointError(f"{path}: became shorter while it was read; {AGAIN}")
    return parse_header(text, size, str(path))


def header_length(prefix: bytes, size: int, where: str) -> int:
    """The length of the JSON header that the first eight bytes of a file of `size` bytes announce."""
    if size == 0:
        raise CheckpointError(f"{where}: the file is empty; {AGAIN}")
    if len(prefix) < 8:
        raise CheckpointError(f"{where}: {size} bytes are too few for a safetensors file; {AGAIN}")
    if prefix.startswith(b"version "):
        raise CheckpointError(f"{where}: this is a Git LFS pointer, not the weights; fetch them with git lfs pull")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: announces a header of {length} bytes (limit {MAX_HEADER_BYTES}); this is no "
                              f"safetensors file, or it is damaged; {AGAIN}")
    if 8 + length > size:
        raise CheckpointError(f"{where}: truncated inside its header (needs {8 + length} bytes, has {size}); {AGAIN}")
    return int(length)


def parse_header(text: bytes, size: int, where: str) -> Placed:
    """Check the JSON `text` that follows the first eight bytes of a safetensors file of `size` bytes."""
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where}: the header does not begin with '{{'; this is no safetensors file, or it is "
                              f"damaged; {AGAIN}")
    entries = parse_json(text, f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is not a map from text to text; {AGAIN}")
    begin = 8 + len(text)
    placed = check_entries(entries, size - begin, where)
    return {name: (spec, begin + offset) for name, (spec, offset) in placed.items()}


def check_entries(entries: Mapping[str, Any], size: int, where: str) -> Placed:
    """Tensor name -> its dtype, shape and data_offsets, as decoded from a header whose data takes `size` bytes."""
    found = [(*_entry(name, entry, where), name) for name, entry in entries.items()]
    _check_contiguous(((start, stop, name) for _, start, stop, name in found), size, where)
    found.sort(key=lambda item: item[1:])
    return {name: (spec, start) for spec, start, _, name in found}


def _entry(name: str, entry: Any, where: str) -> tuple[TensorSpec, int, int]:
    place = f"{where}: tensor '{printable(name)}'"
    if not name or printable(name) != name:
        raise CheckpointError(f"{place} has an empty name or one with control characters; {AGAIN}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{place} is not described by exactly dtype, shape and data_offsets; {AGAIN}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{place} has the unknown dtype {printable(str(dtype))}; known: {', '.join(DTYPE_NAMES)}")
    shape = entry["shape"]
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{place} has no valid shape: at most {MAX_DIMENSIONS} sizes below 2^63; {AGAIN}")
    offsets = entry["data_offsets"]
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{place} has no valid data_offsets (begin, end); {AGAIN}")
    if math.prod(max(1, extent) for extent in shape) * 8 >= 1 << 63:
        raise CheckpointError(f"{place}: shape {shape} overflows 63 bits; {AGAIN}")
    spec = TensorSpec(name, DTYPE_NAMES[dtype], tuple(shape))
    if spec.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(f"{place}: {dtype} {shape} takes {spec.nbytes} bytes, but data_offsets {offsets} hold "
                              f"{offsets[1] - offsets[0]}; {AGAIN}")
    return spec, offsets[0], offsets[1]


def _check_contiguous(spans: Iterable[tuple[int, int, str]], size: int, where: str) -> None:
    """The spans must cover the data of `size` bytes without gap, overlap or rest, as the safetensors library says."""
    end, before = 0, ""
    for start, stop, name in sorted(spans):
        if start < end:
            raise CheckpointError(f"{where}: tensors '{before}' and '{name}' overlap; {AGAIN}")
        if start > end:
            raise CheckpointError(f"{where}: {start - end} bytes before tensor '{name}' belong to no tensor; {AGAIN}")
        if stop > size:
            raise CheckpointError(f"{where}: truncated: tensor '{name}' ends at byte {stop} of the data, but the file "
                                  f"holds {size}; {AGAIN}")
        end, before = stop, name
    if end < size:
        raise CheckpointError(f"{where}: {size - end} bytes after the last tensor belong to no tensor; {AGAIN}")


def _naturals(value: Any) -> bool:
    """A list of integers 0 .. 2^63 - 1 (bool is an int to Python, but not here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises CheckpointError."""
    try:
        text = read_limited(path, limit)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {AGAIN}") from None
    value = parse_json(text, str(path))
    try:
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: holds half of a character (a surrogate such as \\ud800); {AGAIN}") from None
    return value


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, however hostile the text. Raises CheckpointError."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise CheckpointError(f"{where}: key '{printable(twice)}' is given twice; {AGAIN}")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply to be a real one; {AGAIN}") from None
    except ValueError as error:  # also UnicodeDecodeError, and integers of more than 4300 digits
        raise CheckpointError(f"{where}: not valid JSON: {printable(str(error))}; {AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: not a JSON object, but a {type(value).__name__}; {AGAIN}")
    return value
