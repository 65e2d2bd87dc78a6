"""Tests that change the number of threads or the instruction set leave both as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qtool import ops


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ops.force_instruction_set("")
