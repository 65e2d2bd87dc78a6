"""Little room, memory, files, threads; streams that are full or closed: one message, the right status, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtool import pipeline, recipe, storage
from qtool.checkpoint import open_checkpoint
from qtool.outputs import make_plan
from tests import tiny
from tests.starving import Done, Starver, tree
from tests.test_pipeline import Silent

SMALL = ["--set", "scheme.group_size=32", "--set", "calibration.samples=8", "--set", "calibration.sequence_length=32",
         "--set", "calibration.batch_tokens=128"]
MB = 1 << 20
BAD = ("Traceback", "bug in qtool", "Exception ignored")


@pytest.fixture(scope="module")
def starver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starver]:
    with Starver(tmp_path_factory.mktemp("shim")) as made:
        yield made


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where other users may come too."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    made = tiny.make(place / "tiny", "llama", num_hidden_layers=2)
    for path in (made, *made.iterdir()):
        path.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def done(starver: Starver, model: Path) -> Path:
    out = model.with_name("done")
    assert starver.run("quantize", model, "--method", "gptq", "--out", out, *SMALL).status == 0
    return out


def clean(ended: Done) -> Done:
    assert not [word for word in BAD if word in ended.err], ended.err
    return ended


def failed(ended: Done) -> Done:
    assert clean(ended).status == 1 and ended.err.count("error: ") == 1, (ended.status, ended.err)
    return ended


@pytest.mark.parametrize("beyond", [1, 12, 24, 32])
def test_quantize_in_too_little_memory_goes_on_with_more(beyond: int, starver: Starver, model: Path, done: Path,
                                                         tmp_path: Path) -> None:
    command = ["quantize", model, "--method", "gptq", "--out", tmp_path / "out", *SMALL]
    ended = clean(starver.run(*command, limits={"RLIMIT_AS": beyond * MB}))
    if beyond <= 24 or ended.status:  # whether 32 MB suffice depends on the machine
        assert "out of memory" in failed(ended).err or "no more threads" in ended.err
        assert starver.run(*command).status == 0
    assert tree(tmp_path / "out") == tree(done)


def test_a_kernel_without_memory_is_a_memory_error(starver: Starver) -> None:
    """Allocations inside the kernels: in a thread of their own, and on the calling one."""
    script = """
import ctypes
import resource
from pathlib import Path
import torch
from qtool import heap, ops
assert ctypes.CDLL(None).mallopt(heap.M_MMAP_THRESHOLD, 1 << 16)  # what is free in the heap by chance is not used
weight, ones = torch.ones(16, 1 << 20), torch.ones(1 << 20)
held = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (20 << 20),) * 2)
try:
    ops.fit_affine(weight, ones, 1 << 20, 4, True, torch.float32)
except MemoryError as error:
    print('MemoryError')
"""
    if not __import__("qtool.ops").ops.native_available():
        pytest.skip("no compiled kernels")
    assert clean(starver.run(script=script)).out == "MemoryError\n"


def test_many_shards_need_few_open_files(starver: Starver, model: Path, tmp_path: Path) -> None:
    command = ["quantize", model, "--method", "rtn", "--out", tmp_path / "out", *SMALL[:2], "--set", "shard_gb=1e-6"]
    assert clean(starver.run(*command, limits={"RLIMIT_NOFILE": 20})).status == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 25
    export = starver.run("export", tmp_path / "out", "--to", "gptq", "--out", tmp_path / "b",
                         limits={"RLIMIT_NOFILE": 20})
    assert clean(export).status == 0
    shutil.rmtree(tmp_path / "out")
    told = clean(starver.run(*command, limits={"RLIMIT_NOFILE": 7}))  # whichever file is the first too many
    assert told.status in (1, 2) and "Too many open files" in told.err, told.err


def test_permission_that_is_taken_away(starver: Starver, model: Path, done: Path, place: Path) -> None:
    folder = place / "mine"
    folder.mkdir()
    command = ["quantize", model, "--method", "gptq", "--out", folder / "out", *SMALL]
    failed(starver.run(*command, powerless=True, limits={"RLIMIT_FSIZE": 60_000}))
    partial = folder / "out.partial"
    for path, mode in ((partial, 0o500), (partial / "journal.jsonl", 0o400), (partial, 0)):
        before = path.stat().st_mode
        path.chmod(mode)
        told = clean(starver.run(*command, powerless=True))
        path.chmod(before)
        assert told.status in (1, 2) and "Permission denied" in told.err and str(folder) in told.err, told
    assert starver.run(*command, powerless=True).status == 0 and tree(folder / "out") == tree(done)


def test_a_limit_on_file_sizes(starver: Starver, model: Path, done: Path, tmp_path: Path) -> None:
    command = ["quantize", model, "--method", "gptq", "--out", tmp_path / "out", *SMALL]
    for limit in (1000, 10_000, 20_000):
        told = failed(starver.run(*command, limits={"RLIMIT_FSIZE": limit}))
        assert "larger than this system lets a file be" in told.err and "ulimit -f" in told.err
    assert starver.run(*command).status == 0 and tree(tmp_path / "out") == tree(done)


@pytest.mark.parametrize("out", ["n" * 300, "n" * 253, "file/out"])
def test_an_output_that_has_no_place(out: str, starver: Starver, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = clean(starver.run("quantize", model, "--method", "rtn", "--out", tmp_path / out, *SMALL[:2]))
    assert told.status == 2 and "choose another --out" in told.err, told.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_of_stdout_that_goes(starver: Starver, done: Path) -> None:
    for more in ((), ("--json",), ("--csv",), ("--layers", "--heatmap")):
        ended = starver.run("inspect", done, *more, stdout="gone")
        assert (ended.status, ended.err) == (141, ""), ended


def test_a_full_disk_behind_stdout(starver: Starver, model: Path, tmp_path: Path) -> None:
    command = ["quantize", model, "--method", "rtn", "--out", tmp_path / "out", *SMALL[:2]]
    told = failed(starver.run(*command, stdout="/dev/full"))
    assert "cannot be written to stdout: No space left on device" in told.err
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("kind", ["gone", "/dev/full"])
def test_a_run_goes_on_when_nobody_reads_stderr(kind: str, starver: Starver, model: Path, done: Path,
                                                tmp_path: Path) -> None:
    command = ["quantize", model, "--method", "gptq", "--out", tmp_path / "out", *SMALL]
    assert starver.run(*command, stderr=kind).status == 0
    assert tree(tmp_path / "out") == tree(done)
    assert starver.run("quantize", model, "--method", "gptq", "--out", model, stderr=kind).status == 2


def test_streams_that_are_closed(model: Path, tmp_path: Path) -> None:
    """Their numbers would go to the first files that are opened, which then got what is said to people."""
    command = ["quantize", model, "--method", "rtn", "--out", "out", *SMALL[:2]]
    for folder, redirect in ((tmp_path / "a", ""), (tmp_path / "b", "<&- >&- 2>&-")):
        folder.mkdir()
        ended = subprocess.run(["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "qtool",
                                *map(str, command)], cwd=folder, capture_output=True, text=True, check=False,
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
        assert ended.returncode == 0, ended.stderr
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_full_disk_under_a_report_leaves_the_older_one(starver: Starver, done: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    (tmp_path / "page.html").write_text("older")
    told = failed(starver.run("inspect", done, "--report", tmp_path / "page.html", limits={"RLIMIT_FSIZE": 5000}))
    assert "page.html: the page" in told.err and "larger than this system lets a file be" in told.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "older"}


def test_evaluation_goes_on_without_its_cache(starver: Starver, model: Path, done: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    command = ["eval", done, "--against", model, "--text", text, "--windows", 2, "--context", 16, "--cache",
               tmp_path / "cache", "--json"]
    whole, starved = starver.run(*command[:-3], "--no-cache", "--json"), starver.run(
        *command, limits={"RLIMIT_FSIZE": 3000})
    assert whole.status == clean(starved).status == 0, (whole.err, starved.err)
    figures = [json.loads(ended.out)["models"][0]["kl"] for ended in (whole, starved)]
    assert figures[0] == figures[1] and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("target", ["gptq", "hf", "gguf", "onnx"])
def test_an_export_without_room_is_refused_with_the_numbers(target: str, starver: Starver, done: Path,
                                                            tmp_path: Path) -> None:
    script = """
import shutil, types
from qtool import cli, storage
storage.shutil = types.SimpleNamespace(disk_usage=lambda _: types.SimpleNamespace(free=1000))
cli.main(ARGUMENTS)
"""
    told = clean(starver.run("export", done, "--to", target, "--out", tmp_path / "out.gguf", script=script))
    assert told.status == 2 and "this machine is too small: this export needs" in told.err, told.err
    assert "and 1 kB are free" in told.err and "another disk" in told.err and not list(tmp_path.iterdir())


def test_activations_past_the_budget_lie_beside_the_output_and_go(model: Path, done: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """In files without names there; the bytes are those of a run in memory."""
    places: list[Path] = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr("qtool.models.streams.tempfile.TemporaryFile",
                        lambda dir, prefix: (places.append(Path(dir)), real(dir=dir, prefix=prefix))[1])
    settings = {"scheme.group_size": 32, "calibration.samples": 8, "calibration.sequence_length": 32,
                "calibration.batch_tokens": 128, "memory_budget_gb": 1e-9}
    checkpoint = open_checkpoint(str(model))
    plan = make_plan(checkpoint, recipe.override(recipe.preset("gptq"), settings), tmp_path / "out", "cpu")
    assert plan.memory["stream"] == 0 and plan.temporary["spilled"] > 0
    pipeline.run(checkpoint, plan, Silent())
    assert places and {*places} == {tmp_path / "out.partial"} and [*tmp_path.iterdir()] == [tmp_path / "out"]
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (done / weights).read_bytes()


def mounted(folder: Path, options: str) -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("options", ["size=100k", "size=8m,nr_inodes=5", "size=8m,nr_inodes=7"])
def test_a_small_file_system(options: str, starver: Starver, model: Path, done: Path, tmp_path: Path) -> None:
    """A real one: too small from the start, then without room for another file; enlarged, it is enough."""
    if not mounted(tmp_path, options):
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        command = ["quantize", model, "--method", "gptq", "--out", tmp_path / "out", *SMALL]
        told = clean(starver.run(*command))
        assert (told.status, "too small" in told.err) in ((2, True), (1, False)), told.err
        assert ("inodes are used up" in told.err) == ("nr_inodes" in options) and str(tmp_path) in told.err
        subprocess.run(["mount", "-o", "remount,size=8m,nr_inodes=100", tmp_path], check=True)
        assert starver.run(*command).status == 0 and tree(tmp_path / "out") == tree(done)
        assert storage.mount(tmp_path / "out" / "x") == tmp_path.resolve()
    finally:
        subprocess.run(["umount", tmp_path], check=True)
