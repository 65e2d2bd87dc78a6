"""A file whose header and size are known beforehand; what it holds is written at its place, in any order.

While it is incomplete it is called NAME.part. A part always has its whole header and its full size, so a run that was
killed goes on in the same file, and a full disk is met before any work is done.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qtool import storage
from qtool.checkpoint.tensor_io import read_into, read_tensor, sha256_with, write_all
from qtool.errors import OutputError, StorageError
from qtool.storage import PART
from qtool.tensors import TensorSpec

NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class PartFile:
    """Makes or continues `path`. Raises StorageError, and OutputError for a file with another header.

    needed: tells how many bytes of the whole output have no room yet.  smaller: what to do where so large a file cannot
    be.  late: what of the header is written last.  resumed: it must be there, with tensors in it.  finished: it has its
    name and cannot be written.
    """

    def __init__(self, path: Path, header: bytes, size: int, needed: Callable[[], int], smaller: str,
                 late: slice = slice(0), resumed: bool = False) -> None:
        self.path, self.smaller = path, smaller
        self.finished = path.exists()
        self._descriptor, self._dirty = -1, not self.finished  # what a killed run wrote may not be on the disk yet
        part = path.with_name(path.name + PART)
        place = path if self.finished else part
        if resumed and not place.exists():
            raise OutputError(f"{place}: is missing, and with it tensors that were finished; --restart begins again")
        try:
            if not self.finished and not part.exists():
                _create(part, header, size)
            found = memoryview(bytearray(len(header)))
            whole = read_into(self._opened(), found, 0)
            found[late] = header[late]
            whole = whole and found == header and place.stat().st_size == size
        except OSError as error:
            raise storage.failed(error, part, "the output", needed(), smaller) from None
        finally:
            self.close()
        if not whole:
            raise OutputError(f"{place}: holds other tensors than this run writes; use --restart to begin again, or "
                              "another --out")

    def write(self, data: memoryview, offset: int, name: str) -> None:
        """Put the bytes of the tensor `name` at `offset`. Raises StorageError, and OutputError once finished."""
        if self.finished:
            raise OutputError(f"{self.path}: is finished; '{name}' cannot be written again")
        try:
            write_all(self._opened(), data, offset)
        except OSError as error:
            raise storage.failed(error, self.path, f"tensor '{name}'", len(data), self.smaller) from None
        finally:
            self._dirty = True  # not before: what another thread syncs meanwhile may lack some of it

    def read(self, spec: TensorSpec, offset: int) -> torch.Tensor:
        """The tensor as it is in the file now (zeros where it has not been written); also from another thread than the
        one that writes."""
        try:
            with self._apart() as descriptor:
                tensor = read_tensor(descriptor, spec, offset)
        except OSError as error:
            raise StorageError(f"{self.path}{PART}: tensor '{spec.name}' cannot be read back: "
                               f"{error.strerror}") from None
        if tensor is None:
            raise StorageError(f"{self.path}{PART}: became shorter; something else writes to {self.path.parent}")
        return tensor

    def sync(self) -> None:
        """Return when everything written so far is on the disk; also from another thread than the one that writes."""
        if not self._dirty:
            return
        self._dirty = False  # what is written from here on is not meant
        try:
            with self._apart() as descriptor:
                os.fsync(descriptor)
        except OSError as error:
            self._dirty = True
            raise storage.failed(error, self.path, "what was written", smaller=self.smaller) from None

    def sha256(self, blank: slice) -> str:
        """Of the file as it is now, with zeros (the digit) at the bytes `blank`. Raises OSError."""
        return sha256_with(self._opened(), blank)

    def rename(self) -> None:
        """Give the file its name, if it has not got it. Raises OSError."""
        if not self.finished:
            self.path.with_name(self.path.name + PART).rename(self.path)
            self.finished = True

    def _opened(self) -> int:
        """A descriptor of the file, opened if it is not."""
        if self._descriptor < 0:
            self._descriptor = self._open()
        return self._descriptor

    @contextmanager
    def _apart(self) -> Iterator[int]:
        """A descriptor that no other thread closes."""
        descriptor = self._open()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        name = self.path.name + ("" if self.finished else PART)
        flags = (os.O_RDONLY if self.finished else os.O_RDWR) | os.O_CLOEXEC
        return os.open(self.path.with_name(name), flags)

    def close(self) -> None:
        """Let go of the descriptor until the file is used again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def has_room(path: Path) -> bool:
    """Whether the file or its part exists, and so has its size."""
    return path.exists() or path.with_name(path.name + PART).exists()


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
