"""Real models: as many threads as there are."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Instead of the fixture of all tests."""
