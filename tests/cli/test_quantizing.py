"""--dry-run with and without --probe, and --redo, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool import preflight
from tests.cli.conftest import Run

SMALL = ("--group-size", "32", "--samples", "4", "--sequence-length", "32")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_probe_shows_where_its_time_comes_from(run: Run, place: Path, model: Path) -> None:
    status, out, _ = run("quantize", model, *SMALL, "--dry-run", "--probe")
    assert status == 0 and "from block 0 in" in out and "disk, while running" in out
    assert not [path for path in place.iterdir() if "tiny" in path.name]
    status, out, err = run("quantize", model, *SMALL, "--dry-run", "--probe", "--json")
    told = json.loads(out)
    assert (status, err) == (0, "") and told["peak_memory"] >= told["probe"]["peak_memory"] > 50e6
    assert told["too_small"] == [] and told["files"].keys() == {"model.safetensors"}


def test_a_plan_for_too_small_a_machine_is_shown_and_fails(run: Run, place: Path, model: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "machine", lambda _: {"memory": 1 << 40, "gpu_memory": None, "disk": 1000})
    status, out, err = run("quantize", model, *SMALL, "--dry-run", "--json")
    assert status == 2 and [one["what"] for one in json.loads(out)["too_small"]] == ["disk"]
    assert "this machine is too small: the run needs" in err and "choose an --out on another disk" in err


def test_redo_on_the_command_line(run: Run, place: Path, model: Path) -> None:
    assert run("quantize", model, *SMALL, "--out", "done", "--quiet")[0] == 0
    words = ("quantize", model, "--out", "done", "--redo", "model.layers.1.*", "--redo", "*.2.mlp.*", "--bits", "8")
    status, out, _ = run(*words, "--dry-run")
    assert status == 0 and "10: int4-g32 → int8-g32" in out and "stay as they are" in out
    status, out, _ = run(*words)
    assert status == 0 and "Redid 10 of 21 linears" in out
    assert run("inspect", "done", "--verify")[0] == 0
    status, out, _ = run(*words, "--json")
    assert status == 0 and len(json.loads(out)["redone"]) == 1


def test_redo_on_kept_statistics_on_the_command_line(run: Run, place: Path, model: Path) -> None:
    words = ("quantize", model, *SMALL, "--out", "done", "--keep-statistics")
    status, out, _ = run(*words, "--dry-run")
    assert status == 0 and "disk, kept statistics" in out
    assert run(*words, "--quiet")[0] == 0
    again = ("quantize", model, "--out", "done", "--redo", "model.layers.1.*", "--bits", "8")
    status, out, _ = run(*again, "--dry-run")
    assert status == 0 and "none is run" in out and "those of the first run, without text" in " ".join(out.split())
    status, out, _ = run(*again, "--samples", "6", "--dry-run")
    assert status == 0 and "calibration.samples: 4 -> 6" in " ".join(out.split())
    status, out, err = run(*again, "--json")
    assert status == 0 and json.loads(out)["redone"][0]["statistics"] == "kept"
    assert run("inspect", "done", "--verify")[0] == 0
    status, out, err = run("quantize", model, "--method", "rtn", "--group-size", "32", "--keep-statistics", "--dry-run")
    assert status == 2 and "--keep-statistics: rtn chooses codes without text" in " ".join(err.split())


@pytest.mark.parametrize("words, message", [
    (["--redo", "*"], "give its folder with --out"), (["--probe"], "--probe goes with --dry-run"),
    (["--redo", "*", "--out", "nowhere"], "nowhere: --redo changes a finished output, and there is none"),
    (["--redo", "*", "--out", "x", "--dry-run", "--probe"], "leave it out with --redo")])
def test_flags_that_do_not_go_together(words: list[str], message: str, run: Run, place: Path, model: Path) -> None:
    status, out, err = run("quantize", model, *words)
    assert (status, out) == (2, "") and message in err


def test_the_end_tells_what_scaling_came_to(run: Run, model: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", model, "--method", "awq", "--group-size", "32", "--samples", "4", "--sequence-length", "32")
    status, out, _ = run(*command, "--out", tmp_path / "scaled")
    assert status == 0 and "scaled channels of 21 linears, by awq" in " ".join(out.split())
    monkeypatch.setattr("qtool.models.folds.find_folds", lambda *_: ([], True))
    status, out, _ = run(*command, "--out", tmp_path / "not")
    assert status == 0 and "awq did nothing: this model has no channels" in " ".join(out.split())
