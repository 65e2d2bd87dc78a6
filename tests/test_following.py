"""What exports do beside writing: hashing on the way and ahead, syncing behind; codes that go over as words."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool import begun, digests, export, repacking, resuming
from qtool.checkpoint.tensor_io import as_bytes, sha256_file
from qtool.checkpoint.writer import ShardWriter, plan_shards
from qtool.decode import Source, open_model
from qtool.errors import CheckpointError, StorageError, VerificationError
from qtool.following import Following
from qtool.tensors import TensorSpec
from qtool.workspace import Workspace
from tests.test_pipeline import contents

SPECS = [TensorSpec(name, torch.float32, (16, 33)) for name in "abc"]


def written(folder: Path, order: str, pieces: int = 1) -> dict[str, digests.Known]:
    """Write tensors in some order, each in so many pieces; what following them gives."""
    writer = ShardWriter(folder, plan_shards(SPECS, 5000))
    with Following() as follow:
        for name in order:
            tensor = torch.full((16, 33), float(ord(name)))
            writer.write(name, tensor)
            offset, _ = writer.place(name)
            for rows in tensor.chunk(pieces):
                follow.add(*writer.part(name), name, offset, as_bytes(rows))
                offset += rows.nbytes
        writer.finish()
        return dict(follow.known())


@pytest.mark.parametrize("pieces", [1, 5])
def test_following_gives_the_hashes_of_the_files(tmp_path: Path, pieces: int) -> None:
    known = written(tmp_path, "abc", pieces)
    assert len(known) == 2
    for name, (length, whole, inside) in known.items():
        path = tmp_path / name
        assert length == path.stat().st_size and (whole, inside) == digests.of_file(path, digests.places(path))
    assert digests.of_folder(tmp_path, known=known) == digests.of_folder(tmp_path)
    told = {name: (length, "known", inside) for name, (length, _, inside) in known.items()}
    assert set(digests.of_folder(tmp_path, known=told)["outputs"].values()) >= {"known"}  # was not read once more


def test_what_is_not_written_in_order_is_read_again(tmp_path: Path) -> None:
    assert list(written(tmp_path, "bac")) == ["model-00002-of-00002.safetensors"]  # the first file has a and b
    short: dict[str, digests.Known] = {path.name: (10, "short", {}) for path in tmp_path.iterdir()}
    assert digests.of_folder(tmp_path, known=short) == digests.of_folder(tmp_path)


def test_hashes_that_were_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.safetensors", "two.safetensors", "three.safetensors", "other.bin"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    begun.begin(tmp_path)
    begun.begin(tmp_path / "nowhere")
    waited = {path.name: begun.taken(path) for path in sorted(tmp_path.iterdir())}
    for name, found in waited.items():
        wanted = hashlib.sha256(name.encode() * 1000).hexdigest()
        assert found == (wanted if name.endswith(".safetensors") else None)
        monkeypatch.setattr(begun, "_stamp_of", lambda status: (0, 0, 0, 0))  # as if it had not been begun
        assert sha256_file(tmp_path / name) == wanted
        monkeypatch.undo()
    changed = tmp_path / "one.safetensors"
    changed.write_bytes(b"changed since")
    assert begun.taken(changed) is None and sha256_file(changed) == hashlib.sha256(b"changed since").hexdigest()
    assert begun.taken(tmp_path / "gone") is None


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"before")
    one = begun._Begun(path, begun._stamp_of(path.stat()))
    path.write_bytes(b"after that")
    one.run()
    assert one.done.is_set() and one.sha256 is None
    stuck = begun._files[begun._stamp_of(path.stat())] = begun._Begun(path, one.stamp)
    stop = threading.Event()
    stop.set()
    assert begun.taken(path, stop) is None and not stuck.done.is_set()


def test_a_line_of_the_journal_waits_for_the_disk_and_the_next_item_does_not(tmp_path: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "RECORDED", 2)
    disk, seen = threading.Event(), []
    with Workspace(tmp_path / "out", {}) as work:
        def sync() -> None:
            assert disk.wait(10)
            seen.append(dict(work.finished))

        with resuming.unwritten(work, "abcd", lambda item: 1, sync) as left:
            assert [next(left), next(left), next(left)] == [(0, "a"), (1, "b"), (2, "c")]
            assert resuming.SOME not in work.finished  # the disk is not done
            disk.set()
            assert [*left] == [(3, "d")]
        assert work.finished[resuming.SOME] == {"count": 4}
    assert seen == [{}, {resuming.SOME: {"count": 2}}]


def test_a_disk_that_fails_later_ends_it_and_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "RECORDED", 1)

    def sync() -> None:
        raise StorageError("the disk is gone")

    with Workspace(tmp_path / "out", {}) as work:
        with pytest.raises(StorageError, match="is gone"), resuming.unwritten(work, "ab", lambda item: 1, sync) as left:
            list(left)
        assert not work.finished


def test_what_is_written_during_a_sync_is_synced_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, plan_shards(SPECS, 1 << 20))
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 1:
            writer.write("b", torch.ones(16, 33))
        real(descriptor)

    writer.sync()
    writer.write("a", torch.ones(16, 33))
    monkeypatch.setattr(os, "fsync", fsync)
    for expected in (1, 2, 2):
        writer.sync()
        assert len(synced) == expected
    writer.close()


@pytest.mark.parametrize("to", ["awq", "mlx", "compressed-tensors"])
def test_words_make_the_bytes_that_codes_make(packed: Path, to: str, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    routes: list[repacking.Route | None] = []
    real = Source.route

    def route(*arguments: Any) -> repacking.Route | None:
        routes.append(real(*arguments))
        return routes[-1]

    monkeypatch.setattr(Source, "route", route)
    result = export.run(export.make_export(open_model(str(packed)), to, tmp_path / to))
    assert len(routes) == result["linears"] > 0 and all(routes)
    monkeypatch.setattr(Source, "route", lambda *_: None)
    export.run(export.make_export(open_model(str(packed)), to, tmp_path / "codes"))
    assert contents(tmp_path / to) == contents(tmp_path / "codes")
    monkeypatch.undo()
    back = export.run(export.make_export(open_model(str(tmp_path / to)), "gptq", tmp_path / "back"))
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", packed))
    assert back["lossless"] and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("to", ["awq", "mlx"])
@pytest.mark.parametrize("suffix", ["weight", "scales"])
def test_one_bit_in_the_file_that_differs(packed: Path, to: str, suffix: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    real = ShardWriter.write

    def write(self: Any, name: str, tensor: torch.Tensor) -> None:
        if "down_proj" in name and name.endswith(suffix):
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[77] ^= 16
        real(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", write)
    told = r"down_proj: its values in .* differ from those in"
    if (to, suffix) == ("mlx", "scales"):
        told = "down_proj: its biases are no multiples of its scales"
    with pytest.raises((VerificationError, CheckpointError), match=told):
        export.run(export.make_export(open_model(str(packed)), to, tmp_path / "out"))


def test_no_words_for_what_is_not_of_four_bits(packed: Path) -> None:
    from qtool import formats

    source, scheme = formats.load("gptq"), open_model(str(packed)).schemes["model.layers.0.mlp.down_proj"]
    target = formats.load("mlx")
    assert repacking.route("p", scheme, (32, 64), source, target, {}) == repacking.Route("p.qweight", 1, "p.weight", 0,
                                                                                         (32, 64))
    for other in (scheme.model_copy(update={"bits": 8}), scheme.model_copy(update={"activations": "token"})):
        assert repacking.route("p", other, (32, 64), source, target, {}) is None
    assert repacking.route("p", scheme, (32, 60), source, target, {}) is None
    assert repacking.route("p", scheme, (32, 64), source, formats.load("hf"), {}) is None
    assert repacking.route("p", scheme, (32, 64), None, target, {}) is None
    gemv = {"quantization_config": {"quant_method": "awq", "version": "GEMV", "bits": 4}}
    assert [formats.load("awq").int4("p", config) for config in (None, gemv)] == [("p.qweight", 2), ("p.qweight", 0)]
