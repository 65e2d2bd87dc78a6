"""Commands on a Ray cluster: each is a Ray task with its resources, on whichever node has them.

The folder that the command is given in lies on storage that all nodes share, and qtool is installed on each. Ray gives
the task of a lost worker or node to another one, where the command goes on from what is on the storage.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from qtool import processes
from qtool.errors import InputError, RunError
from qtool.processes import Ended, Task
from qtool.units import size

RETRIES = 3  # of a task whose worker or node was lost
PATIENCE = 10.0  # seconds that the head may take to answer
LOOK = 0.5  # seconds between two looks at what has ended


@contextmanager
def cluster(address: str) -> Iterator[Callable[[Sequence[Task]], Iterator[Ended]]]:
    """Join the cluster (auto, or HOST:PORT of its head); yields what runs tasks there. Raises InputError, RunError."""
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray; install it with: pip install 'qtool[ray]'") from None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit():  # of a head that is not there Ray tells after minutes
            socket.create_connection((host, int(port)), PATIENCE).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise RunError(f"--ray {address}: no Ray cluster can be joined there: {' '.join(str(error).split())[:300]}; "
                       "start one with: ray start --head") from None
    asked: list[int] = []
    for number in handlers:  # in Ray's calls an exception of a handler is lost
        signal.signal(number, lambda number, frame: asked.append(number))

    def stop() -> None:
        handler = handlers[signal.Signals(asked[0])] if asked else None
        if callable(handler):
            handler(asked[0], None)

    try:
        with redirect_stdout(sys.stderr):  # where Ray tells of lost nodes
            yield lambda tasks: _run(ray, tasks, stop)
    finally:
        ray.shutdown()  # ends what is still running
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run(ray: Any, tasks: Sequence[Task], stop: Callable[[], None]) -> Iterator[Ended]:
    """Each as it ends; stop() raises once a signal has come."""
    remote = ray.remote(processes.run)
    waiting = {}
    for task in tasks:
        if not _fits(ray, task):
            yield _failed(task, f"no node of the cluster has {task.cpus} CPUs, {task.gpus} GPUs and "
                                f"{size(task.memory)} of memory; give the job fewer cpus, or less to hold")
            continue
        asked = remote.options(num_cpus=task.cpus, num_gpus=task.gpus, memory=task.memory or None, max_retries=RETRIES,
                               name=" ".join(task.arguments)[:200])
        waiting[asked.remote(task)] = task
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK)
        stop()
        for ended in done:
            task = waiting.pop(ended)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayError as error:
                yield _failed(task, f"given up after {RETRIES + 1} tries: {' '.join(str(error).split())[:500]}")


def _fits(ray: Any, task: Task) -> bool:
    wanted = {"CPU": task.cpus, "GPU": task.gpus, "memory": task.memory}
    return any(node["Alive"] and all(node["Resources"].get(name, 0) >= count for name, count in wanted.items())
               for node in ray.nodes())


def _failed(task: Task, message: str) -> Ended:
    return Ended(task.number, 1, "", message, 0.0, 0, "")
