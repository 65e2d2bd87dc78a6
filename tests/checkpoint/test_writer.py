"""The writer: bytes, resuming, disks that fill up."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.checkpoint import open_checkpoint, part_file, writer
from qtool.checkpoint.header import read_header
from qtool.checkpoint.writer import LARGE, Shard, ShardWriter, plan_shards
from qtool.errors import OutputError, StorageError
from qtool.tensors import DTYPE_NAMES, TensorSpec

DTYPES = st.sampled_from(list(DTYPE_NAMES.values()))
SIZES = st.lists(st.integers(0, 5), max_size=3)


def tensors_of(shapes: list[tuple[torch.dtype, list[int]]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for index, (dtype, shape) in enumerate(shapes):
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
        made[f"t{index}"] = raw.view(dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)
    return made


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bytes; torch.equal would call NaN different."""
    return left.dtype == right.dtype and left.shape == right.shape and (
        left.numel() == 0 or bool((left.reshape(-1).view(torch.uint8) == right.reshape(-1).view(torch.uint8)).all()))


def write(folder: Path, tensors: dict[str, torch.Tensor], limit: int = 1 << 40) -> None:
    shards = ShardWriter(folder, plan_shards(specs_of(tensors), limit))
    for name, tensor in tensors.items():
        shards.write(name, tensor)
    shards.finish()
    (folder / "config.json").write_text("{}")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(DTYPES, SIZES), min_size=1, max_size=8), st.integers(1, 400))
def test_round_trip_of_everything(tmp_path_factory: pytest.TempPathFactory, shapes: list, limit: int) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = tensors_of(shapes)
    write(folder, tensors, limit)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.specs == {spec.name: spec for spec in sorted(specs_of(tensors), key=lambda spec: spec.name)}
    assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    for file in folder.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(file).items():
            assert same(tensor, tensors[name])
        offsets = [(spec, offset) for spec, offset in read_header(file).values()]
        assert all(offset % spec.dtype.itemsize == 0 for spec, offset in offsets)
        assert offsets[0][1] % 8 == 0


def test_header_is_the_promised_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3, dtype=torch.int32), "a": torch.ones(2, dtype=torch.bfloat16)}
    write(tmp_path, tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8:8 + length]
    assert length % 8 == 0
    assert text.rstrip(b" ") == (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"BF16","shape":[2],"data_offsets":[12,16]}}')
    assert raw[8 + length:] == bytes(tensors["b"].numpy()) + b"\x80\x3f\x80\x3f"


def test_order_is_kept_unless_addresses_would_be_odd() -> None:
    wide, narrow = TensorSpec("wide", torch.int64, (1,)), TensorSpec("narrow", torch.bfloat16, (1,))
    even = TensorSpec("even", torch.bfloat16, (4,))
    assert plan_shards([even, wide], 100)[0].specs == (even, wide)
    assert plan_shards([narrow, wide], 100)[0].specs == (wide, narrow)


def test_shards_keep_to_the_limit_and_large_tensors_stand_alone() -> None:
    specs = [TensorSpec(f"t{index}", torch.uint8, (size,)) for index, size in enumerate((4, 4, 50, 1, 9, 1))]
    shards = plan_shards(specs, 10)
    assert [[spec.name for spec in shard.specs] for shard in shards] == [["t0", "t1"], ["t2"], ["t3", "t4"], ["t5"]]
    assert shards[1].file_name == "model-00002-of-00004.safetensors"


def test_index_of_several_files(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((4,), index, dtype=torch.float32) for index in (2, 0, 1)}
    write(tmp_path, tensors, 16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48}
    assert list(index["weight_map"].items()) == [("t0", "model-00002-of-00003.safetensors"),
                                                 ("t1", "model-00003-of-00003.safetensors"),
                                                 ("t2", "model-00001-of-00003.safetensors")]
    assert not list(tmp_path.glob("*.part*"))


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = tensors_of([(torch.bfloat16, [5, 3]), (torch.int32, [7]), (torch.float32, [2, 2])])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    write(straight, tensors, 40)
    shards = plan_shards(specs_of(tensors), 40)
    first = ShardWriter(killed, shards)
    first.write("t1", tensors["t1"])
    first.sync()
    first.close()  # what a kill leaves behind
    assert not list(killed.glob("*.safetensors")) and len(list(killed.glob("*.part"))) == len(shards) > 1
    second = ShardWriter(killed, shards)
    assert same(second.read_back("t1"), tensors["t1"])
    assert not second.read_back("t0").view(torch.uint8).any()
    second.write("t0", tensors["t0"])
    second.write("t2", tensors["t2"].t().contiguous().t())  # any strides
    second.finish()
    for file in straight.glob("model*"):
        assert file.read_bytes() == (killed / file.name).read_bytes()


def test_killed_while_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_of([(torch.int32, [4]), (torch.int32, [4])])
    shards = plan_shards(specs_of(tensors), 16)
    first = ShardWriter(tmp_path, shards)
    for name, tensor in tensors.items():
        first.write(name, tensor)
    monkeypatch.setattr(writer, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.finish()
    monkeypatch.undo()
    (tmp_path / shards[1].file_name).rename(tmp_path / (shards[1].file_name + ".part"))  # one renamed, one not
    second = ShardWriter(tmp_path, shards)
    with pytest.raises(OutputError, match="is finished"):
        second.write("t0", tensors["t0"])
    assert same(second.read_back("t0"), tensors["t0"])
    second.finish()
    ShardWriter(tmp_path, shards).finish()  # and once more
    (tmp_path / "config.json").write_text("{}")
    assert same(open_checkpoint(str(tmp_path)).read("t1"), tensors["t1"])


def test_a_crash_while_a_part_is_made_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = plan_shards([TensorSpec("t", torch.int32, (4,))], 100)
    with monkeypatch.context() as patch:
        patch.setattr(part_file, "write_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ShardWriter(tmp_path, shards)
    assert not list(tmp_path.glob("*.part"))
    ShardWriter(tmp_path, shards).close()


def test_refuses_the_files_of_another_run(tmp_path: Path) -> None:
    ShardWriter(tmp_path, plan_shards([TensorSpec("t", torch.int32, (4,))], 100)).close()
    with pytest.raises(OutputError, match="model.safetensors.part: holds other tensors.*--restart"):
        ShardWriter(tmp_path, plan_shards([TensorSpec("other", torch.int32, (4,))], 100))


def test_wrong_tensors_and_doubled_plans_are_bugs(tmp_path: Path) -> None:
    spec = TensorSpec("t", torch.int32, (4,))
    with pytest.raises(ValueError, match="planned twice"):
        ShardWriter(tmp_path, [Shard("a.safetensors", (spec, spec))])
    shards = ShardWriter(tmp_path, plan_shards([spec], 100))
    with pytest.raises(ValueError, match=r"t is torch.int32 \[5\], planned torch.int32 \[4\]"):
        shards.write("t", torch.zeros(5, dtype=torch.int32))
    with pytest.raises(ValueError, match="float32"):
        shards.write("t", torch.zeros(4))


def test_full_disk_is_met_before_any_work(tmp_path: Path) -> None:
    huge = TensorSpec("huge", torch.float32, (1 << 46,))
    with pytest.raises(StorageError, match="model.safetensors.part"):
        ShardWriter(tmp_path, plan_shards([huge], 1 << 60))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "text"), [
    (errno.ENOSPC, r"the disk is full: tensor 't' needs 16 B and .* GB are free on /.*; make room, the same command"),
    (errno.EDQUOT, "the disk quota is used up"),
    (errno.EFBIG, "larger than this system lets a file be.*shard_gb"),
    (errno.EIO, "Input/output error; when that is mended, the same command then goes on"),
])
def test_failed_writes_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    shards = ShardWriter(tmp_path, plan_shards([TensorSpec("t", torch.int32, (4,))], 100))

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StorageError, match=text):
        shards.write("t", torch.zeros(4, dtype=torch.int32))
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError):
        shards.sync()


def test_missing_bytes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_bavail=2 * 10**6, f_frsize=1000, f_files=0))
    specs = [TensorSpec(name, torch.uint8, (5 * 10**9,)) for name in "ab"]
    with pytest.raises(StorageError, match=r"output needs 10 GB and 2 GB are free on .* \(8 GB are missing\)"):
        ShardWriter(tmp_path, plan_shards(specs, 1))
    (tmp_path / "model-00002-of-00002.safetensors.part").touch()  # has its room already
    with pytest.raises(StorageError, match=r"output needs 5 GB"):
        ShardWriter(tmp_path, plan_shards(specs, 1))


def test_a_file_system_without_reservations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    tensors = tensors_of([(torch.float16, [3, 4])])
    write(tmp_path, tensors)
    assert same(open_checkpoint(str(tmp_path)).read("t0"), tensors["t0"])


def test_file_size_limit_of_the_shell(tmp_path: Path) -> None:
    """A real EFBIG, in a process of its own because the limit cannot be raised again."""
    script = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from qtool.checkpoint.writer import *; from qtool.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: ShardWriter(Path(sys.argv[1]), plan_shards([TensorSpec('t', torch.uint8, (100000,))], 1 << 40))\n"
        "except StorageError as error: sys.exit(str(error))\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])
    assert "larger than this system lets a file be" in done.stderr, done.stderr


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """64 tensors of 4 MB are written and read; resident memory grows by few of them, not by 256 MB."""
    specs = [TensorSpec(f"t{index}", torch.float32, (1 << 20,)) for index in range(64)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shards = ShardWriter(tmp_path, plan_shards(specs, 1 << 26))
    for spec in specs:
        shards.write(spec.name, torch.ones(spec.shape))
    shards.finish()
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert all(float(checkpoint.read(spec.name).sum()) == 1 << 20 for spec in specs)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_bare_file_has_only_data_at_aligned_places(tmp_path: Path) -> None:
    tensors = tensors_of([(torch.uint8, [3]), (torch.bfloat16, [5, 7]), (torch.uint8, [LARGE]),
                          (torch.float32, [2])])
    shard = Shard("model.data", tuple(specs_of(tensors)), bare=True)
    for _ in range(2):  # the second goes on in the file of the first
        file = ShardWriter(tmp_path, [shard])
        for name, tensor in tensors.items():
            file.write(name, tensor)
        assert [file.place(name) for name in tensors] == [(0, 3), (64, 70), (4096, 1 << 20), (4096 + (1 << 20), 8)]
        assert all(same(file.read_back(name), tensor) for name, tensor in tensors.items())
        file.close()
    ShardWriter(tmp_path, [shard]).finish()
    raw = (tmp_path / "model.data").read_bytes()
    assert len(raw) == 4096 + (1 << 20) + 8 and raw[3:64] == bytes(61)
    assert raw[64:134] == tensors["t1"].view(torch.uint8).numpy().tobytes()
