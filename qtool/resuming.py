"""Which items of an export an earlier command has not written: every so many bytes the journal says how far it is.

The disk takes its time in a thread of its own: the line of the journal waits for it, what comes next does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from qtool.workspace import Workspace

WRITTEN = "weights"  # the stage of the journal after which no tensor is written again
SOME = "some weights"  # the stage that says how many are
RECORDED = 512 << 20  # bytes that are written between two lines of the journal
Item = TypeVar("Item")


def resumed(work: Workspace) -> bool:
    """Whether some of the files must be there."""
    return not work.finished.keys().isdisjoint((SOME, WRITTEN))


@contextmanager
def unwritten(work: Workspace, items: Sequence[Item], size: Callable[[Item], int], sync: Callable[[], None],
              notes: Callable[[], dict[str, Any]] = dict) -> Iterator[Iterator[tuple[int, Item]]]:
    """The items to write that an earlier command has not written, with their places.

    Every RECORDED bytes (size: of an item) what was written is made durable and recorded, with `notes` beside; sync:
    from any thread, makes durable what is written when it is called. All of this has ended when the context has.
    """
    first = len(items) if WRITTEN in work.finished else work.finished.get(SOME, {}).get("count", 0)
    pool = ThreadPoolExecutor(1)

    def durable(told: dict[str, Any]) -> None:
        sync()
        work.record(SOME, told)

    def each() -> Iterator[tuple[int, Item]]:
        since, last = 0, None
        for place, item in enumerate(items[first:], first):
            yield place, item
            since += size(item)
            if since >= RECORDED:
                if last is not None:
                    last.result()  # raises what it raised
                last, since = pool.submit(durable, {"count": place + 1, **notes()}), 0
        if last is not None:
            last.result()

    try:
        yield each()
    finally:
        pool.shutdown()
