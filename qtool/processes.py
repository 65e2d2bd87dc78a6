"""One qtool command in a process of its own: how it ended, what it said, how much memory it took.

Out of memory or a crash then ends that command and nothing else. A command does not outlive who started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TITLES = ("error: ", "unexpected error: ", "stopped: ")  # how a command's last message begins
PATIENCE = 60  # seconds that a command has to close its files in once it is told to stop
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Task:
    """A command with what it needs. log: gets all that it says; without, `said` has its stdout.  memory: bytes."""

    number: int
    arguments: tuple[str, ...]
    folder: Path
    log: Path | None = None
    cpus: int = 1
    gpus: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Ended:
    """status: exit status, or minus the number of the signal that ended it.  message: why it failed, else empty."""

    number: int
    status: int
    said: str
    message: str
    seconds: float
    peak_memory: int
    host: str


def run(task: Task) -> Ended:
    """Run `qtool ARGUMENTS` in the folder; returns when it has ended, however it ended."""
    began, host = time.monotonic(), socket.gethostname()
    try:
        with tempfile.TemporaryFile() as said, (
                (task.folder / task.log).open("a+b") if task.log else tempfile.TemporaryFile()) as told:
            start = told.seek(0, os.SEEK_END)
            status, peak = _run(task, told if task.log else said, told)
            told.seek(start)
            text = told.read().decode(errors="replace")
            said.seek(0)
            return Ended(task.number, status, said.read().decode(errors="replace"), _message(text, status),
                         time.monotonic() - began, peak, host)
    except OSError as error:
        return Ended(task.number, 1, "", f"{error.filename or task.folder} on {host}: {error.strerror}",
                     time.monotonic() - began, 0, host)


def one_by_one(tasks: Sequence[Task]) -> Iterator[Ended]:
    """Each task after the other, in this order."""
    yield from map(run, tasks)


def _run(task: Task, out: IO[bytes], err: IO[bytes]) -> tuple[int, int]:
    """(status, peak memory in bytes)"""
    libc = ctypes.CDLL(None)  # loaded before the fork

    def die_with_parent() -> None:
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)

    process = subprocess.Popen([sys.executable, "-m", "qtool", *task.arguments], cwd=task.folder,
                               stdin=subprocess.DEVNULL, stdout=out, stderr=err, preexec_fn=die_with_parent)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            _stop(process)
    return process.returncode, usage.ru_maxrss * 1024


def _stop(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _message(text: str, status: int) -> str:
    """The last message among the lines on stderr, or what is known of the end."""
    if status == 0:
        return ""
    if status < 0:
        name = signal.Signals(-status).name
        why = " (what the system does to a process when memory runs out)" if name == "SIGKILL" else ""
        return f"ended by {name}{why}"
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(TITLES)]
    said = "\n".join(lines[starts[-1]:] if starts else lines[-5:])
    return said.removeprefix("error: ") or f"ended with exit status {status}"
