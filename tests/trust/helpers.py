"""The command line in processes of its own: run, killed, stopped; what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 300.0  # seconds that anything may take on a busy machine
# kills the process at its COUNT-th call of a function that changes what is on the disk, before it is done; a process
# that lives on says at its end how many there were
DEADLY_CALLS = """
import os, signal, sys
left = [COUNT]
def deadly(function):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for name in "rename replace fsync unlink remove mkdir rmdir link posix_fallocate ftruncate".split():
    setattr(os, name, deadly(getattr(os, name)))
leave = os._exit
def told(status):
    os.write(2, f"calls: {COUNT - left[0]}".encode())
    leave(status)
os._exit = told
"""
NEVER = 10**9


class Zygote:
    """Commands without their start-up (zygote.py). Use as a context manager."""

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trust.zygote"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"})
        return self

    def __exit__(self, *details: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, words: Sequence[object], folder: Path, setup: str = "") -> Running:
        log = folder / f"log-{time.monotonic_ns()}"
        pid, began = self.ask(words=[str(word) for word in words], folder=str(folder), log=str(log), setup=setup)
        return Running(self, pid, began, log)

    def run(self, words: Sequence[object], folder: Path, setup: str = "") -> Ended:
        return self.start(words, folder, setup).wait()


@dataclass
class Ended:
    """status: exit status, or minus the number of the signal that ended it.  said: stdout and stderr."""

    status: int
    said: str
    seconds: float


@dataclass
class Running:
    """A command, leader of a process group of its own."""

    zygote: Zygote
    pid: int
    began: float
    log: Path

    def wait(self) -> Ended:
        status, now = self.zygote.ask(wait=self.pid)
        return self._ended(status, now)

    def poll(self) -> Ended | None:
        status, now = self.zygote.ask(poll=self.pid)
        return None if status is None else self._ended(status, now)

    def until(self, ready: Callable[[], bool]) -> Ended | None:
        """Return when `ready` says so, or with the end of the command if that comes first."""
        limit = time.monotonic() + PATIENCE
        while not ready():
            if (ended := self.poll()) is not None:
                return ended
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.001)
        return None

    def send(self, number: int) -> None:
        os.killpg(self.pid, number)

    def _ended(self, status: int, now: float) -> Ended:
        said = self.log.read_text()
        self.log.unlink()
        return Ended(status, said, now - self.began)


def works_in(partial: Path, pid: int) -> Callable[[], bool]:
    """Whether the process has come to own this directory: planning is over."""
    def ready() -> bool:
        try:
            return bool(json.loads((partial / "lock").read_text())["pid"] == pid)
        except (OSError, ValueError):
            return False

    return ready


def contents(place: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it; a file alone is itself."""
    if place.is_file():
        return {place.name: place.read_bytes()}
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def calls(zygote: Zygote, words: Sequence[object], folder: Path) -> int:
    """How many calls of DEADLY_CALLS a command makes."""
    ended = zygote.run(words, folder, DEADLY_CALLS.replace("COUNT", str(NEVER)))
    assert ended.status == 0, ended.said
    return int(ended.said.rpartition("calls: ")[2])


@dataclass
class Case:
    """A command and what it works on.

    words: with {out} where the output goes.  partial: the folder that it works in, {out} again.  before: what lies in
    the output's place.  again: the exit status of the same command on a finished output.
    """

    words: tuple[str, ...]
    partial: str = "{out}.partial"
    suffix: str = ""
    before: Path | None = None
    again: int = 0

    def at(self, out: Path) -> list[str]:
        return [word.replace("{out}", str(out)) for word in self.words]

    def place(self, folder: Path) -> Path:
        """A fresh place for the output, alone in its folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        out = folder / f"out{self.suffix}"
        if self.before is not None:
            shutil.copytree(self.before, out)
        return out


@dataclass
class Whole:
    """What a case gives without interruption, and for how long it works."""

    files: dict[str, bytes]
    seconds: float


def uninterrupted(zygote: Zygote, case: Case, folder: Path, setup: str = "") -> Whole:
    """Run it twice: the outputs are equal, and the second tells how long the work takes once the files are cached."""
    files: list[dict[str, bytes]] = []
    for _ in range(2):
        out = case.place(folder)
        running = zygote.start(case.at(out), folder, setup)
        ended = running.until(works_in(Path(case.partial.replace("{out}", str(out))), running.pid))
        began = time.monotonic()
        ended = ended or running.wait()
        assert ended.status == 0, ended.said
        seconds = time.monotonic() - began
        files.append(contents(out))
        assert [path.name for path in folder.iterdir()] == [out.name]
    assert files[0] == files[1]
    return Whole(files[1], seconds)


def killed_at(zygote: Zygote, case: Case, folder: Path, seconds: float, setup: str = "") -> Ended:
    """Kill it this long after its work began; its end, which may be that it was done."""
    out = case.place(folder)
    running = zygote.start(case.at(out), folder, setup)
    ended = running.until(works_in(Path(case.partial.replace("{out}", str(out))), running.pid))
    if ended is None:
        time.sleep(seconds)
        running.send(signal.SIGKILL)
        ended = running.wait()
    return ended


def goes_on(zygote: Zygote, case: Case, folder: Path, whole: Whole, killed: Ended) -> Ended:
    """After a kill: what looks finished is finished, and the same command ends in the bytes of an uninterrupted run."""
    out = folder / f"out{case.suffix}"
    old = contents(case.before) if case.before is not None else {}
    if out.exists():
        assert contents(out) in (whole.files, old), "what looks finished is not"
    finished = out.exists() and contents(out) == whole.files
    ended = zygote.run(case.at(out), folder)
    assert ended.status == (case.again if finished else 0), (killed.said, ended.said)
    assert contents(out) == whole.files
    assert [path.name for path in folder.iterdir()] == [out.name], "something is left beside the output"
    return ended
