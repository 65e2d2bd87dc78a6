"""Tiny checkpoints, made once per session and only read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests import tiny
from tests.models.loaded import LENGTH, SAMPLES, Loaded, open_tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """checkpoint("llama") -> the tiny checkpoint of that family, to be read only."""
    made: dict[str, Loaded] = {}

    def get(family: str) -> Loaded:
        if family not in made:
            made[family] = open_tiny(tiny.make(tmp_path_factory.mktemp("tiny") / family, family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(0, tiny.VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
