"""Keeps freed memory for the next tensor of the same size; tells when there is none.

The C library gives large blocks back to the system at once and gets fresh pages for the next tensor, each of which the
kernel clears first. A forward pass that makes the same tensors for every batch spends a tenth of its time on that.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap

from qtool.units import size

EXHAUSTED = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory", "memoryerror",
             "failed to map segment")  # in messages of torch, C++, CUDA, Rust and the dynamic loader
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
MAPPED_FROM = 64 << 20  # bytes; larger blocks, such as weights, still go back when freed
TRIMMED_FROM = 128 << 20


def reuse() -> None:
    """Set glibc's thresholds for this process; does nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, MAPPED_FROM):
        mallopt(M_TRIM_THRESHOLD, TRIMMED_FROM)
        mallopt(M_ARENA_MAX, 1)  # threads would get heaps of their own, which keep next to nothing


def settle() -> None:
    """Once all modules are there: the collector, which finds no garbage in them, need not look through them again."""
    if not gc.get_freeze_count():
        gc.freeze()


def reserve(count: int) -> None:
    """Raise MemoryError where `count` bytes cannot be had, before a library is called that would end the process."""
    try:
        mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise MemoryError(f"{size(count)} are needed") from None


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in whatever way."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or any(word in str(error).lower() for word in EXHAUSTED))


def raise_exhausted(error: BaseException) -> None:
    """For handlers of what other libraries raise: memory that ran out is no fault of what they were given."""
    if is_exhausted(error):
        raise MemoryError(str(error)) from None


def give_back() -> None:
    """Return what is free to the system, between two blocks: what one needed for solving is not kept for the next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
