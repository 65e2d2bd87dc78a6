"""The entry functions of `make fuzz` over their corpus, without a fuzzer: every parser has one, and what is in the
corpus, among it whatever crashed one day, ends in an answer or in a message."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.fuzz import targets

CORPUS = Path(__file__).parent / "corpus"


def test_every_target_has_a_corpus_of_small_files() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(targets.TARGETS)
    assert all(0 < path.stat().st_size < 100_000 for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_the_corpus_and_what_is_near_it(name: str) -> None:
    """Each file, and ten that differ from it in a byte, in their end, or in a piece that is there twice."""
    random_ = random.Random(name)
    for path in sorted((CORPUS / name).iterdir()):
        data = path.read_bytes()
        near = [data, b"", data[:random_.randrange(len(data))], data * 2]
        for _ in range(2 if name in ("gguf_model", "gguf_tensors", "tokenizer") else 8):
            changed = bytearray(data)
            changed[random_.randrange(len(data))] = random_.choice(b'\x00\xff\x7f"{}[]0-9:,')
            near.append(bytes(changed))
        for one in near:
            began = time.process_time()
            targets.TARGETS[name](one)
            assert time.process_time() - began < 20


def test_another_exception_is_a_crash() -> None:
    @targets.target
    def broken(data: bytes) -> None:
        raise KeyError("x")

    del targets.TARGETS["broken"]
    with pytest.raises(KeyError):
        broken(b"")
