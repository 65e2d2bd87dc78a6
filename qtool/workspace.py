"""The directory OUT.partial/ in which a run works: a lock, a journal of finished stages, and the rename at the end.

The journal (journal.py) has first the run's identity, then one line per finished stage. A line is written only after
everything that it speaks of is on the disk, so a kill loses at most the stage under way. It goes when all is done, just
before the folder gets its name: a folder with a manifest and no journal lacks but that name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from qtool import journal, lock, manifest, storage
from qtool.errors import CheckpointError, OutputError, StorageError, printable

LOCK = "lock"
SCRATCH = (journal.NAME, LOCK)
NAMED = "named"  # the stage of the journal after which a single file has or gets its name


class Workspace:
    """Use as a context manager; `finished` maps stage names to what their journal lines tell.

    An OSError that nothing inside has explained leaves it as a StorageError.
    """

    def __init__(self, out: Path, identity: dict[str, Any], restart: bool = False) -> None:
        self.out = out
        self.folder = _partial(out)
        self.identity = identity
        self.restart = restart
        self.finished: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Workspace:
        recover(self.out)
        refuse_existing(self.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage.unusable(error, self.folder, "cannot be made", "--out") from None
        with contextlib.ExitStack() as held:
            try:
                self._refuse_lost = held.enter_context(lock.hold(self.folder / LOCK))
                self._refuse_finished()
                self._refuse_foreign()
                if self.restart:
                    self._clear()
                self._read_journal()
            except OSError as error:
                raise storage.unusable(error, self.folder, "is not writable", "--out") from None
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._held.close()
        if isinstance(value, OSError):
            raise self._explained(value) from None

    def _explained(self, error: OSError) -> StorageError:
        """Of a call that no one has an own message for: copying, naming, removing files."""
        path = Path(error.filename2 or error.filename or self.folder)
        return storage.failed(error, path if path.is_absolute() else self.folder, "the output")

    def record(self, stage: str, result: dict[str, Any]) -> None:
        """Add a finished stage; on return it will not be done again. Raises OutputError if the lock was lost."""
        self._refuse_lost()
        self.finished[stage] = result
        self._append({"stage": stage, **result})

    def refuse_strays(self, names: Iterable[str], inside: str = "") -> None:
        """Raise OutputError for what is in the folder, or in one inside it, beside `names`, card and manifest: it would
        become a part of the output. Half written parts of these, from before a kill, are removed."""
        folder = self.folder / inside
        known = {*names, "README.md", manifest.NAME, *(() if inside else SCRATCH)}
        for path in sorted(folder.iterdir()):
            if path.name.removesuffix(storage.PART) not in known:
                raise OutputError(f"{path} was not written by this run and would become a part of {self.out}; move it "
                                  "elsewhere and give the same command again, which then ends at once")
            if path.name not in known:
                path.unlink()

    def complete(self) -> None:
        """Make everything durable, drop the scratch files and give the directory its final name."""
        for path in sorted(self.folder.rglob("*")):
            storage.sync_folder(path)
        (self.folder / journal.NAME).unlink()
        storage.sync_folder(self.folder)
        refuse_existing(self.out)
        _name(self.folder, self.out)

    def complete_file(self, name: str) -> None:
        """Give the file `name` of the folder the name of the output, and drop the folder."""
        if NAMED not in self.finished:
            self.record(NAMED, {})
        refuse_existing(self.out)
        (self.folder / name).rename(self.out)
        storage.sync_folder(self.out.parent)
        shutil.rmtree(self.folder)

    def _refuse_finished(self) -> None:
        """Raise OutputError where another process finished the output while this one came to the lock."""
        try:
            refuse_existing(self.out)
        except OutputError:
            if not any(path.name != LOCK for path in self.folder.iterdir()):
                shutil.rmtree(self.folder)  # made by this process
            raise

    def _refuse_foreign(self) -> None:
        """A folder that only has the name of an unfinished run may hold what nobody wants to lose."""
        foreign = sorted(path.name for path in self.folder.iterdir() if path.name != LOCK)
        if foreign and not {journal.NAME, manifest.NAME} & {*foreign}:
            raise OutputError(f"{self.folder} holds {printable(foreign[0])} and no journal, so it is no unfinished run "
                              "of qtool; move it away, or choose another --out")

    def _clear(self) -> None:
        """Empty the folder; the journal goes last: without it, what is left could seem to be finished."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == journal.NAME):
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _read_journal(self) -> None:
        path = self.folder / journal.NAME
        entries, whole = journal.read(path)
        if not entries:
            self._clear()
            self._append({"identity": self.identity})
            return
        if path.stat().st_size > whole:  # a last line without its newline was cut off by a kill
            os.truncate(path, whole)
        manifest.refuse_other_run(entries[0]["identity"], json.loads(json.dumps(self.identity)), self.folder)
        self.finished = {entry.pop("stage"): entry for entry in entries[1:]}

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            with (self.folder / journal.NAME).open("ab") as file:
                file.write(journal.line(entry))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage.failed(error, self.folder, "the journal") from None


def recover(out: Path, source: Path | None = None) -> None:
    """End what an earlier run was killed in: a folder that lacks only its name gets it; what is left beside a finished
    file is removed.

    Raises OutputError where a living process is about to do so, where it cannot be done, and for an output that can
    have no such name or is in the folder `source`.
    """
    _refuse_place(out, source)
    folder = _partial(out)
    if not (folder.is_dir() and (_lacks_its_name(folder) or _left_over(folder, out))):
        return
    try:
        with lock.hold(folder / LOCK):
            if _lacks_its_name(folder):
                refuse_existing(out)
                _name(folder, out)
            elif _left_over(folder, out):
                shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"{folder}: what an earlier command left there cannot be finished: {error.strerror}; remove "
                          "it, or choose another --out") from None


def file_place(out: Path | None, name: str, source: Path) -> Path:
    """The file that a command is to write, and has not: `out` where it ends as `name` does, else `name` in the folder
    `out`. What an earlier run left is ended first (see recover). source: the folder it must not be in.

    Raises OutputError, also for a file that is there.
    """
    path = Path(name) if out is None else out if out.suffix.lower() == Path(name).suffix else out / name
    recover(path, source)
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists; remove it or choose another --out")
    return path


def _lacks_its_name(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file() and not (folder / journal.NAME).exists()


def _left_over(folder: Path, out: Path) -> bool:
    """Whether the folder is what is left after its file became the output."""
    if not out.is_file():
        return False
    try:
        entries, _ = journal.read(folder / journal.NAME)
    except OutputError:
        return False
    return not entries or entries[-1].get("stage") == NAMED


def _name(folder: Path, out: Path) -> None:
    """The last step: all else is durable."""
    (folder / LOCK).unlink(missing_ok=True)
    storage.sync_folder(folder)
    if out.exists():
        out.rmdir()  # empty, as just checked
    folder.rename(out)
    storage.sync_folder(out.parent)


def already(out: Path, source: Path, identity: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The manifest of the output where this very run has finished it before; None where there is none.

    Raises OutputError where something else is in its place."""
    recover(out, source)
    if not (out / manifest.NAME).is_file() or out.is_symlink():
        refuse_existing(out)
        return None
    where, differs = state(out, identity)
    if where == "other":
        raise OutputError(f"{out} exists and is not empty, and does not hold what this command makes:\n  "
                          + "\n  ".join(differs[:20]) + "\nremove it or choose another --out")
    return manifest.load(out) if where == "finished" else None


def state(out: Path, identity: Callable[[], dict[str, Any]]) -> tuple[str, list[str]]:
    """What lies in the output's place: "absent", "unfinished" or "finished", or "other" things; with what differs from
    a run of this identity (computed where it is needed). A finished output without differences is that run's."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        try:
            there = manifest.load(out)
        except CheckpointError as error:
            return "other", [str(error)]
        now = json.loads(json.dumps(identity()))
        now.pop(manifest.ARITHMETIC, None)  # whatever computed it, it is there
        changed = manifest.differences({key: there.get(key) for key in now}, now)
        lost = [f"{name} is missing" for name in there.get("outputs", {}) if not (out / name).is_file()]
        return ("other", [*changed, *lost]) if changed or lost else ("finished", [])
    try:
        before = unfinished(out)
    except OutputError as error:
        return "unfinished", [str(error)]
    if before is None:
        return "absent", []
    return "unfinished", manifest.differences(before, json.loads(json.dumps(identity()))) if before else []


def unfinished(out: Path) -> dict[str, Any] | None:
    """The identity of the unfinished run of an output ({}: it has none yet); None where there is no such run.

    Raises OutputError for a journal that cannot be read."""
    path = _partial(out) / journal.NAME
    try:
        return journal.identity(path) or {} if path.is_file() else None
    except OSError:  # a name that is too long: refuse_existing says so
        return None


def refuse_inside(out: Path, source: Path) -> None:
    """Raise OutputError for an output in the folder that is read, and for one whose work would empty that folder."""
    inside, place, partial = (Path(os.path.realpath(path)) for path in (source, out, _partial(out)))
    if place.is_relative_to(inside) or inside.is_relative_to(partial):
        raise OutputError(f"{out} is {source} or lies in it, and that is what is read; choose another --out")


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path, source: Path | None = None) -> None:
    """Raise OutputError when the output's place is taken, can have no such name, or is in the folder `source`."""
    _refuse_place(out, source)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is not a directory; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not empty; remove it or choose another --out")


def _refuse_place(out: Path, source: Path | None) -> None:
    try:
        os.lstat(out.with_name(f".{out.name}.before-redo"))  # the longest name that anything beside an output has
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise storage.unusable(error, out, "cannot be made", "--out") from None
    if source is not None:
        refuse_inside(out, source)
