"""Waiting for what another process does."""

from __future__ import annotations

import time
from pathlib import Path


def wait_for(log: Path, text: str) -> None:
    """Returns as soon as the text stands in the file."""
    for _ in range(8000):
        if log.is_file() and text in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{text} never came in {log}")
