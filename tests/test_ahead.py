"""Work done ahead in threads; exports that copy large tensors in parts."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import digests, export, resuming
from qtool.ahead import Behind, ahead
from qtool.checkpoint.writer import ShardWriter
from qtool.decode import open_model
from qtool.errors import CheckpointError, VerificationError
from qtool.workspace import Workspace
from tests.test_pipeline import contents


@pytest.fixture
def two_threads() -> object:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_in_order_and_never_too_far_ahead(two_threads: None) -> None:
    begun, taken, lead = 0, 0, 0
    lock = threading.Lock()

    def items() -> object:
        nonlocal begun, lead
        for number in range(40):
            begun += 1
            with lock:
                lead = max(lead, begun - taken)
            yield number

    with ahead(lambda number: (number, torch.get_num_threads(), threading.current_thread().name), items(), 2,
               5) as made:
        assert torch.get_num_threads() == 1
        for expected, (number, _, thread) in enumerate(made):
            assert number == expected and thread != threading.main_thread().name
            taken += 1
    assert taken == 40 and 2 <= lead <= 5 and torch.get_num_threads() == 2


def test_what_fails_ahead_ends_it(two_threads: None) -> None:
    def fails(number: int) -> int:
        if number == 3:
            raise VerificationError("three")
        return number

    found = []
    with pytest.raises(VerificationError, match="three"), ahead(fails, range(1000), 2, 4) as made:
        found.extend(iter(made))
    assert torch.get_num_threads() == 2 and not [one for one in threading.enumerate() if "ThreadPool" in one.name]


def test_one_thread_is_this_one() -> None:
    with ahead(lambda _: threading.current_thread(), range(3), 1, 2) as made:
        assert set(made) == {threading.main_thread()}


def test_behind_in_order_and_never_too_far(two_threads: None) -> None:
    go, made = threading.Event(), []
    with Behind(2) as behind:
        for number in range(2):
            behind.add(lambda number=number: made.append((number, go.wait(10))))
        assert not made
        threading.Timer(0.05, go.set).start()
        behind.add(lambda: made.append((2, threading.current_thread() is not threading.main_thread())))
        assert made[:1] == [(0, True)]  # a third waits for the first
        behind.wait()
        assert made == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize("later", ["add", "wait"])
def test_what_fails_behind_is_told_and_nothing_after_it_counts(later: str, two_threads: None) -> None:
    def fails() -> None:
        raise VerificationError("three")

    with Behind(1) as behind, pytest.raises(VerificationError, match="three"):
        behind.add(fails)
        if later == "add":
            behind.add(print)
        behind.wait()
    assert not [one for one in threading.enumerate() if "ThreadPool" in one.name]


def test_behind_with_one_thread_is_at_once() -> None:
    with Behind(1) as behind:
        made: list[threading.Thread] = []
        behind.add(lambda: made.append(threading.current_thread()))
        assert made == [threading.main_thread()]


def test_nothing_unchecked_is_recorded(packed: Path, tmp_path: Path, two_threads: None,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the journal waits for the comparisons of what it counts."""
    monkeypatch.setattr(resuming, "RECORDED", 1)
    recorded, compared = [], 0
    real, check = Workspace.record, export._check_linear

    def slow(*given: object) -> None:
        nonlocal compared
        time.sleep(0.02)
        check(*given)
        compared += 1

    def record(self: Workspace, stage: str, told: dict[str, object]) -> None:
        recorded.append((told.get("count"), compared))
        real(self, stage, told)

    monkeypatch.setattr(export, "_check_linear", slow)
    monkeypatch.setattr(Workspace, "record", record)
    source = open_model(str(packed))
    export.run(export.make_export(source, "awq", tmp_path / "out"))
    linears = [name.removesuffix(".weight") in source.schemes for name in source.specs]
    counts = [(count, seen) for count, seen in recorded if count is not None]
    assert len(counts) == len(linears) and all(seen >= sum(linears[:count]) for count, seen in counts)


@pytest.mark.parametrize("to", ["compressed-tensors", "hf"])
def test_parts_and_threads_give_the_same_files(to: str, packed: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        if name == "two":
            monkeypatch.setattr(export, "PIECE_BYTES", 1000)  # the embedding has 65,536 bytes
            torch.set_num_threads(2)
        try:
            export.run(export.make_export(open_model(str(packed)), to, tmp_path / name))
        finally:
            torch.set_num_threads(1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_part_that_is_wrong(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PIECE_BYTES", 1000)
    real = ShardWriter.write_rows

    def write_rows(self: ShardWriter, name: str, start: int, rows: torch.Tensor) -> None:
        real(self, name, start, -rows if start == 14 else rows)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write_rows", write_rows)
        with pytest.raises(VerificationError, match=r"lm_head\.weight: what was read back"):
            export.run(export.make_export(open_model(str(packed)), "awq", tmp_path / "a"))
    folder = tmp_path / "packed"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][[3, 400], 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: 2 of 32768 values are NaN"):
        export.run(export.make_export(open_model(str(folder)), "awq", tmp_path / "b"))


def test_digests_of_a_file_and_its_tensors(packed: Path) -> None:
    path = packed / "model.safetensors"
    data, places = path.read_bytes(), digests.places(packed / "model.safetensors")
    whole, inside = digests.of_file(path, places)
    assert whole == hashlib.sha256(data).hexdigest() == digests.of_file(path)[0]
    assert inside == {name: hashlib.sha256(data[offset:offset + count]).hexdigest()[:16]
                      for name, offset, count in places} and len(inside) > 20
