"""Opening a file of someone else: only a regular one, as a pipe or a device may block, or never end. Its hash."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """With ~ and ~user as folders, where there is such a user (where not, Path.expanduser raises)."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def open_regular(path: Path) -> io.BufferedReader:
    """Open for reading. Raises OSError, also for what is no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_limited(path: Path, limit: int) -> bytes:
    """The whole of a regular file. Raises OSError, also for one of more than `limit` bytes, before it is read whole."""
    with open_regular(path) as file:
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)  # Python takes memory for all it may read
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 10:,} KiB", str(path))
    return content


def sha256(file: io.RawIOBase, piece: int, stop: threading.Event | None = None) -> str:
    """Of a file from where it is read next, in hex, `piece` bytes at a time; of a part of it, once `stop` is set.

    Raises OSError.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(piece))
    while not (stop and stop.is_set()) and (count := file.readinto(buffer)):
        digest.update(buffer[:count])
    return digest.hexdigest()
