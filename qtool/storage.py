"""Files that are whole or not there, room on disks, and what is said when writing fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qtool.errors import OutputError, PlanError, StorageError
from qtool.units import size

PART = ".part"  # ends the name of what is not whole yet
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
CONTINUES = "the same command then goes on where it stopped"
AGAIN = "then give the same command again"


def failed(error: OSError, path: Path, what: str, needed: int = 0, smaller: str = "raise the limit",
           then: str = CONTINUES) -> StorageError:
    """The sentence for a failed write of `what`, of which `needed` bytes were to come.

    smaller: what to do where so large a file cannot be.  then: what the same command does.
    """
    amount = f" ({size(needed)})" if needed else ""
    if error.errno == errno.EFBIG:
        return StorageError(f"{path}: {what}{amount} is larger than this system lets a file be (file system or "
                            f"ulimit -f); {smaller}; {then}")
    if error.errno in FULL:
        why = "the disk quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
        return StorageError(f"{path}: {why}: {_room(path, what, needed)}; make room, {then}")
    if error.errno == errno.EROFS:
        return StorageError(f"{path}: {what} cannot be written: the file system {mount(path)} is read-only; when that "
                            f"is mended, {then}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StorageError(f"{path}: {what} cannot be opened: {error.strerror}; raise the limit (ulimit -n), {then}")
    return StorageError(f"{path}: {what} cannot be written: {error.strerror}; when that is mended, {then}")


def unusable(error: OSError, path: Path, how: str, option: str) -> OutputError | StorageError:
    """Why work cannot even begin at `path`: there is no room, or it is no place for it."""
    if error.errno in (*FULL, errno.EMFILE, errno.ENFILE, errno.EIO):
        return failed(error, path, "the output", then=AGAIN)
    return OutputError(f"{path} {how}: {error.strerror}; choose another {option}")


def _room(path: Path, what: str, needed: int) -> str:
    """What is needed and what is there; a disk may also have no more room for names (inodes)."""
    place = mount(path)
    try:
        told = os.statvfs(place)
    except OSError:
        return f"no room for {what} on {place}"
    free = told.f_bavail * told.f_frsize
    if told.f_files and not told.f_favail and free > needed:
        return f"{place} can hold no more files (its inodes are used up)"
    missing = f" ({size(needed - free)} are missing)" if needed > free else ""
    wants = f"{what} needs {size(needed)} and" if needed else f"there is no room for {what}, and"
    return f"{wants} {size(free)} are free on {place}{missing}"


def standing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(folder for folder in (path.absolute().parent, *path.absolute().parents) if folder.is_dir())


def mount(path: Path) -> Path:
    """Where the file system of a path is mounted."""
    place = path.absolute() if path.is_dir() else standing(path)
    with contextlib.suppress(OSError):
        place = place.resolve()
        while not place.is_mount():
            place = place.parent
    return place


def free(out: Path) -> int:
    """Bytes free where an output goes, with what an unfinished run of it has there already."""
    partial, there = out.with_name(out.name + ".partial"), 0
    with contextlib.suppress(OSError):  # the workspace says what is wrong with it
        there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*")) if partial.is_dir() else 0
    return shutil.disk_usage(standing(out)).free + there


def shortage(what: str, needed: int, of: str, available: int, remedies: Sequence[str]) -> str:
    """The sentence for a machine that has too little of something."""
    return (f"this machine is too small: {what} needs {size(needed)} of {of}, and {size(available)} are free; "
            f"{'; or '.join(remedies)}")


def refuse_full(out: Path, needed: int, what: str, remedies: Sequence[str]) -> None:
    """Raise PlanError where an output that takes `needed` bytes, until it is finished, has no room for them."""
    available = free(out)
    if available < needed:
        raise PlanError(shortage(what, needed, f"disk in {standing(out)}", available, remedies))


def write(path: Path, content: bytes) -> None:
    """Durable before it has its name, in place of an older file. Raises OSError; then nothing new is there."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make a file durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in a folder durable, where the file system can. Raises OSError."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in NOT_FOR_FOLDERS:  # some network file systems know no such promise
            raise
