"""Moves one tensor between a file and memory, without mapping the file: resident memory stays at that tensor."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qtool import begun, files
from qtool.errors import CheckpointError
from qtool.tensors import TensorSpec

PIECE_BYTES = 1 << 30  # Linux moves at most 2^31 - 4096 bytes in one call
WRITE_BYTES = 256 << 10  # larger calls were up to three times as slow: the kernel takes larger pages for the cache
HASH_BYTES = 8 << 20


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared, not copied."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_into(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fill the buffer from the file position `offset`; False when the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:done + PIECE_BYTES]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def read_tensor(descriptor: int, spec: TensorSpec, offset: int) -> torch.Tensor | None:
    """The contiguous tensor whose bytes begin at `offset`; None when the file ends before they do."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    return tensor if read_into(descriptor, as_bytes(tensor), offset) else None


def write_all(descriptor: int, buffer: memoryview | bytes, offset: int) -> None:
    """Write the whole buffer at the file position `offset`. Raises OSError."""
    view, done = memoryview(buffer), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:done + WRITE_BYTES], offset + done)


def sha256_files(paths: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of each file in hex, two files at a time (hashing releases the interpreter lock)."""
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            return dict(zip(paths, pool.map(lambda path: sha256_file(path, stop), paths.values()), strict=True))
        finally:
            stop.set()  # a stopped command does not wait for large files


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    """stop: set from another thread, it ends this one before its time."""
    if (early := begun.taken(path, stop)) is not None:
        return early
    try:
        with path.open("rb", buffering=0) as file:
            return files.sha256(file, HASH_BYTES, stop)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def sha256_with(descriptor: int, blank: slice) -> str:
    """Of an open file, in hex, as if the digit 0 stood at each of the bytes `blank`. Raises OSError."""
    digest, buffer, place = hashlib.sha256(), bytearray(HASH_BYTES), 0
    while count := os.preadv(descriptor, [buffer], place):
        inside = slice(max(blank.start - place, 0), max(min(blank.stop - place, count), 0))
        if inside.start < inside.stop:
            buffer[inside] = b"0" * (inside.stop - inside.start)
        digest.update(memoryview(buffer)[:count])
        place += count
    return digest.hexdigest()
