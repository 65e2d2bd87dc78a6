"""The sha256 of a checkpoint's files, begun while libraries are still being imported: without torch, in two threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path

from qtool import files

CHUNK_BYTES = 16 << 20  # between two chunks a thread waits for the interpreter, which imports
WAIT_SECONDS = 0.05
Stamp = tuple[int, int, int, int]  # device, inode, size and time of the last change


class _Begun:
    """The hash of one file as it was at the time of `stamp`; None where it was changed or cannot be read."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path, self.stamp = path, stamp
        self.done = threading.Event()
        self.sha256: str | None = None

    def run(self) -> None:
        try:
            with self.path.open("rb", buffering=0) as file:
                found = files.sha256(file, CHUNK_BYTES)
                self.sha256 = found if _stamp_of(os.fstat(file.fileno())) == self.stamp else None
        except (OSError, MemoryError):
            pass  # whoever asks for the hash reads the file and says what is wrong
        finally:
            self.done.set()


_files: dict[Stamp, _Begun] = {}


def begin(folder: Path) -> None:
    """Begin with the safetensors files of a folder; does nothing where there is none."""
    waiting = deque[_Begun]()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            if path.is_file():
                stamp = _stamp_of(path.stat())
                waiting.append(_files.setdefault(stamp, _Begun(path, stamp)))
    except OSError:
        return
    for _ in range(min(2, len(waiting))):
        threading.Thread(target=_run, args=(waiting,), daemon=True).start()


def taken(path: Path, stop: threading.Event | None = None) -> str | None:
    """The hash of a file that was begun and has not changed since; waits for it, until `stop` is set. Else None."""
    try:
        one = _files.get(_stamp_of(path.stat()))
    except OSError:
        return None
    while one is not None and not one.done.wait(WAIT_SECONDS):
        if stop is not None and stop.is_set():
            return None
    return one.sha256 if one is not None else None


def _run(waiting: deque[_Begun]) -> None:
    while True:
        try:
            one = waiting.popleft()
        except IndexError:
            return
        one.run()


def _stamp_of(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
