"""A GGUF file has no manifest beside it, so it carries its own sha256, under a key that llama.cpp reads over.

It is that of the whole file with the digit 0 in place of each digit of the value. A second key says that there is
one, so that a damaged name is noticed too.
"""

from __future__ import annotations

import struct
from pathlib import Path

from qtool import storage
from qtool.checkpoint.gguf_header import GgufHeader
from qtool.checkpoint.header import AGAIN
from qtool.checkpoint.part_file import PartFile, has_room
from qtool.checkpoint.tensor_io import sha256_with
from qtool.errors import CheckpointError

KEY, SAYS_SO, BLANK = "qtool.sha256", "qtool.sealed", "0" * 64
STRING = 8
ENTRY = struct.pack("<Q", len(KEY)) + KEY.encode() + struct.pack("<IQ", STRING, len(BLANK))  # before the value
HEAD_BYTES = 256 << 20
SMALLER = "write it to another file system"


class SealedFile(PartFile):
    """A GGUF file with a header that has a place for the file's own sha256; see PartFile for resumed and for errors."""

    def __init__(self, path: Path, header: bytes, size: int, resumed: bool = False) -> None:
        self._seal = place(header)
        super().__init__(path, header, size, lambda: 0 if has_room(path) else size, SMALLER, self._seal, resumed)

    def finish(self) -> None:
        """Write its own sha256 into it, give it its name and close it. Safe to repeat after a kill."""
        self.sync()
        try:
            if not self.finished:
                digest = self.sha256(self._seal)
                self.write(memoryview(digest.encode()), self._seal.start, KEY)
                self.sync()
            self.rename()
            storage.sync_folder(self.path.parent)
        except OSError as error:
            raise storage.failed(error, self.path, "the name of the finished file") from None
        self.close()


def place(header: bytes) -> slice:
    """Where in the file the value lies; an empty slice without one."""
    found = header.find(ENTRY)
    return slice(found + len(ENTRY), found + len(ENTRY) + len(BLANK)) if found >= 0 else slice(0, 0)


def wrong(path: Path, header: GgufHeader) -> str | None:
    """Why a file is not as qtool wrote it; None where it is, or where another program wrote it."""
    said = header.metadata.get(KEY)
    if said is None and SAYS_SO not in header.metadata:
        return None
    end = min((one.offset for one in header.tensors.values()), default=HEAD_BYTES)
    try:
        with path.open("rb") as file:
            where = place(file.read(end))
            if where.stop and sha256_with(file.fileno(), where) == said:
                return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return (f"{path}: is not as qtool wrote it (its sha256 is not the one under its key {KEY}): it is damaged, or "
            f"another program wrote it from one of qtool's; {AGAIN}")

