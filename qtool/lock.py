"""The lock of a run's directory, on local and on shared storage.

flock decides among the processes of one kernel, and on most shared file systems among hosts: it goes with the process
that holds it. Some keep it to each host. So the file also names its owner, who touches it every BEAT seconds, and a
lock with another host's name is watched: a touch is a sign of life; none for STALE seconds, and it is a dead process's.
No clocks are compared. Within one kernel flock says all, whatever process has the owner's number by now. The folder is
locked too: it stays locked while it gets another name, when the file is gone already.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qtool.errors import OutputError

BEAT = 2.0
STALE = 30.0
LOOK = 0.1
NO_FLOCK = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of the kernel, also in containers


@contextlib.contextmanager
def hold(path: Path) -> Iterator[Callable[[], None]]:
    """Own the lock; yields a function that raises OutputError once another process has taken it over.

    Raises OutputError where a living process has it, OSError where the file cannot be written.
    """
    ended = threading.Event()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_opened(path.parent, os.O_RDONLY | os.O_DIRECTORY))
        descriptor = stack.enter_context(_opened(path, os.O_RDWR | os.O_CREAT))
        _take(descriptor, folder, path)
        mine = {**_me(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
        os.fsync(descriptor)
        stack.callback(_empty, descriptor)  # ended in good order: the next one need not wait
        beat = threading.Thread(target=_beat, args=(descriptor, ended), daemon=True, name="lock")
        beat.start()
        stack.callback(beat.join)
        stack.callback(ended.set)

        def refuse_lost() -> None:
            if (owner := _owner(path)) != mine:
                raise OutputError(f"{path.parent} was taken over by {_named(owner)}, as this process gave no sign of "
                                  f"life for {STALE:.0f} s; leave it to that one")

        yield refuse_lost


def _empty(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # not worth failing for: the next one can wait
        os.ftruncate(descriptor, 0)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """Own a folder while it changes names. Raises OutputError where another process owns it."""
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        if not _flock_folder(descriptor):
            raise OutputError(f"{path} is in use by another process, which is about to finish; wait for it")
        yield


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: int, path: Path) -> None:
    """Return when the lock is free or its owner is gone.

    Raises OutputError at once where a process of this kernel has it, else at the owner's next sign of life.
    """
    here, began, opened = _me()["boot"], time.monotonic(), os.fstat(descriptor)
    while True:
        free = _flock_folder(folder) and _flock(descriptor)
        owner = _owner(path)
        now = path.stat() if path.exists() else None
        if now is None or now.st_ino != opened.st_ino:
            raise OutputError(f"{path.parent} was finished or discarded by another process just now")
        if free and (not owner or owner.get("boot") == here):
            return
        if now.st_mtime_ns != opened.st_mtime_ns or (not free and owner.get("boot") == here):
            raise OutputError(f"{path.parent} is in use by {_named(owner)}; wait for it or choose another --out")
        if time.monotonic() - began > STALE:
            if free:
                return
            raise OutputError(f"{path.parent} is in use by {_named(owner)}, which gave no sign of life for "
                              f"{STALE:.0f} s; if that machine is gone, remove {path}")
        time.sleep(LOOK)


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _flock_folder(descriptor: int) -> bool:
    """True too where folders have no locks, as on NFS; the file's is left."""
    try:
        return _flock(descriptor)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return True


def _me() -> dict[str, Any]:
    boot = BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.is_file() else socket.gethostname()
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot}


def _owner(path: Path) -> dict[str, Any]:
    """Whom the file names; opened anew, so that a network file system looks at the server's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace") or "{}")
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {"pid": found}


def _named(owner: dict[str, Any]) -> str:
    since = f" since {owner['since']}" if "since" in owner else ""
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'this machine')}{since}"


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # the journal finds out
            os.utime(descriptor)
