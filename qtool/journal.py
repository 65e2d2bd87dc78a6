"""The journal of a run: one JSON object per line, each with the sha256 of the rest of its line.

A line that is not as it was written is damage, whatever it says; only the last one may be cut off, by a kill.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qtool.errors import OutputError
from qtool.files import read_limited

NAME = "journal.jsonl"
MAX_BYTES = 1 << 30
DIGEST = "sha256"


def line(entry: dict[str, Any]) -> bytes:
    """The bytes of one entry, its newline included."""
    return _dumped({**entry, DIGEST: _digest(entry)}) + b"\n"


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal, and the bytes that they take in the file; no entries where there is no journal.

    Raises OutputError for one that cannot be read, or that was changed.
    """
    try:
        lines = read_limited(path, MAX_BYTES).split(b"\n")[:-1]
        entries = [_checked(json.loads(text), "stage" if place else "identity") for place, text in enumerate(lines)]
    except FileNotFoundError:
        return [], 0
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "a line is not as it was written"
        raise OutputError(f"{path} is damaged: {why}; --restart discards the unfinished run (or remove "
                          f"{path.parent})") from None
    return entries, sum(len(text) + 1 for text in lines)


def identity(path: Path) -> dict[str, Any] | None:
    """The identity of the run whose journal this is, None where there is none. Raises OutputError as read does."""
    entries, _ = read(path)
    return dict(entries[0]["identity"]) if entries else None


def _checked(entry: Any, key: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or entry.pop(DIGEST, None) != _digest(entry):
        raise ValueError
    if not isinstance(entry.get(key), str if key == "stage" else dict):
        raise ValueError
    return entry


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(_dumped(entry)).hexdigest()


def _dumped(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode()
