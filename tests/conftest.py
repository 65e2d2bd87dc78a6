"""One thread: tiny products are slower on two, and the order of their sums depends on the number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.cli.conftest import make


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing as on a CPU without units for bfloat16, for what is held against float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as gptq stores it, 4 bits, whose zero points and scales every format can hold."""
    place = tmp_path_factory.mktemp("packed")
    make("quantize", tiny.make(place / "tiny", "llama"), "--method", "rtn", "--group-size", "32", "--format", "gptq",
         "--dtype", "float16", "--out", place / "packed", "--quiet")
    return place / "packed"
