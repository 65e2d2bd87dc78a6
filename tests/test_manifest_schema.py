"""A manifest lies beside weights from anywhere: what is read of it has its type and stays in its directory."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from qtool import card, inspect, manifest
from qtool.errors import CheckpointError, OutputError
from qtool.inspect.summary import made_by
from qtool.workspace import JOURNAL, Workspace, unfinished
from tests.cli.test_card import made


def good() -> dict[str, Any]:
    record = made(outputs={"model.safetensors": "ab"}, schema=1, rotation=None, versions={})
    record["layers"] = [{**one, "stored": one["name"], "shape": [8, 64], "bytes": 300} for one in record["layers"]]
    return record


@pytest.mark.parametrize(("key", "value", "words"), [
    ("qtool", 3, "qtool: Input should be a valid string"), ("layers", {}, "layers"), ("totals", None, "totals"),
    ("outputs", {"../../etc/passwd": "ab"}, "'../../etc/passwd' is not a file of this directory"),
    ("outputs", {"/etc/passwd": "ab"}, "not a file of this directory"),
    ("outputs", {"a\\..\\b": "ab"}, "not a file of this directory"), ("outputs", {"": "ab"}, "not a file of this"),
    ("recipe", {"steps": []}, "recipe.steps"), ("recipe", {"steps": [{}]}, "one name with its options"),
    ("calibration", {"source": "x", "samples": 1.5, "sequence_length": 8, "sha256": "a"}, "calibration.samples"),
    ("several", ["../x"], "not a file of this directory"),
    ("totals", {"parameters": 1 << 70, "weight_bytes": 1, "source_bytes": 1, "bits_per_weight": None}, "parameters"),
    ("source", [], "source"), ("kept", [{"name": 3, "reason": "x"}], "kept.0.name"),
])
def test_what_no_manifest_says_is_named(tmp_path: Path, key: str, value: Any, words: str) -> None:
    manifest.save(tmp_path, {**good(), key: value})
    with pytest.raises(CheckpointError, match="manifest.json: ") as caught:
        manifest.load(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *[place for key, one in inner for place in places(one, (*path, key))]]


def test_readers_of_a_changed_manifest_end_in_a_message(tmp_path: Path) -> None:
    """400 manifests with one value changed: refused as they are read, or every reader gets along with it."""
    random_, found = random.Random(4), places(good())
    refused = 0
    for _ in range(400):
        record = copy.deepcopy(good())
        *way, last = random_.choice(found[1:])
        target = record
        for key in way:
            target = target[key]
        target[last] = random_.choice([None, -1, 1 << 80, 0.5, "x", [], {}, [1], {"a": 1}, True, [[]], {"": {}}])
        (tmp_path / manifest.NAME).write_text(json.dumps(record))
        try:
            read = manifest.load(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert str(tmp_path) in str(error)
            continue
        made_by(read), manifest.errors(read["layers"])
        card.text(read, ())
        list(inspect.arranged([{**one} for one in read["layers"]], None, None))
    assert 100 < refused < 390


@pytest.mark.parametrize("line", [b"[]", b"3", b"{}", b'{"identity": 3}', b'{"identity": []}', b"[" * 100_000, b"\xff",
                                  b'{"stage": 3}', b'"identity"', b"{", b'{"identity": {}, "stage": {}}'])
@pytest.mark.parametrize("first", [True, False])
def test_a_damaged_journal_is_a_message(tmp_path: Path, line: bytes, first: bool) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    identity = {"qtool": "1"}
    before = b"" if first else json.dumps({"identity": identity}).encode() + b"\n"
    (folder / JOURNAL).write_bytes(before + line + b"\n")
    try:
        with Workspace(tmp_path / "out", identity) as work:
            assert not first and work.finished == {}
    except OutputError as error:
        assert "--restart" in str(error)
    with contextlib.suppress(ValueError):
        unfinished(tmp_path / "out")
