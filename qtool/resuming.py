"""Which items of an export an earlier command has not written: every so many bytes the journal says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from qtool.workspace import Workspace

WRITTEN = "weights"  # the stage of the journal after which no tensor is written again
SOME = "some weights"  # the stage that says how many are
RECORDED = 256 << 20  # bytes that are written between two lines of the journal
Item = TypeVar("Item")


def resumed(work: Workspace) -> bool:
    """Whether some of the files must be there."""
    return not work.finished.keys().isdisjoint((SOME, WRITTEN))


def unwritten(work: Workspace, items: Sequence[Item], size: Callable[[Item], int], sync: Callable[[], None],
              notes: Callable[[], dict[str, Any]] = dict) -> Iterator[tuple[int, Item]]:
    """The items to write that an earlier command has not written, with their places.

    Every RECORDED bytes (size: of an item) what was written is made durable and recorded, with `notes` beside.
    """
    if WRITTEN in work.finished:
        return
    first, since = work.finished.get(SOME, {}).get("count", 0), 0
    for place, item in enumerate(items[first:], first):
        yield place, item
        since += size(item)
        if since >= RECORDED:
            sync()
            work.record(SOME, {"count": place + 1, **notes()})
            since = 0
