"""A file whose header and size are known beforehand; what it holds is written at its place, in any order.

While it is incomplete it is called NAME.part. A part always has its whole header and its full size, so a run that was
killed goes on in the same file, and a full disk is met before any work is done.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from qtool.checkpoint.tensor_io import read_into, read_tensor, write_all
from qtool.errors import OutputError, StorageError
from qtool.tensors import TensorSpec

PART = ".part"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
CONTINUES = "the same command then goes on where it stopped"


class PartFile:
    """Makes or continues `path`. Raises StorageError, and OutputError for a file with another header.

    needed: tells how many bytes of the whole output have no room yet.  smaller: what to do where so large a file cannot
    be.  finished: it has its name and cannot be written.
    """

    def __init__(self, path: Path, header: bytes, size: int, needed: Callable[[], int], smaller: str) -> None:
        self.path, self.smaller = path, smaller
        self.finished = path.exists()
        part = path.with_name(path.name + PART)
        place = path if self.finished else part
        try:
            if not self.finished and not part.exists():
                _create(part, header, size)
            self._descriptor = os.open(place, (os.O_RDONLY if self.finished else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(error, part, needed(), "the output", smaller) from None
        found = memoryview(bytearray(len(header)))
        if not read_into(self._descriptor, found, 0) or found != header or place.stat().st_size != size:
            self.close()
            raise OutputError(f"{place}: holds other tensors than this run writes; use --restart to begin again, or "
                              "another --out")

    def write(self, data: memoryview, offset: int, name: str) -> None:
        """Put the bytes of the tensor `name` at `offset`. Raises StorageError, and OutputError once finished."""
        if self.finished:
            raise OutputError(f"{self.path}: is finished; '{name}' cannot be written again")
        try:
            write_all(self._descriptor, data, offset)
        except OSError as error:
            raise storage_error(error, self.path, len(data), f"tensor '{name}'", self.smaller) from None

    def read(self, spec: TensorSpec, offset: int) -> torch.Tensor:
        """The tensor as it is in the file now (zeros where it has not been written)."""
        try:
            tensor = read_tensor(self._descriptor, spec, offset)
        except OSError as error:
            raise StorageError(f"{self.path}{PART}: tensor '{spec.name}' cannot be read back: "
                               f"{error.strerror}") from None
        if tensor is None:
            raise StorageError(f"{self.path}{PART}: became shorter; something else writes to {self.path.parent}")
        return tensor

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        if not self.finished:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise storage_error(error, self.path, 0, "what was written", self.smaller) from None

    def rename(self) -> None:
        """Give the file its name, if it has not got it. Raises OSError."""
        if not self.finished:
            self.path.with_name(self.path.name + PART).rename(self.path)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def has_room(path: Path) -> bool:
    """Whether the file or its part exists, and so has its size."""
    return path.exists() or path.with_name(path.name + PART).exists()


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path, needed: int, what: str, smaller: str) -> StorageError:
    """The sentence for a failed write of `needed` bytes."""
    if error.errno == errno.EFBIG:
        return StorageError(f"{path}: {what} ({needed / 1e9:.3f} GB) is larger than this system lets a file be (file "
                            f"system or ulimit -f); {smaller}")
    if error.errno in FULL:
        folder = next(place for place in (path, *path.parents) if place.is_dir())
        free = shutil.disk_usage(folder).free
        missing = max(needed - free, 0)
        why = "the disk quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
        return StorageError(f"{path}: {why}: {what} needs {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are free"
                            f"{f' ({missing / 1e9:.3f} GB are missing)' if missing else ''}; make room, {CONTINUES}")
    return StorageError(f"{path}: {what} cannot be written: {error.strerror}; when that is mended, {CONTINUES}")


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
