"""Writes safetensors files whose sizes are known beforehand: header first, then each tensor at its place, in any order.

While a file is incomplete it is called NAME.part. A part always has its whole header and its full size, so a run that
was killed goes on in the same file, and a full disk is met before any work is done.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.checkpoint.tensor_io import as_bytes, read_into, read_tensor, write_all
from qtool.errors import OutputError, StorageError
from qtool.tensors import NAMES_OF_DTYPES, TensorSpec

PART = ".part"
INDEX = "model.safetensors.index.json"
PYTORCH = {"format": "pt"}  # loaders ask for this key
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BARE_ALIGNMENT, PAGE, LARGE = 64, 4096, 1 << 20
NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
CONTINUES = "the same command then goes on where it stopped"


@dataclass(frozen=True)
class Shard:
    """A file and its tensors, in the order of their data. bare: without a header, each tensor at an address that is a
    multiple of BARE_ALIGNMENT, a large one at the start of a page (ONNX's external data)."""

    file_name: str
    specs: tuple[TensorSpec, ...]
    bare: bool = False


def plan_shards(specs: Iterable[TensorSpec], limit_bytes: int) -> list[Shard]:
    """Distribute tensors over files of at most `limit_bytes` of data (a larger tensor gets a file of its own).

    The order is kept, except in a file where a tensor would begin at an address that its dtype cannot have.
    """
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if groups[-1] and used + spec.nbytes > limit_bytes:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += spec.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", _aligned(groups[0]))]
    return [Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", _aligned(group))
            for number, group in enumerate(groups, 1)]


def _aligned(specs: list[TensorSpec]) -> tuple[TensorSpec, ...]:
    """As given if every tensor then begins at a multiple of its element size, else the widest elements first."""
    offset = 0
    for spec in specs:
        if offset % spec.dtype.itemsize:
            return tuple(sorted(specs, key=lambda one: -one.dtype.itemsize))
        offset += spec.nbytes
    return tuple(specs)


def header_bytes(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON header, padded with spaces so that the data begins at a multiple of eight bytes."""
    entries: dict[str, object] = {"__metadata__": dict(sorted((PYTORCH if metadata is None else metadata).items()))}
    offset = 0
    for spec in specs:
        entries[spec.name] = {"dtype": NAMES_OF_DTYPES[spec.dtype], "shape": list(spec.shape),
                              "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """Opens or continues the files of `shards` in `folder`. Raises StorageError, and OutputError for foreign files."""

    def __init__(self, folder: Path, shards: Iterable[Shard], metadata: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._places: dict[str, tuple[TensorSpec, Shard, int]] = {}
        self._descriptors: dict[str, int] = {}
        self._finished: set[str] = set()
        try:
            for shard in self.shards:
                header = b"" if shard.bare else header_bytes(shard.specs, metadata)
                self._open(shard, header, self._place(shard, len(header)))
            _sync_folder(folder)
        except (OutputError, StorageError):
            self.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (any device, any strides) at its place; shape and dtype must be as planned."""
        spec, shard, offset = self._places[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned {spec.dtype} {list(spec.shape)}")
        if shard.file_name in self._finished:
            raise OutputError(f"{self.folder / shard.file_name}: is finished; '{name}' cannot be written again")
        try:
            write_all(self._descriptors[shard.file_name], as_bytes(tensor.detach().cpu().contiguous()), offset)
        except OSError as error:
            raise _storage_error(error, self.folder / shard.file_name, spec.nbytes, f"tensor '{name}'") from None

    def read_back(self, name: str) -> torch.Tensor:
        """The tensor as it is in the file now (zeros where it has not been written)."""
        spec, shard, offset = self._places[name]
        path = self.folder / shard.file_name
        try:
            tensor = read_tensor(self._descriptors[shard.file_name], spec, offset)
        except OSError as error:
            raise StorageError(f"{path}{PART}: tensor '{name}' cannot be read back: {error.strerror}") from None
        if tensor is None:
            raise StorageError(f"{path}{PART}: became shorter; something else writes to {self.folder}")
        return tensor

    def place(self, name: str) -> tuple[int, int]:
        """(offset in its file, bytes) of a tensor."""
        spec, _, offset = self._places[name]
        return offset, spec.nbytes

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        for name, descriptor in self._descriptors.items():
            if name not in self._finished:
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    raise _storage_error(error, self.folder / name, 0, "what was written") from None

    def finish(self) -> None:
        """Give the files their names, write the index if there are several, close. Safe to repeat after a kill."""
        self.sync()
        try:
            for shard in self.shards:
                if shard.file_name not in self._finished:
                    (self.folder / (shard.file_name + PART)).rename(self.folder / shard.file_name)
            if len(self.shards) > 1:
                self._write_index()
            _sync_folder(self.folder)
        except OSError as error:
            raise _storage_error(error, self.folder, 0, "the names of the finished files") from None
        self._finished |= {shard.file_name for shard in self.shards}
        self.close()

    def close(self) -> None:
        """Close the files; parts stay as they are."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _place(self, shard: Shard, offset: int) -> int:
        """Give every tensor its offset; returns the size of the file."""
        for spec in shard.specs:
            if spec.name in self._places:
                raise ValueError(f"tensor '{spec.name}' is planned twice")
            if shard.bare:
                offset += -offset % (PAGE if spec.nbytes >= LARGE else BARE_ALIGNMENT)
            self._places[spec.name] = (spec, shard, offset)
            offset += spec.nbytes
        return offset

    def _open(self, shard: Shard, header: bytes, size: int) -> None:
        final = self.folder / shard.file_name
        part = self.folder / (shard.file_name + PART)
        try:
            if final.exists():
                self._finished.add(shard.file_name)
            elif not part.exists():
                _create(part, header, size)
            path = final if final.exists() else part
            mode = os.O_RDONLY if path == final else os.O_RDWR
            self._descriptors[shard.file_name] = os.open(path, mode | os.O_CLOEXEC)
        except OSError as error:
            raise _storage_error(error, part, self._outstanding(), "the output") from None
        found = memoryview(bytearray(len(header)))
        complete = read_into(self._descriptors[shard.file_name], found, 0)
        if not complete or found != header or path.stat().st_size != size:
            raise OutputError(f"{path}: holds other tensors than this run writes; use --restart to begin again, or "
                              "another --out")

    def _outstanding(self) -> int:
        """Bytes of the files that have no room reserved yet."""
        return sum(spec.nbytes for shard in self.shards for spec in shard.specs
                   if not any((self.folder / (shard.file_name + end)).exists() for end in ("", PART)))

    def _write_index(self) -> None:
        index = {"metadata": {"total_size": sum(spec.nbytes for spec, _, _ in self._places.values())},
                 "weight_map": {name: shard.file_name for name, (_, shard, _) in sorted(self._places.items())}}
        part = self.folder / (INDEX + PART)
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.rename(self.folder / INDEX)


def _create(part: Path, header: bytes, size: int) -> None:
    """Make a part with its header and full size; until that is on the disk it has yet another name."""
    fresh = part.with_name(part.name + ".new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        _allocate(descriptor, size)
        write_all(descriptor, header, 0)
        os.fsync(descriptor)
    except OSError:
        fresh.unlink()
        raise
    finally:
        os.close(descriptor)
    fresh.rename(part)


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in NO_FALLOCATE:
            raise
        os.ftruncate(descriptor, size)  # this file system reserves nothing: the disk may still fill up later


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(error: OSError, path: Path, needed: int, what: str) -> StorageError:
    """The sentence for a failed write of `needed` bytes."""
    if error.errno == errno.EFBIG:
        return StorageError(f"{path}: {what} ({needed / 1e9:.3f} GB) is larger than this system lets a file be (file "
                            "system or ulimit -f); use a smaller --set shard_gb")
    if error.errno in FULL:
        folder = next(place for place in (path, *path.parents) if place.is_dir())
        free = shutil.disk_usage(folder).free
        missing = max(needed - free, 0)
        why = "the disk quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
        return StorageError(f"{path}: {why}: {what} needs {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are free"
                            f"{f' ({missing / 1e9:.3f} GB are missing)' if missing else ''}; make room, {CONTINUES}")
    return StorageError(f"{path}: {what} cannot be written: {error.strerror}; when that is mended, {CONTINUES}")
