"""What is said of an error that nothing on the way has explained: memory, files, threads, disks; else it is a bug."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from qtool import heap, storage

BUG = "unexpected error"
THREADS = ("can't start new thread", "thread creation failed", "failed to spawn thread", "threadpoolbuilderror")
MEMORY = ("quantize needs less with fewer --samples, a smaller --set calibration.batch_tokens or memory_budget_gb, or "
          "--device cpu, and goes on where it stopped; eval with a shorter --context or --stream")


def described(error: BaseException) -> tuple[str, str]:
    """(message, title)"""
    text = " ".join(str(error).split())
    if heap.is_exhausted(error):
        return f"out of memory{f': {text[:200]}' if text else ''}; {MEMORY}", "error"
    if any(word in text.lower() for word in THREADS) or (isinstance(error, OSError) and error.errno == errno.EAGAIN):
        return (f"no more threads or processes can be had ({text[:200]}); raise the limit (ulimit -u, -v, pids.max of "
                f"the container) or use fewer threads (OMP_NUM_THREADS=1); {storage.CONTINUES}"), "error"
    if isinstance(error, OSError) and error.errno in (*storage.FULL, errno.EMFILE, errno.ENFILE):
        path = Path(error.filename if isinstance(error.filename, str) else tempfile.gettempdir())
        return str(storage.failed(error, path, "a temporary file", then=storage.AGAIN)), "error"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename or 'reading or writing failed'}: {error.strerror}", "error"
    return f"this is a bug in qtool: {type(error).__name__}: {text[:300]}", BUG
