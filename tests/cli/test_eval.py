"""`qtool eval`: several paths side by side, as a table, as Markdown and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool.cli import main
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    tiny.make(folder / "base", "llama", num_hidden_layers=2)
    for bits in ("3", "8"):
        run("quantize", str(folder / "base"), "--method", "rtn", "--bits", bits, "--group-size", "32", "--quiet",
            "--out", str(folder / f"int{bits}"))
    return folder


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert not stopped.value.code


def eval_(made: Path, *words: str) -> None:
    run("eval", str(made / "int3"), str(made / "int8"), "--against", str(made / "base"), "--windows", "2", "--context",
        "64", "--cache", str(made / "kept"), *words)


def test_table(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_(made)
    captured = capsys.readouterr()
    assert captured.err == ""
    for words in ("2 windows × 64 tokens of builtin", "perplexity", "base", "int3-g32", "int8-g32", "of FP16",
                  "99.9 %", "same most likely token", "use it for", "95 % interval"):
        assert words in captured.out
    assert len(list((made / "kept").iterdir())) == 1


def test_json_and_markdown_have_the_same_figures(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_(made, "--json")
    data = json.loads(capsys.readouterr().out)
    eval_(made, "--markdown")
    text = capsys.readouterr().out
    assert data["schema"] == 2 and [row["name"] for row in data["models"]] == ["int3", "int8"]
    assert [row["scheme"] for row in data["models"]] == ["int3-g32", "int8-g32"]
    lines = [line for line in text.splitlines() if line.startswith("| int")]
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines[:2])
    for line, row in zip(lines, data["models"], strict=False):
        assert f"{row['perplexity']:.3f}" in line and f"{row['kl']['mean']:.4f} ± {row['kl']['error']:.4f}" in line
        assert row["use_for"] in line
    base = data["against"]
    assert base["of_fp16"] == 1.0 and base["scheme"] == "bfloat16" and base["use_for"].startswith("training")


def test_quiet(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_(made, "--quiet")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_one_without_a_base(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("eval", str(made / "int8"), "--windows", "2", "--context", "64", "--stream")
    text = capsys.readouterr().out
    assert "perplexity" in text and "KL" not in text and "against" not in text
