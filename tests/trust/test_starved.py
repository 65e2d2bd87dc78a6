"""No room, a failing disk, a read-only one: whatever call fails, the command ends with one message and status 1; the
same command ends in the bytes of a run in which nothing failed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.starving import Done, Starver, tree

pytestmark = pytest.mark.trust
SMALL = ["--set", "scheme.group_size=32", "--set", "calibration.samples=8", "--set", "calibration.sequence_length=32",
         "--set", "calibration.batch_tokens=128"]
OUTPUTS = ("steps: [gptq]\nscheme: {bits: 4, group_size: 32}\ncalibration: {samples: 8, sequence_length: 32}\n"
           "outputs: [{name: a}, {name: b, scheme: {bits: 8, group_size: 32}}]\n")
POINTS = {  # command: how many of the calls that write are made to fail, spread over them
    "rtn": 12, "gptq": 8, "awq": 3, "outputs": 4, "gguf": 5, "requantize": 3, "to-gptq": 6, "to-hf": 3,
    "to-gguf": 5, "to-onnx": 3, "to-imatrix": 4, "redo": 5}


@pytest.fixture(scope="module")
def starver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starver]:
    with Starver(tmp_path_factory.mktemp("shim")) as made:
        if made.shim is None:
            pytest.skip("needs a C compiler on Linux")
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("starved") / "tiny", "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def finished(starver: Starver, model: Path) -> Path:
    """A quantized model, for what begins with one."""
    out = model.with_name("done")
    assert starver.run("quantize", model, "--method", "gptq", "--out", out, *SMALL).status == 0
    return out


def words(name: str, model: Path, place: Path) -> list[object]:
    """The command; it writes below `place`, where a redo has a finished output already."""
    (model.parent / "outputs.yaml").write_text(OUTPUTS)
    done = model.with_name("done")
    return {
        "rtn": ["quantize", model, "--method", "rtn", "--out", place / "out", *SMALL[:2], "--set", "shard_gb=0.00006"],
        "gptq": ["quantize", model, "--method", "gptq", "--out", place / "out", *SMALL, "--set",
                 "memory_budget_gb=0.000001"],
        "awq": ["quantize", model, "--method", "awq", "--out", place / "out", *SMALL],
        "outputs": ["quantize", model, "--recipe", model.parent / "outputs.yaml", "--out", place / "out"],
        "gguf": ["quantize", model, "--method", "q8_0", "--out", place / "out"],
        "requantize": ["export", done, "--to", "mlx", "--requantize", "int4-g32", "--out", place / "out"],
        "to-gptq": ["export", done, "--to", "gptq", "--out", place / "out"],
        "to-hf": ["export", done, "--to", "hf", "--out", place / "out"],
        "to-gguf": ["export", done, "--to", "gguf", "--type", "f16", "--out", place / "out.gguf"],
        "to-onnx": ["export", done, "--to", "onnx", "--out", place / "out"],
        "to-imatrix": ["export", model, "--to", "imatrix", "--samples", 4, "--sequence-length", 32, "--out",
                       place / "out.gguf"],
        "redo": ["quantize", model, "--method", "gptq", "--out", place / "done", *SMALL, "--redo",
                 "*.layers.1.mlp.down_proj", "--bits", "8"],
    }[name]


def fresh(place: Path, name: str, finished: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if name == "redo":
        shutil.copytree(finished, place / "done")


def said(done: Done) -> None:
    """One message, of the right kind."""
    refused = done.status == 2 and "choose another --out" in done.err  # at the first touch of the place
    assert done.status == 1 or refused, (done.failed, done.status, done.err)
    assert done.err.count("error: ") == 1, done.err
    assert not [word for word in ("Traceback", "bug in qtool", "Exception ignored") if word in done.err], done.err


@pytest.mark.parametrize("name", POINTS)
def test_a_disk_that_is_full_from_some_call_on(name: str, starver: Starver, model: Path, finished: Path,
                                               tmp_path: Path) -> None:
    place = tmp_path / "place"

    def command(**others: object) -> Done:
        return starver.run(*words(name, model, place), folder=place, **others)  # type: ignore[arg-type]

    each(name, command, lambda: fresh(place, name, finished), place, errno.ENOSPC, POINTS[name], True)


@pytest.mark.parametrize(("name", "number", "points"), [
    ("gptq", errno.EIO, 4), ("rtn", errno.EDQUOT, 4), ("to-gptq", errno.EROFS, 3), ("redo", errno.EIO, 3)])
def test_one_call_that_fails(name: str, number: int, points: int, starver: Starver, model: Path, finished: Path,
                             tmp_path: Path) -> None:
    place = tmp_path / "place"

    def command(**others: object) -> Done:
        return starver.run(*words(name, model, place), folder=place, **others)  # type: ignore[arg-type]

    each(name, command, lambda: fresh(place, name, finished), place, number, points, False)


def each(name: str, command: Callable[..., Done], prepare: Callable[[], None], place: Path, number: int, points: int,
         persist: bool) -> None:
    """Fail at call after call, go on, compare."""
    prepare()
    whole = command()
    assert whole.status == 0, whole.err
    wanted = tree(place)
    step = max(1, whole.calls // points)
    for at in range(1 + whole.calls % step, whole.calls + 1, step):
        prepare()
        starved = command(number=number, at=at, persist=persist)
        if starved.status:  # else it was finished, and the lock alone could not be emptied
            said(starved)
            assert number in (errno.EIO, errno.EROFS) or "make room" in starved.err, starved.err
        again = command()
        assert again.status == 0 or "exists and is not empty" in again.err, (at, starved.failed, again.err)
        found = tree(place)
        assert found == wanted, (name, at, starved.failed, [one for one in {*found, *wanted}
                                                            if found.get(one) != wanted.get(one)])
