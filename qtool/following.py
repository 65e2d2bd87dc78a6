"""Hashes of files while these are written: what was read back of them is hashed in threads, and not read once more."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.digests import DIGITS, Known

WAITING = 1  # pieces that are not hashed yet


@dataclass
class _File:
    """whole: of all bytes before `reached`.  tensors: of each tensor in them."""

    reached: int
    whole: Any = field(default_factory=hashlib.sha256)
    tensors: dict[str, Any] = field(default_factory=dict)


class Following:
    """Use as a context manager. Files that are not written from their beginning to their end, in order, are left out:
    those that an earlier command began, and the few whose tensors lie in another order."""

    def __init__(self) -> None:
        self._threads = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        self._waiting: deque[Future[None]] = deque()
        self._files: dict[str, _File] = {}
        self._left: set[str] = set()

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def add(self, file: str, path: Path, begin: int, tensor: str, offset: int, data: memoryview) -> None:
        """What was read back of a tensor, from `offset` of the file on.

        file: its name in the end.  path: where it is now.  begin: where its first tensor lies. Raises OSError.
        """
        if file not in self._files:
            self._files[file] = _begun(path, begin)
        one = self._files[file]
        if one.reached != offset:
            self._left.add(file)
        if file in self._left:
            return
        one.reached += len(data)
        part = one.tensors.setdefault(tensor, hashlib.sha256())
        for thread, digest in zip(self._threads, (one.whole, part), strict=True):
            self._waiting.append(thread.submit(digest.update, data))
        while len(self._waiting) > 2 * WAITING:
            self._waiting.popleft().result()

    def known(self) -> Mapping[str, Known]:
        """Of every file that was followed: how far, its sha256 there, and the first digits of its tensors'."""
        while self._waiting:
            self._waiting.popleft().result()
        return {name: (one.reached, one.whole.hexdigest(),
                       {tensor: part.hexdigest()[:DIGITS] for tensor, part in one.tensors.items()})
                for name, one in self._files.items() if name not in self._left}


def _begun(path: Path, begin: int) -> _File:
    """With what lies before the first tensor, as the file has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        one = _File(begin)
        one.whole.update(os.pread(descriptor, begin, 0))
        return one
    finally:
        os.close(descriptor)
