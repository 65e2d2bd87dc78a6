"""Runs qtool's command line where something is missing: room, permission, memory, files, threads.

As a program it is a server: it imports everything once, reads requests (lines of JSON) and answers each from a fork of
its own, so that a command takes tenths of a second. `Starver` starts one, with failing.c preloaded where a compiler is.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
SHIM = HERE / "failing.c"
TIMEOUT = 120  # seconds that one command may take


@dataclass(frozen=True)
class Done:
    """How a command ended. calls: that wrote below the folder.  failed: the call that was made to fail, else empty."""

    status: int
    out: str
    err: str
    calls: int
    failed: str


class Starver:
    """Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.shim = build_shim(folder)

    def __enter__(self) -> Starver:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                       "PYTHONPATH": str(HERE.parent)}
        if self.shim is not None:
            environment["LD_PRELOAD"] = str(self.shim)
        self._server = subprocess.Popen([sys.executable, str(Path(__file__))], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent)
        return self

    def __exit__(self, *details: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(TIMEOUT)

    def run(self, *arguments: object, folder: Path | None = None, number: int = 0, at: int = 0, persist: bool = True,
            **others: Any) -> Done:
        """One command. folder, number, at, persist: as failing.c has them.  others: stdout, stderr: see stream; cwd;
        powerless; limits, soft and hard, as the resource module calls them; script, run instead of the command line."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"arguments": [str(one) for one in arguments], "folder": str(folder or ""), "number": number,
                   "at": at, "persist": persist, **others}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def build_shim(folder: Path) -> Path | None:
    """failing.c compiled, None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    made = folder / "failing.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(made), str(SHIM), "-ldl"], check=True)
    return made


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import qtool.cli  # noqa: F401
    from qtool import (  # noqa: F401
        evaluating,
        export,
        export_gguf,
        export_imatrix,
        exports,
        inspecting,
        jobs,
        pipeline,
        quantizing,
        redo,
        redoing,
        report,
        report_plan,
        requantize,
        retype,
    )
    from qtool.checkpoint import gguf_writer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a fork; what it wrote on stdout and stderr comes back."""
    shared = mmap.mmap(-1, 8 + 4096)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if process == 0:
            status = 70
            try:
                os.dup2(stream(request.get("stdout"), out), 1)
                os.dup2(stream(request.get("stderr"), err), 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                status = obey(request, shared)
            finally:
                os._exit(status)
        _, status = os.waitpid(process, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {"status": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1],
            "calls": struct.unpack("l", shared[:8])[0], "failed": shared[8:].split(b"\0")[0].decode()}


def stream(kind: str | None, file: IO[bytes]) -> int:
    """The file, another one by its path, or "gone": a pipe that nobody reads."""
    if kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open(kind, os.O_WRONLY) if kind else file.fileno()


def obey(request: dict[str, Any], shared: mmap.mmap) -> int:
    """In the fork: the limits, then the command; returns its exit status."""
    import signal

    signal.alarm(TIMEOUT)
    if request.get("cwd"):
        os.chdir(request["cwd"])
    if request["folder"]:
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        ctypes.CDLL(None).starve(request["folder"].encode(), request["number"], ctypes.c_long(request["at"]),
                                 int(request["persist"]), ctypes.c_void_p(address), ctypes.c_void_p(address + 8))
    for name, value in (request.get("limits") or {}).items():
        soft = value + (address_space() if name == "RLIMIT_AS" else 0)
        resource.setrlimit(getattr(resource, name), (soft, soft))
    if request.get("powerless"):  # root, but with the permissions that files tell
        header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
        assert ctypes.CDLL(None).capset(header, none) == 0
    from qtool import cli

    try:
        if request.get("script"):
            exec(request["script"], {"ARGUMENTS": request["arguments"]})
        else:
            cli.main(request["arguments"])
    except SystemExit as stop:
        code = stop.code
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def address_space() -> int:
    """Bytes that this process has mapped: limits of RLIMIT_AS are given beyond them."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    serve()
