"""Work done ahead in threads; exports that copy large tensors in parts."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import digests, export
from qtool.ahead import ahead
from qtool.checkpoint.writer import ShardWriter
from qtool.decode import open_model
from qtool.errors import CheckpointError, VerificationError
from tests import tiny
from tests.cli.conftest import make
from tests.test_pipeline import contents


@pytest.fixture
def two_threads() -> object:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the format of GPTQ."""
    place = tmp_path_factory.mktemp("ahead")
    make("quantize", tiny.make(place / "tiny", "llama"), "--method", "rtn", "--group-size", "32", "--format", "gptq",
         "--dtype", "float16", "--out", place / "packed", "--quiet")
    return place / "packed"


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
