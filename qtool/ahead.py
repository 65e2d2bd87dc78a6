"""Work on tensors that is done in threads, in order: ahead of the one that writes what comes of it, and behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


@contextmanager
def ahead(make: Callable[[Item], Made], items: Iterable[Item], threads: int, waiting: int) -> Iterator[Iterator[Made]]:
    """What `make` gives for each item, in order: at most `waiting` of them are in work or done and not taken yet.

    Meanwhile the ops run on one thread each, so that what lies between them is shared too; `make` must not depend on
    their number. On a machine, or with a setting, of one thread all is done in this one.
    """
    usual = torch.get_num_threads()
    if usual == 1:
        yield map(make, items)
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield _in_order(pool, make, items, waiting)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(usual)


class Behind:
    """Calls that are made in a thread, one after the other; `waiting` of them at most have not been made.

    What one of them raises is raised by a later `add`, or by `wait`. Leave the context with `wait` done: what was not
    made by then is not made. On a machine, or with a setting, of one thread each is made at once.
    """

    def __init__(self, waiting: int) -> None:
        self._waiting, self._begun = waiting, deque[Future[None]]()
        self._pool = ThreadPoolExecutor(1) if torch.get_num_threads() > 1 else None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, call: Callable[[], None]) -> None:
        if self._pool is None:
            call()
            return
        while len(self._begun) >= self._waiting:
            self._begun[0].result()
            self._begun.popleft()
        self._begun.append(self._pool.submit(call))

    def wait(self) -> None:
        """Until all that was added when this was called has been made; from any thread."""
        for one in tuple(self._begun):
            one.result()


def _in_order(pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterable[Item],
              waiting: int) -> Iterator[Made]:
    begun: deque[Future[Made]] = deque()
    for item in items:
        begun.append(pool.submit(make, item))
        if len(begun) == waiting:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
