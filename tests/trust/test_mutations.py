"""More than 20,000 damaged files, with little memory: see tests/test_mutations.py."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_mutations import PARSERS, Samples, attempts, samples  # noqa: F401 - the fixture

pytestmark = pytest.mark.trust
SPARE = 512 << 20  # bytes beyond what the process has when it begins


@pytest.fixture
def little_memory(samples: Samples) -> Iterator[None]:  # noqa: F811
    """Addresses run out soon: who believes what a hostile file says of its size gets no memory, which is an error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", PARSERS)
def test_damage_is_refused_or_harmless(name: str, samples: Samples, little_memory: None,  # noqa: F811
                                       tmp_path: Path) -> None:
    attempt, _, count = PARSERS[name]
    attempts(attempt, count, samples, tmp_path)


def test_there_are_enough() -> None:
    assert sum(count for _, _, count in PARSERS.values()) >= 20_000
