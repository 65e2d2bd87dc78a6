"""Jobs on a local Ray cluster of two nodes. One is killed in mid-job: the other goes on, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parent.parent
MEMORY = 4 << 30


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its head runs nothing; the tests add nodes."""
    utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A jobs file of a long run, a short one and one that fails, for two folders of outputs."""
    tiny.make(tmp_path / "deep", "llama", num_hidden_layers=12)
    for out in ("there", "here"):
        (tmp_path / f"{out}.yaml").write_text(
            f"out: {out}\nset: {{scheme.group_size: 32, calibration.samples: 64, calibration.sequence_length: 128}}\n"
            "jobs:\n- {model: deep, method: gptq, cpus: 1}\n- {model: deep, method: rtn}\n"
            "- {model: nowhere, method: rtn}\n")
    return tmp_path


def jobs(place: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "qtool", "jobs", *words], cwd=place, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def written(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_lost_node(cluster: Any, place: Path) -> None:
    first = cluster.add_node(num_cpus=1, memory=MEMORY)
    with jobs(place, "there.yaml", "--ray", cluster.address, "--json") as process:
        wait_for(place / "there" / "deep-gptq.log", "block  3/12")
        assert (place / "there" / "deep-gptq.partial").is_dir()
        cluster.add_node(num_cpus=1, memory=MEMORY)
        cluster.remove_node(first, allow_graceful=False)
        told, said = process.communicate(timeout=900)
    assert process.returncode == 1, said
    summary = json.loads(told)
    assert [one["status"] for one in summary["jobs"]] == ["done", "done", "failed"], summary
    assert "nowhere: no such file or folder" in summary["jobs"][2]["message"]
    assert summary["jobs"][0]["peak_memory"] > 50e6 and summary["jobs"][0]["error"]["worst"] > 0
    log = (place / "there" / "deep-gptq.log").read_text()
    assert log.count("block  1/12") == 1 and log.count("going on with an unfinished run") == 1
    with jobs(place, "here.yaml", "--json") as process:
        process.communicate()
    for name in ("deep-gptq", "deep-rtn"):
        assert written(place / "here" / name) == written(place / "there" / name)


def test_what_no_node_has_is_a_failed_job_and_a_stop_ends_all(cluster: Any, place: Path) -> None:
    cluster.add_node(num_cpus=1, memory=MEMORY)
    text = (place / "there.yaml").read_text().replace("deep, method: rtn}", "deep, method: rtn, cpus: 64}")
    (place / "there.yaml").write_text(text)
    with jobs(place, "there.yaml", "--ray", cluster.address) as process:
        wait_for(place / "there" / "deep-gptq.log", "block  2/12")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 143 and "stopped by SIGTERM; finished blocks are kept" in said, said
    assert "no node of the cluster has 64 CPUs, 0 GPUs and" in said
    owner = json.loads((place / "there" / "deep-gptq.partial" / "lock").read_text() or "{}").get("pid")
    for _ in range(200):
        if owner is None or not Path(f"/proc/{owner}").exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {owner} goes on")


def test_no_cluster_there(place: Path) -> None:
    with jobs(place, "there.yaml", "--ray", "127.0.0.1:1") as process:
        told, said = process.communicate(timeout=200)
    assert process.returncode == 1 and "no Ray cluster can be joined there" in said and not told
