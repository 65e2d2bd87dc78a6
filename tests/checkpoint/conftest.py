"""Tiny checkpoints that several tests read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.checkpoint.gguf_maker import convert


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("llama") / "hf", "llama", num_hidden_layers=2)


@pytest.fixture(scope="session")
def small(llama: Path) -> Path:
    """The same as a GGUF file, half a megabyte."""
    return convert(llama, llama.parent / "small.gguf", "llama")
