"""How things look: on a terminal, elsewhere, in numbers."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from qtool import console, escape, report, units
from qtool.recipe import scheme_label


@pytest.mark.parametrize(("call", "expected"), [
    (lambda: units.size(999), "999 B"), (lambda: units.size(1234), "1.23 kB"),
    (lambda: units.size(92_400_000), "92.4 MB"), (lambda: units.size(999_900_000), "1,000 MB"),
    (lambda: units.size(16.4e9), "16.4 GB"), (lambda: units.span(3.21), "3.2 s"),
    (lambda: units.span(42), "42 s"), (lambda: units.span(125), "2 min 05 s"), (lambda: units.span(59.7), "1 min 00 s"),
    (lambda: units.span(3720), "1 h 02 min"),
    (lambda: units.clock(3725), "1:02:05"), (lambda: units.percent(0.01234), "1.23 %"),
    (lambda: units.percent(None), "-"), (lambda: units.percent(1.0), "100 %"),
    (lambda: units.millions(134.5e6), "134 M"), (lambda: units.millions(8.19e9), "8.19 B"),
    (lambda: units.millions(12), "12"),
    (lambda: scheme_label({"bits": 4, "group_size": 64, "symmetric": True}), "int4-g64"),
    (lambda: scheme_label({"bits": 3, "group_size": -1, "symmetric": False}), "uint3-channel"),
])
def test_numbers_for_people(call, expected: str) -> None:
    assert call() == expected


def test_the_bar_on_a_terminal() -> None:
    screen = io.StringIO()
    with console.Bar(Console(file=screen, force_terminal=True, width=80, color_system=None)) as bar:
        bar.start(4, 1)
        for index in (1, 2):
            bar.linear(f"model.layers.{index}.mlp.down_proj", 0.0087)
            bar.bar.refresh()
            bar.block(index, f"block {index}", 1.0, None, 0)
        bar.message("naming and hashing the files")
        bar.bar.refresh()
    text = screen.getvalue()
    assert "going on with an unfinished run: 1 of 4 blocks are done" in text
    assert re.search(r"3/4 .* 0:00:\d\d 0:00:\d\d left \S+ [MG]B  error 0.87 %  2.mlp.down_proj", text)
    assert "naming and hashing" in text


def test_the_bar_is_cleared_when_the_run_fails() -> None:
    screen = io.StringIO()
    with pytest.raises(ZeroDivisionError), console.Bar(Console(file=screen, force_terminal=True, width=80)) as bar:
        bar.start(4, 0)
        raise ZeroDivisionError
    assert not bar.bar.live.is_started


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as lines:
        assert isinstance(lines, console.Lines)
        lines.start(12, 10)
        lines.block(10, "block 10", 65.0, ("model.layers.10.mlp.up_proj", 0.02), 612_000_000)
        lines.block(11, "block 11", 1.5, None, 612_000_000)
        lines.finish()
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second, third = captured.err.splitlines()
    assert first == "going on with an unfinished run: 10 of 12 blocks are done"
    assert re.fullmatch(r"block 11/12  1 min 05 s  worst error 2 % in 10.mlp.up_proj  612 MB  0:00:00 left", second)
    assert third == "block 12/12  1.5 s  612 MB"


def test_names_with_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.error("file [bold]x[/bold].safetensors: shape [2, 3] :smile:")
    assert capsys.readouterr().err == "error: file [bold]x[/bold].safetensors: shape [2, 3] :smile:\n"


def test_csv_quotes_and_leaves_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_csv([{"a": "x,y", "b": None}, {"a": 1, "b": [2, 3]}], ["a", "b"])
    assert capsys.readouterr().out == 'a,b\n"x,y",\n1,"[2, 3]"\n'


def test_on_a_terminal_errors_are_a_panel_and_steps_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=60, color_system=None, markup=False)
    monkeypatch.setattr(console, "console", lambda stderr=False: terminal)
    with console.steps("comparing") as step:
        step(1, 4, "model.norm.weight")
        step(4, 4, "done")
    with console.working("reading [x]"):
        pass
    console.error("shape [2, 3]\nand more")
    text = screen.getvalue()
    assert "comparing" in text and "reading [x]" in text
    assert re.search(r"╭─ error ─+╮\n│ shape \[2, 3\] +│\n│ and more +│\n╰─+╯", text)


def test_quiet_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as silent, console.steps("x", True) as step, console.working("y", True):
        silent.start(3, 1)
        silent.linear("a", 0.1)
        silent.block(1, "b", 1.0, None, 5)
        step(1, 2, "c")
        console.note("d", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_control_characters_of_names_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bad = "a\x1b[31mred\x1b]0;title\x07\r\u202e\x9b2J"
    console.error(bad)
    console.note(bad)
    console.show(report.facts(bad, [(bad, bad)]))
    console.show_text(bad + "\tb\n")
    console.show_csv([{"name": bad}], ["name"])
    captured = capsys.readouterr()
    assert not escape.UNPRINTABLE.search(captured.out + captured.err) and "\ufffd[31mred" in captured.out
    assert captured.out.count("\tb\n") == 1
