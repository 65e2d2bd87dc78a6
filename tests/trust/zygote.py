"""Forks `qtool` commands from a process that has imported what they need, so that a run costs its work and no start.

Reads one JSON object a line: words, folder, log (gets stdout and stderr), setup (Python that is run before).
Answers with the process id of the child, which is the leader of a group of its own, and with its status when asked:
{"wait": pid} waits, {"poll": pid} does not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import transformers.models.llama.tokenization_llama  # noqa: F401

from qtool import (  # noqa: F401
    cli,
    evaluating,
    export,
    export_gguf,
    export_imatrix,
    export_onnx,
    exports,
    jobs,
    pipeline,
    quantizing,
    redoing,
    retype,
)


def child(asked: dict[str, Any]) -> None:
    """Never returns."""
    os.setsid()
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(asked["folder"])
    torch.set_num_threads(1)
    exec(asked["setup"], {})
    status = 70
    try:
        cli.main(asked["words"])
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(pid: int, flags: int) -> int | None:
    """Exit status, or minus the number of the signal; None while it runs."""
    found, status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answers.write(json.dumps([ended(asked["wait"], 0), time.monotonic()]) + "\n")
        elif "poll" in asked:
            answers.write(json.dumps([ended(asked["poll"], os.WNOHANG), time.monotonic()]) + "\n")
        else:
            pid = os.fork()
            if pid == 0:
                child(asked)
            answers.write(json.dumps([pid, time.monotonic()]) + "\n")


if __name__ == "__main__":
    main()
