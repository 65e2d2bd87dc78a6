"""A safetensors file whose tensors come one after the other, and are not known before.

The header has its room at the front, kept free while data is added behind it, and is padded with spaces, as the format
allows. While the file is incomplete it is called NAME.part; what a killed run left of it is begun again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from qtool import storage
from qtool.checkpoint.tensor_io import as_bytes, write_all
from qtool.checkpoint.writer import header_bytes
from qtool.storage import PART
from qtool.tensors import TensorSpec


class GrowingFile:
    """Begins `path`, with `room` bytes (a multiple of 8) for its header. Raises StorageError. what: for messages."""

    def __init__(self, path: Path, room: int, what: str, smaller: str) -> None:
        self.path, self.room, self.what, self.smaller = path, room, what, smaller
        self._specs: list[TensorSpec] = []
        self._end = room
        self._descriptor = -1
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor = os.open(path.with_name(path.name + PART), flags, 0o666)
        except OSError as error:
            raise storage.failed(error, path, what, room, smaller) from None

    def add(self, name: str, pieces: Iterable[torch.Tensor], shape: tuple[int, ...]) -> None:
        """One more tensor of this shape, in pieces of one dtype that follow each other (any device, any strides)."""
        size, dtype = 0, torch.float32
        for piece in pieces:
            data, dtype = as_bytes(piece.detach().cpu().contiguous()), piece.dtype
            self._write(data, self._end + size)
            size += len(data)
        spec = TensorSpec(name, dtype, shape)
        if size != spec.nbytes:
            raise ValueError(f"{name}: {size} bytes were given for {dtype} {list(shape)}")
        self._specs.append(spec)
        self._end += size

    def finish(self) -> None:
        """Write the header, give the file its name; on return it is on the disk."""
        header = header_bytes(self._specs, least=self.room)
        if len(header) != self.room:
            raise ValueError(f"{self.path}: {self.room} bytes are too few for the header of {len(self._specs)} tensors")
        self._write(header, 0)
        try:
            os.fsync(self._descriptor)
            self.close()
            self.path.with_name(self.path.name + PART).rename(self.path)
            storage.sync_folder(self.path.parent)
        except OSError as error:
            raise storage.failed(error, self.path, self.what, 0, self.smaller) from None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, data: memoryview | bytes, offset: int) -> None:
        try:
            write_all(self._descriptor, data, offset)
        except OSError as error:
            raise storage.failed(error, self.path, self.what, len(data), self.smaller) from None
