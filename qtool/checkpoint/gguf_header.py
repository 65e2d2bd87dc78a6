"""Reads the metadata and the tensor table of a GGUF file, and checks all of it against the size of the file.

The readers of `gguf` and `transformers` believe the counts that a file states; a hostile one makes them loop or
allocate without end. They are only given a file that passed here. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qtool.checkpoint.header import AGAIN
from qtool.errors import CheckpointError, printable
from qtool.files import open_regular

MAX_METADATA_BYTES = 256 << 20
MAX_ITEMS = 8_000_000  # array items of all keys together; the largest vocabularies have 0.3 million tokens
MAX_DIMENSIONS = 4
WINDOW_BYTES = 1 << 20
MAX_NAME = 1024
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Shape as PyTorch has it (rows last in the file come first here); offset: absolute, in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """metadata: key -> number, bool, text, or list of them.  tensors: by name, in the order of the file.

    entries: key -> (first byte, end) of key, type and value in the file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    entries: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError naming the file and the key or tensor."""
    try:
        with open_regular(path) as file:
            cursor = _Cursor(file, os.fstat(file.fileno()).st_size, str(path))
            return _parse(cursor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(cursor: _Cursor) -> GgufHeader:
    where = cursor.where
    if cursor.size == 0:
        raise CheckpointError(f"{where}: the file is empty; {AGAIN}")
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        raise CheckpointError(f"{where}: begins with {magic!r}, not with GGUF; no GGUF file, or a damaged one; {AGAIN}")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        raise CheckpointError(f"{where}: GGUF version {version}, possibly big-endian; only little-endian versions "
                              f"{' and '.join(map(str, VERSIONS))} are supported; convert the file with llama.cpp")
    tensors, keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    cursor.afford(tensors, 24, "tensors")
    cursor.afford(keys, 13, "keys")
    metadata: dict[str, Any] = {}
    entries: dict[str, tuple[int, int]] = {}
    for index in range(keys):
        begin = cursor.position
        key = cursor.text(f"key {index}", MAX_NAME)
        if key in metadata:
            raise CheckpointError(f"{where}: key '{printable(key)}' is given twice; {AGAIN}")
        metadata[key] = cursor.value(cursor.number("I", f"the type of key '{printable(key)}'"), key)
        entries[key] = begin, cursor.position
    table = [_tensor(cursor, index) for index in range(tensors)]
    return GgufHeader(metadata, _placed(table, metadata, cursor), entries)


def _tensor(cursor: _Cursor, index: int) -> GgufTensor:
    """One row of the tensor table; its offset is still relative to the data."""
    name = cursor.text(f"the name of tensor {index}", MAX_NAME)
    place = f"{cursor.where}: tensor '{printable(name)}'"
    dimensions = cursor.number("I", f"the rank of tensor {index}")
    if not 1 <= dimensions <= MAX_DIMENSIONS or not name or printable(name) != name:
        raise CheckpointError(f"{place} has {dimensions} dimensions or an unusable name; {AGAIN}")
    sizes = [cursor.number("Q", f"the shape of tensor {index}") for _ in range(dimensions)]
    number = cursor.number("I", f"the type of tensor {index}")
    offset = cursor.number("Q", f"the offset of tensor {index}")
    if number not in GGMLQuantizationType.__members__.values():
        raise CheckpointError(f"{place} has the unknown type {number}; a newer gguf package may know it")
    kind = GGMLQuantizationType(number)
    if 0 in sizes or math.prod(sizes) * 8 >= 1 << 63 or offset >= 1 << 63:
        raise CheckpointError(f"{place}: shape {sizes[::-1]} is empty or overflows; {AGAIN}")
    block = GGML_QUANT_SIZES[kind][0]
    if sizes[0] % block:
        raise CheckpointError(f"{place}: rows of {sizes[0]} do not divide into {kind.name} blocks of {block}; {AGAIN}")
    return GgufTensor(name, tuple(reversed(sizes)), kind, offset)


def _placed(table: list[GgufTensor], metadata: dict[str, Any], cursor: _Cursor) -> dict[str, GgufTensor]:
    """Turn offsets into absolute ones; every tensor lies in the file, none over another."""
    where = cursor.where
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{where}: general.alignment is {printable(str(alignment))}, not a power of two; {AGAIN}")
    begin = -(-cursor.position // alignment) * alignment
    placed: dict[str, GgufTensor] = {}
    for tensor in table:
        if tensor.name in placed:
            raise CheckpointError(f"{where}: tensor '{tensor.name}' is given twice; {AGAIN}")
        if tensor.offset % alignment:
            raise CheckpointError(f"{where}: tensor '{tensor.name}' begins at {tensor.offset}, which is no multiple of "
                                  f"{alignment}; {AGAIN}")
        placed[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.kind, begin + tensor.offset)
    end, before = begin, ""
    for tensor in sorted(placed.values(), key=lambda one: one.offset):
        if tensor.offset < end:
            raise CheckpointError(f"{where}: tensors '{before}' and '{tensor.name}' overlap; {AGAIN}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > cursor.size:
            raise CheckpointError(f"{where}: truncated: tensor '{tensor.name}' ends at byte {end}, the file has "
                                  f"{cursor.size}; {AGAIN}")
    return placed


class _Cursor:
    """Takes values off the front of the file, never more than it holds."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self.file, self.size, self.where = file, size, where
        self.position = self.items = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise CheckpointError(f"{self.where}: truncated inside {what}: {count} bytes at byte {self.position}, the "
                                  f"file has {self.size}; {AGAIN}")
        if self.position + count > MAX_METADATA_BYTES:
            raise CheckpointError(f"{self.where}: more than {MAX_METADATA_BYTES >> 20} MiB of metadata; no real model")
        self.position += count
        return self.file.read(count)

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, limit: int = MAX_METADATA_BYTES) -> str:
        length = self.number("Q", what)
        if length > limit:
            raise CheckpointError(f"{self.where}: {what} announces {length} bytes; {AGAIN}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.where}: {what} is not UTF-8 text; {AGAIN}") from None

    def texts(self, count: int, what: str) -> list[str]:
        """So many texts one after the other: what `text` gives for each, without a call for each of 100,000."""
        made: list[str] = []
        while len(made) < count:
            window, at = self.file.read(WINDOW_BYTES), 0
            try:
                while len(made) < count:
                    end = at + 8 + int.from_bytes(window[at:at + 8], "little")
                    if end > len(window):
                        break
                    made.append(window[at + 8:end].decode())
                    at = end
            except UnicodeDecodeError:
                pass
            self.position += at
            self.file.seek(self.position)
            if len(made) < count:
                made.append(self.text(what))  # at the end of the window; or it says what is wrong
        return made

    def afford(self, count: int, each: int, what: str) -> None:
        """Refuse a count whose items, of at least `each` bytes, the rest of the file cannot hold."""
        self.items += count
        if count * each > self.size - self.position or self.items > MAX_ITEMS:
            raise CheckpointError(f"{self.where}: announces {count} {what}, more than a file of {self.size} bytes can "
                                  f"hold or any model needs; {AGAIN}")

    def value(self, kind: int, key: str) -> Any:
        what = f"key '{printable(key)}'"
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise CheckpointError(f"{self.where}: {what} has the unknown type {kind}; {AGAIN}")
        item, count = self.number("I", what), self.number("Q", what)
        if item == STRING:
            self.afford(count, 8, f"items in {what}")
            return self.texts(count, what)
        if item not in SCALARS:
            raise CheckpointError(f"{self.where}: {what} is an array of type {item}, which GGUF does not have; {AGAIN}")
        width = struct.calcsize("<" + SCALARS[item])
        self.afford(count, width, f"items in {what}")
        return list(struct.unpack(f"<{count}{SCALARS[item]}", self.take(count * width, what)))
