"""The only place that prints. Results go to stdout; progress, notes and errors go to stderr.

On a terminal: a bar, tables, panels. Elsewhere (CI, a pipe): one plain line at a time, tables as wide as they need.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from qtool import report

PIPE_WIDTH = 240  # columns of a table that goes to no terminal; a narrow one stays narrow
Step = Callable[[int, int, str], None]  # done, total, what is at hand


def console(stderr: bool = False) -> Console:
    """A rich console on today's sys.stdout or sys.stderr; [square brackets] in names are no markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def show(result: RenderableType) -> None:
    """A result for people."""
    console().print(result)


def show_json(result: Any) -> None:
    """A result for programs: one JSON document."""
    sys.stdout.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def show_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A result for spreadsheets; missing figures are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if row.get(key) is None else row[key] for key in columns] for row in rows])
    sys.stdout.write(text.getvalue())
    sys.stdout.flush()


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
        task = bar.add_task(title, total=None, now="", began=time.monotonic(), start=0.0)

        def step(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, now=text)

        yield step


class _Left(ProgressColumn):
    """Time that is left if the rest goes as fast as what this process has done."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["start"]
        if not task.total or done <= 0:
            return Text("")
        passed = time.monotonic() - task.fields["began"]
        left = passed / done * (task.total - task.completed)
        return Text(f"{report.span(max(left, 0))} left", style="cyan")


def _bar(target: Console) -> Progress:
    return Progress(TextColumn("{task.description}", style="bold"), BarColumn(16), TimeElapsedColumn(), _Left(),
                    TextColumn("{task.fields[now]}", markup=False, table_column=None), console=target, transient=True,
                    refresh_per_second=4)


class Bar:
    """Progress of a run on a terminal: one bar over the blocks. Use as a context manager."""

    def __init__(self, target: Console) -> None:
        self.bar = _bar(target)
        self.blocks, self.index, self.seen, self.usual = 0, 0, 0, 0

    def __enter__(self) -> Bar:
        self.bar.start()
        self.task = self.bar.add_task("", total=None, now="", began=time.monotonic(), start=0.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.bar.stop()

    def start(self, blocks: int, done: int) -> None:
        self.blocks, self.index = blocks, done
        if done:
            self.bar.console.print(_continuing(blocks, done), style="yellow")
        self.bar.update(self.task, total=blocks, completed=done, start=float(done), began=time.monotonic(),
                        description=self._title())

    def message(self, text: str) -> None:
        self.bar.update(self.task, now=text)

    def linear(self, name: str, error: float | None) -> None:
        from qtool.estimate import resident  # torch is there by now; importing it earlier would cost seconds

        self.seen += 1
        words = [_short(name), *([f"error {report.percent(error)}"] if error is not None else []),
                 report.size(resident())]
        part = min(self.seen / self.usual, 0.95) if self.usual else 0.0
        self.bar.update(self.task, completed=self.index + part, now="  ".join(words))

    def block(self, index: int, name: str, seconds: float, worst: tuple[str, float] | None, memory_bytes: int) -> None:
        self.index, self.usual, self.seen = index + 1, max(self.seen, 1), 0
        self.bar.update(self.task, completed=self.index, description=self._title())

    def finish(self) -> None:
        self.bar.update(self.task, now="")

    def _title(self) -> str:
        return f"block {min(self.index + 1, self.blocks)}/{self.blocks}"


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
        done, passed = index + 1, time.monotonic() - self.began
        words = [f"block {done:>{len(str(self.blocks))}}/{self.blocks}", report.span(seconds)]
        if worst is not None:
            words.append(f"worst error {report.percent(worst[1])} in {_short(worst[0])}")
        words.append(report.size(memory_bytes))
        left = passed / max(done - self.first, 1) * (self.blocks - done)
        self._line("  ".join([*words, f"{report.span(left)} left"]))

    def finish(self) -> None:
        return None

    def _line(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


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
