"""By what a manifest knows its files again: the sha256 of each, each tensor in it, and what a linear stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch

from qtool import files, manifest
from qtool.checkpoint.header import read_header

Places = Sequence[tuple[str, int, int]]  # name, offset in the file, bytes
Known = tuple[int, str, dict[str, str]]  # of a file: how many bytes, their sha256, the first digits of its tensors'
DIGITS = 16  # of a tensor's: they tell where the damage is; that there is some, the file's 64 do
SCRATCH = ("journal.jsonl", "lock", manifest.NAME)
STREAM = "stream-"
CHUNK_BYTES = 1 << 20  # stays in a cache
ROWS = 64  # stays in a cache


def of_folder(folder: Path, elsewhere: Mapping[str, Places] | None = None,
              known: Mapping[str, Known] | None = None) -> dict[str, dict[str, str]]:
    """`outputs`, file -> sha256, and `tensors`, name -> its first digits, of all that is in a folder but the manifest.

    elsewhere: where tensors lie in files that do not say so themselves.  known: files that need not be read again.
    """
    outputs, tensors = {}, dict[str, str]()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in SCRATCH and not path.name.startswith(STREAM):
            length, whole, inside = (known or {}).get(path.name, (-1, "", {}))
            if length != path.stat().st_size:
                whole, inside = of_file(path, (elsewhere or {}).get(path.name) or places(path))
            outputs[path.name] = whole
            tensors |= inside
    return {"outputs": outputs, "tensors": tensors}


def places(path: Path) -> Places:
    """The tensors of a safetensors or GGUF file, () for others. Raises CheckpointError for a header that is none."""
    if path.suffix == ".safetensors":
        return [(name, offset, spec.nbytes) for name, (spec, offset) in read_header(path).items()]
    if path.suffix == ".gguf":
        from qtool.checkpoint.gguf_header import read_gguf_header

        return [(one.name, one.offset, one.nbytes) for one in read_gguf_header(path).tensors.values()]
    return ()


def of_file(path: Path, tensors: Places = ()) -> tuple[str, dict[str, str]]:
    """The file's sha256 and the first digits of that of each tensor, side by side. Raises OSError."""
    if not tensors:
        return _whole(path, Event()), {}
    stop, found = Event(), {}
    with ThreadPoolExecutor(1) as pool, path.open("rb", buffering=0) as file:
        try:
            whole = pool.submit(_whole, path, stop)
            buffer = memoryview(bytearray(CHUNK_BYTES))
            for name, offset, count in sorted(tensors, key=lambda one: one[1]):
                part = hashlib.sha256()
                file.seek(offset)
                while count > 0 and (got := file.readinto(buffer[:min(count, CHUNK_BYTES)])):
                    part.update(buffer[:got])
                    count -= got
                found[name] = part.hexdigest()[:DIGITS]
            return whole.result(), found
        finally:
            stop.set()  # a stopped command does not wait for a large file


def _whole(path: Path, stop: Event) -> str:
    with path.open("rb", buffering=0) as file:
        return files.sha256(file, CHUNK_BYTES, stop)


def of_values(weight: torch.Tensor) -> str:
    """sha256 of a weight [N, K]: float32 row by row, little end first, with -0 as 0."""
    values = Values()
    values.add(weight)
    return values.sha256


class Values:
    """The same of a weight that comes in rows, some at a time."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, rows: torch.Tensor) -> None:
        for some in rows.split(ROWS):
            self._digest.update((some.float() + 0.0).contiguous().numpy().data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
