"""Many runs from one file: what is done, what is left out, what a failed one does to the others."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qtool import jobs, processes, recipe
from qtool.errors import RecipeError
from tests import tiny
from tests.cli.conftest import Run
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent.parent
SET = "set: {scheme.group_size: 32, calibration.samples: 8, calibration.sequence_length: 32}\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def written(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def status_of(summary: dict[str, Any]) -> dict[str, str]:
    return {Path(entry["out"]).name: entry["status"] for entry in summary["jobs"]}


def test_a_bad_job_stops_no_other_and_a_rerun_does_what_is_missing(run: Run, place: Path, model: Path) -> None:
    Path("jobs.yaml").write_text(
        f"out: many\n{SET}jobs:\n  models: [{model}, ./missing]\n  recipes:\n"
        "  - {method: gptq, name: int3, set: {scheme.bits: 3}}\n")
    status, out, err = run("jobs", "jobs.yaml", "--json")
    summary = json.loads(out)
    assert status == 1 and "1 of 2 jobs failed: many/missing-int3; the same command again does" in err
    assert status_of(summary) == {"tiny-int3": "done", "missing-int3": "failed"}
    assert (summary["done"], summary["failed"], summary["already_there"]) == (1, 1, 0)
    assert json.loads(Path("many/jobs-summary.json").read_text())["jobs"] == summary["jobs"]
    entry = summary["jobs"][0]
    made = json.loads(Path("many/tiny-int3/manifest.json").read_text())
    worst = max(made["layers"], key=lambda layer: layer["relative_error"])
    assert entry["error"]["worst"] == worst["relative_error"] and entry["error"]["worst_name"] == worst["name"]
    assert entry["weight_bytes"] == made["totals"]["weight_bytes"] and made["recipe"]["scheme"]["bits"] == 3
    assert entry["seconds"] > 0 and entry["peak_memory"] > 50e6 and "block 3/3" in Path(entry["log"]).read_text()
    assert "./missing: no such file or folder" in summary["jobs"][1]["message"]
    # the same bytes as the command alone, whatever ran beside it
    assert run("quantize", model, "--bits", 3, "--group-size", 32, "--samples", 8, "--sequence-length", 32, "--out",
               "many/alone", "--quiet")[0] == 0
    before = written(place / "many" / "tiny-int3")
    assert written(place / "many" / "alone") == before

    tiny.make(place / "missing", "llama", num_hidden_layers=1)
    Path("jobs.yaml").write_text(
        f"out: many\n{SET}jobs:\n- {{model: {model}, method: gptq, name: int3, set: {{scheme.bits: 3}}}}\n"
        f"- {{model: {model}, method: gptq, out: alone}}\n- {{model: missing, recipe: rtn-int4}}\n")
    status, out, err = run("jobs", "jobs.yaml", "--json")
    summary = json.loads(out)
    assert status == 1 and status_of(summary) == {"tiny-int3": "already there", "alone": "failed",
                                                  "missing-rtn-int4": "done"}
    assert "alone holds something else: recipe.scheme.bits: 3 -> 4; remove it" in summary["jobs"][1]["message"]
    assert written(place / "many" / "tiny-int3") == before == written(place / "many" / "alone")
    assert summary["jobs"][0]["error"] == entry["error"] and summary["jobs"][0]["seconds"] is None
    text = Path("jobs.yaml").read_text().replace("out: alone", "out: alone, set: {scheme.bits: 3}")
    Path("jobs.yaml").write_text(text)
    status, out, err = run("jobs", "jobs.yaml")
    assert status == 0 and out.count("already there") == 3, out + err


def test_dry_run_plans_and_writes_nothing(run: Run, place: Path, model: Path) -> None:
    Path("jobs.yaml").write_text(f"out: many\n{SET}jobs: [{{model: {model}, method: rtn, out: a}}]\n")
    status, out, _ = run("jobs", "jobs.yaml", "--dry-run", "--json")
    entry = json.loads(out)["jobs"][0]
    assert status == 0 and entry["status"] == "waiting" and entry["planned_memory"] > 0 and entry["out"] == "many/a"
    assert sorted(path.name for path in place.iterdir()) == ["jobs.yaml"]


@pytest.mark.parametrize(("text", "message"), [
    ("jobs: {models: [a], recipes: [nf4, {recipe: nf4, set: {scheme.double_quant: true}}]}",
     "jobs 1 and 2 would both write to a-nf4; give one of them an out, or its recipe a name"),
    ("jobs: [{model: a, method: rtn, out: x}, {model: b, method: rtn, out: ./y/../x}]", "would both write to"),
    ("jobs: [{model: a}]", "jobs.0: a job has recipe .* or method, one of the two"),
    ("jobs: [{model: a, method: rtn, recipe: nf4}]", "one of the two"),
    ("jobs: [{model: a, method: rtn, bits: 3}]", "unknown key 'jobs.0.bits'"),
    ("jobs: {models: [], recipes: [nf4]}", "models: .*at least 1"),
    ("jobs: []", "jobs: .*at least 1"), ("models: [a]", "jobs: Field required"), ("- a", "a jobs file: "),
    ("jobs: [", "not valid YAML"),
])
def test_bad_files(text: str, message: str, place: Path) -> None:
    Path("jobs.yaml").write_text(text)
    with pytest.raises(RecipeError, match=rf"jobs\.yaml: .*{message}"):
        jobs.load(Path("jobs.yaml"))


def test_a_missing_file(run: Run, place: Path) -> None:
    assert run("jobs", "no.yaml") == (2, "", "error: jobs file no.yaml does not exist\n")


def test_the_example_is_a_jobs_file_and_no_recipe() -> None:
    made = jobs.load(ROOT / "recipes" / "jobs" / "example.yaml")
    assert [job.output for job in made.jobs][:3] == ["Qwen3-8B-gptq-int4", "Qwen3-8B-nf4-dq", "Qwen3-8B-rtn"]
    assert "example" not in recipe.available()


def deep(place: Path) -> list[str]:
    """The words of a run that takes a while."""
    tiny.make(place / "deep", "llama", num_hidden_layers=8)
    return ["--group-size", "32", "--samples", "32", "--sequence-length", "128", "--", "deep"]


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def gone(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_killed_job_is_a_failed_job_and_a_rerun_goes_on(place: Path) -> None:
    deep(place)
    Path("jobs.yaml").write_text("jobs:\n- {model: deep, method: gptq, out: out, set: {scheme.group_size: 32, "
                                 "calibration.samples: 32, calibration.sequence_length: 128}}\n"
                                 f"- {{model: deep, method: rtn, out: rounded, {SET.strip()}}}\n")
    command = [sys.executable, "-m", "qtool", "jobs", "jobs.yaml"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        wait_for(place / "out.log", "block 1/8")
        os.kill(child_of(process.pid), signal.SIGKILL)
        assert process.stdout is not None
        summary = json.loads(process.stdout.read())
    assert process.returncode == 1 and status_of(summary) == {"out": "failed", "rounded": "done"}
    assert summary["jobs"][0]["message"].startswith("ended by SIGKILL (what the system does")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(place / "out.log", "block 3/8")
        child = child_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "stopped by SIGTERM; finished blocks are kept" in process.stderr.read()
    assert process.returncode == 143 and gone(child)
    summary = json.loads(Path("jobs-summary.json").read_text())
    assert status_of(summary) == {"out": "waiting", "rounded": "already there"}
    log = Path("out.log").read_text()
    assert log.count("block 1/8") == 1 and log.count("going on with an unfinished run") == 1


def test_a_command_does_not_outlive_who_started_it(place: Path) -> None:
    words = ("quantize", "--out", "out", *deep(place))
    code = (f"from pathlib import Path; from qtool.processes import Task, run; "
            f"run(Task(0, {words!r}, Path('.'), Path('out.log')))")
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_for(place / "out.log", "block 1/8")
        child = child_of(process.pid)
        process.kill()
    for _ in range(2000):
        if gone(child):
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")


def test_what_a_process_says_last(place: Path) -> None:
    ended = processes.run(processes.Task(0, ("inspect", "nope"), place))
    assert ended.status == 2 and ended.message.startswith("nope: no such file or folder") and ended.peak_memory > 0
    ended = processes.run(processes.Task(0, ("--version",), place))
    assert (ended.status, ended.message) == (0, "") and ended.said.startswith("qtool ")
    ended = processes.run(processes.Task(0, ("--version",), place / "nowhere"))
    assert ended.status == 1 and "nowhere" in ended.message and "No such file" in ended.message
