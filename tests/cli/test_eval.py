"""`qtool eval`: several paths side by side, as a table, as Markdown and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool import report_eval
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


def test_memory_and_speed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_(made, "--memory-context", "128", "--memory-batch", "2", "--speed", "--json")
    data = json.loads(capsys.readouterr().out)
    for row in (data["against"], *data["models"]):
        parts = [row["memory"][key] for key in ("weights", "kv_cache", "activations", "overhead")]
        assert row["memory"]["total"] == sum(parts) and row["memory"]["batch"] == 2
        assert row["memory"]["kv_cache"] == 2 * 128 * 2 * 2 * 32 * 2  # sequences, tokens, layers, k and v, width, bytes
        assert row["speed"]["tokens_per_s"] > 0 and row["speed"]["first_token_s"] > 0
    assert [row["memory"]["weights"] for row in data["models"]] == [row["weight_bytes"] for row in data["models"]]
    titles, rows = report_eval.main_table(data)
    places = [titles.index(one) for one in ("memory", "tokens/s", "prompt tokens/s", "first token")]
    assert all(row[place] for row in rows for place in places)
    assert "memory with 2 × 128 tokens" in report_eval.heading(data)


def test_every_figure_is_there_on_any_terminal(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    eval_(made, "--memory-context", "128", "--json")
    data = json.loads(capsys.readouterr().out)
    for width in (60, 80, 110, 250):
        target = Console(width=width)
        with target.capture() as shown:
            target.print(report_eval.evaluated(data))
        text = shown.get()
        assert "…" not in text and all(len(line) <= width for line in text.splitlines())
        for row in data["models"]:
            for figure in (row["kl"]["p999"], row["excess"]["mean"], row["kl"]["error"]):
                assert f"{figure:.4f}" in text
            assert f"{row['perplexity']:.3f}" in text and row["name"] in text


def test_the_same_name_twice(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(made / "int8", tmp_path / "int3")
    run("eval", str(made / "int3"), str(tmp_path / "int3"), "--windows", "1", "--context", "64", "--json")
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["models"]] == [str(made / "int3"), str(tmp_path / "int3")]
    assert all(row["perplexity_interval"] is None for row in data["models"])  # of one window there is none


def test_quiet(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_(made, "--quiet")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_one_without_a_base(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("eval", str(made / "int8"), "--windows", "2", "--context", "64", "--stream")
    text = capsys.readouterr().out
    assert "perplexity" in text and "KL" not in text and "against" not in text
