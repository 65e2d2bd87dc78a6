"""Files that are whole or not there, and the sentences for what cannot be written."""

from __future__ import annotations

import errno
import os
import re
import types
from pathlib import Path

import pytest

from qtool import failures, heap, storage
from qtool.errors import PlanError, QtoolError


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "the disk is full: the page needs 1.23 kB and .* are free on /.*; make room, the same command"),
    (errno.EDQUOT, "the disk quota is used up: the page needs 1.23 kB"),
    (errno.EFBIG, r"\(1.23 kB\) is larger than this system lets a file be .*ulimit -f.*; raise the limit"),
    (errno.EROFS, "the file system /.* is read-only; when that is mended"),
    (errno.EMFILE, "Too many open files; raise the limit .ulimit -n., the same command"),
    (errno.EIO, "cannot be written: Input/output error; when that is mended, the same command then goes on"),
    (errno.EACCES, "cannot be written: Permission denied; when that is mended"),
])
def test_a_failed_write_names_the_file_the_file_system_and_the_remedy(number: int, words: str, tmp_path: Path) -> None:
    told = storage.failed(OSError(number, os.strerror(number)), tmp_path / "a.html", "the page", 1234)
    assert told.exit_status == 1
    with pytest.raises(QtoolError, match=f"^{tmp_path}/a.html: .*{words}"):
        raise told


def test_a_disk_without_inodes_is_not_called_full_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = types.SimpleNamespace(f_bavail=1000, f_frsize=4096, f_files=10, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda _: told)
    assert "can hold no more files (its inodes are used up)" in str(
        storage.failed(OSError(errno.ENOSPC, ""), tmp_path / "a", "a file", 10))


def test_what_is_missing_is_counted(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"too small: this needs 1e\+12 GB|too small: this needs 1,000,000,000,000 GB"):
        storage.refuse_full(tmp_path / "out", 10**21, "this", ["buy a disk"])
    storage.refuse_full(tmp_path / "out", 1, "this", [])


def test_room_that_an_unfinished_run_has_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert storage.free(tmp_path / "out") == 1000
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "part").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
    assert storage.free(tmp_path / "out") >= 1000 + (1 << 20)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(tmp_path / "a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CIFS and some FUSE file systems; a failing disk is another thing."""
    number = errno.EINVAL

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    storage.sync_folder(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        storage.sync_folder(tmp_path)


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "out of memory; quantize needs less"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory: Def"),
    (RuntimeError("std::bad_alloc"), "out of memory"),
    (ImportError("libtorch.so: failed to map segment from shared object"), "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    (RuntimeError("can't start new thread"), "no more threads or processes can be had.*OMP_NUM_THREADS=1"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more threads or processes"),
    (OSError(errno.ENOSPC, "No space left on device"), "/.*: the disk is full: there is no room for a temporary file"),
    (OSError(errno.EMFILE, "Too many open files", "/a/b"), "/a/b: a temporary file cannot be opened.*ulimit -n"),
    (OSError(errno.EIO, "Input/output error"), "reading or writing failed: Input/output error"),
])
def test_what_nothing_else_explains(error: Exception, words: str) -> None:
    message, title = failures.described(error)
    assert re.match(words, message) and title == "error" and "bug" not in message


def test_a_bug_is_called_one() -> None:
    assert failures.described(KeyError("surprise")) == ("this is a bug in qtool: KeyError: 'surprise'", failures.BUG)


def test_memory_is_no_fault_of_a_config() -> None:
    with pytest.raises(MemoryError):
        heap.raise_exhausted(RuntimeError("std::bad_alloc"))
    heap.raise_exhausted(RuntimeError("some other thing"))
