"""Work on tensors that is done in threads, ahead of the one that writes what comes of it, in order."""

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


def _in_order(pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterable[Item],
              waiting: int) -> Iterator[Made]:
    begun: deque[Future[Made]] = deque()
    for item in items:
        begun.append(pool.submit(make, item))
        if len(begun) == waiting:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
