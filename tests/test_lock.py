"""Who may work in a directory, as seen from here and as if from another host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtool import lock
from qtool.errors import OutputError

ROOT = Path(__file__).parent.parent
HOLD = "import sys, time; from pathlib import Path; from qtool import lock\nlock.BEAT = 0.2\n" \
       "with lock.hold(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "STALE", 1.5)


def owned_by(path: Path, **changes: str) -> None:
    """The lock file as a process on another host leaves it."""
    path.write_text(json.dumps({"pid": 7, "host": "far", "boot": "another", **changes}))


def test_a_living_process_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"in use by process {process.pid} on "), lock.hold(path):
            pass
        process.kill()
        process.wait()
        began = time.monotonic()
        with lock.hold(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert time.monotonic() - began < 1  # one kernel: nothing to wait for


def test_the_lock_of_another_host_is_watched(tmp_path: Path) -> None:
    """Where flock does not reach it, only a touch tells that it lives; its own clock does not matter."""
    path = tmp_path / "lock"
    owned_by(path)
    os.utime(path, (1e9, 4e9))  # far in the future
    began = time.monotonic()
    with lock.hold(path):
        assert json.loads(path.read_text())["host"] != "far"
    assert time.monotonic() - began > 1.4
    owned_by(path)
    touch = "import os, sys, time\nfor _ in range(9): time.sleep(0.2); os.utime(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", touch, str(path)]):
        with pytest.raises(OutputError, match="in use by process 7 on far"), lock.hold(path):
            pass
        assert json.loads(path.read_text())["host"] == "far"


def test_one_who_ended_well_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock.hold(path):
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before  # a sign of life
    assert path.read_bytes() == b""
    began = time.monotonic()
    with lock.hold(path):
        pass
    assert time.monotonic() - began < 1


def test_a_lock_that_was_taken_over_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock.hold(path) as refuse_lost:
        refuse_lost()
        owned_by(path)
        with pytest.raises(OutputError, match="taken over by process 7 on far"):
            refuse_lost()


def test_a_directory_that_is_finished_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    owned_by(path)
    monkeypatch.setattr("time.sleep", lambda seconds: path.unlink())
    with pytest.raises(OutputError, match="finished or discarded by another process just now"), lock.hold(path):
        pass
