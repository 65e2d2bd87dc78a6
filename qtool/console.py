"""The only place that prints. Results go to stdout; progress, notes and errors go to stderr.

On a terminal: a bar, tables, panels. Elsewhere (CI, a pipe): one plain line at a time, tables as wide as they need.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.segment import Segment
from rich.text import Text

from qtool.errors import StorageError
from qtool.escape import cell, clean
from qtool.units import clock, percent, size, span

if TYPE_CHECKING:
    from rich.progress import Progress

PIPE_WIDTH = 240  # columns of a table that goes to no terminal; a narrow one stays narrow
Step = Callable[[int, int, str], None]  # done, total, what is at hand


class _Safe(Console):
    """Names in files may hold control characters, with which a terminal can be made to show or do other things."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else clean(text), style, control)


def console(stderr: bool = False) -> Console:
    """A rich console on today's sys.stdout or sys.stderr; [square brackets] in names are no markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    target = cast(IO[str], Unwatched(stream)) if stderr else stream
    return _Safe(file=target, width=width, markup=False, highlight=False, emoji=False)


class Unwatched:
    """stderr, whose reader may go or whose disk may fill up: what is said there is lost then, and the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def settle() -> None:
    """Before the end: what cannot be written goes nowhere; Python would try again and make the exit status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def reopen() -> None:
    """Give standard streams that were closed before the start to /dev/null: their numbers would go to the first files
    that are opened, and what a library writes to stderr would be written into these."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115


def show(result: RenderableType) -> None:
    """A result for people."""
    target, text = console(), io.StringIO()
    Console(file=text, width=target.width, force_terminal=target.is_terminal, markup=False, highlight=False,
            emoji=False, color_system=cast(Any, target.color_system)).print(result)
    show_text(text.getvalue())


def show_json(result: Any) -> None:
    """A result for programs: one JSON document."""
    show_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def show_text(text: str) -> None:
    """A result as it is, but for control characters.

    Ends the program as SIGPIPE would where its reader has gone; raises StorageError.
    """
    try:
        sys.stdout.write(clean(text))
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as failure:
        _drop(sys.stdout)
        raise StorageError(f"the result cannot be written to stdout: {failure.strerror}; what the command wrote "
                           "elsewhere is complete") from None


def show_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A result for spreadsheets; missing figures are empty, and no text is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if row.get(key) is None else cell(row[key]) for key in columns] for row in rows])
    show_text(text.getvalue())


def note(text: str, quiet: bool = False) -> None:
    """One line beside the result."""
    if not quiet:
        console(stderr=True).print(Text(text), style="yellow", soft_wrap=True)


def error(text: str, title: str = "error") -> None:
    """The one message of a failed command."""
    target = console(stderr=True)
    if target.is_terminal:
        target.print(Panel(Text(text), title=title, title_align="left", border_style="red", padding=(0, 1)))
    else:
        target.print(Text(f"{title}: {text}"), soft_wrap=True)


@contextmanager
def working(text: str, quiet: bool = False) -> Iterator[None]:
    """A sign of life on a terminal while something of unknown length is done."""
    target = console(stderr=True)
    if quiet or not target.is_terminal:
        yield
        return
    with target.status(Text(text)):
        yield


@contextmanager
def steps(title: str, quiet: bool = False) -> Iterator[Step]:
    """A bar over counted steps on a terminal, nothing elsewhere."""
    target = console(stderr=True)
    if quiet or not target.is_terminal:
        yield lambda done, total, text: None
        return
    with _bar(target) as bar:
        task = bar.add_task(title, total=None, now="", left="")
        began = time.monotonic()

        def step(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, now=text, left=_left(began, done, total))

        yield step


def _left(began: float, done: float, total: float, at_start: float = 0) -> str:
    """Time that is left if the rest goes as fast as what this process has done."""
    if done <= at_start:
        return ""
    seconds = (time.monotonic() - began) / (done - at_start) * (total - done)
    return f"{clock(max(seconds, 0))} left"


def _bar(target: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # 20 ms that --help need not wait for

    width = min(max(target.width - 66, 8), 30)
    return Progress(TextColumn("{task.description}", style="bold"), BarColumn(width), TimeElapsedColumn(),
                    TextColumn("{task.fields[left]}", style="cyan", markup=False),
                    TextColumn("{task.fields[now]}", markup=False), console=target, transient=True,
                    refresh_per_second=4)


class Bar:
    """Progress of a run on a terminal: one bar over the blocks. Use as a context manager."""

    def __init__(self, target: Console) -> None:
        self.bar = _bar(target)
        self.blocks, self.index, self.seen, self.usual = 0, 0, 0, 0

    def __enter__(self) -> Bar:
        self.bar.start()
        self.task = self.bar.add_task("starting", total=None, now="", left="")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.bar.stop()

    def start(self, blocks: int, done: int) -> None:
        self.blocks, self.index, self.first, self.began = blocks, done, done, time.monotonic()
        if done:
            self.bar.console.print(_continuing(blocks, done), style="yellow")
        self.bar.update(self.task, total=blocks, completed=done, description=self._title())

    def message(self, text: str) -> None:
        self.bar.update(self.task, now=text)

    def linear(self, name: str, error: float | None) -> None:
        from qtool.estimate import resident  # torch is there by now; importing it earlier would cost seconds

        self.seen += 1
        words = [size(resident()), *([f"error {percent(error)}"] if error is not None else []), _short(name)]
        done = self.index + (min(self.seen / self.usual, 0.95) if self.usual else 0.0)
        self.bar.update(self.task, completed=done, now="  ".join(words),
                        left=_left(self.began, done, self.blocks, self.first))

    def block(self, index: int, name: str, seconds: float, worst: tuple[str, float] | None, memory_bytes: int) -> None:
        self.index, self.usual, self.seen = index + 1, max(self.seen, 1), 0
        self.bar.update(self.task, completed=self.index, description=self._title(),
                        left=_left(self.began, self.index, self.blocks, self.first))

    def finish(self) -> None:
        self.bar.update(self.task, now="", left="")

    def _title(self) -> str:
        return f"{min(self.index + 1, self.blocks)}/{self.blocks}"


class Lines:
    """Progress of a run elsewhere: one plain line per block."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *details: object) -> None:
        return None

    def start(self, blocks: int, done: int) -> None:
        self.blocks, self.first, self.began = blocks, done, time.monotonic()
        if done:
            self._line(_continuing(blocks, done))

    def message(self, text: str) -> None:
        self._line(text)

    def linear(self, name: str, error: float | None) -> None:
        return None

    def block(self, index: int, name: str, seconds: float, worst: tuple[str, float] | None, memory_bytes: int) -> None:
        done = index + 1
        words = [f"block {done:>{len(str(self.blocks))}}/{self.blocks}", span(seconds)]
        if worst is not None:
            words.append(f"worst error {percent(worst[1])} in {_short(worst[0])}")
        words.append(size(memory_bytes))
        if done < self.blocks:
            words.append(_left(self.began, done, self.blocks, self.first))
        self._line("  ".join(words))

    def finish(self) -> None:
        return None

    def _line(self, text: str) -> None:
        target = Unwatched(sys.stderr)
        target.write(text + "\n")
        target.flush()


class Silent:
    """No progress: --quiet."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *details: object) -> None:
        return None

    def start(self, blocks: int, done: int) -> None: ...
    def message(self, text: str) -> None: ...
    def linear(self, name: str, error: float | None) -> None: ...
    def block(self, index: int, name: str, seconds: float, worst: tuple[str, float] | None,
              memory_bytes: int) -> None: ...
    def finish(self) -> None: ...


def progress(quiet: bool = False) -> Bar | Lines | Silent:
    """How a run is shown here."""
    target = console(stderr=True)
    return Silent() if quiet else Bar(target) if target.is_terminal else Lines()


def _continuing(blocks: int, done: int) -> str:
    return f"going on with an unfinished run: {done} of {blocks} blocks are done"


def _short(name: str) -> str:
    """The part of a linear's name that differs: 12.mlp.down_proj of model.layers.12.mlp.down_proj."""
    return name.split("layers.", 1)[-1]
