"""The results of `qtool eval` as a table, for a terminal or as Markdown. Nothing here prints or computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qtool.report import stacked, table
from qtool.units import percent, size

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def evaluated(data: Mapping[str, Any]) -> RenderableType:
    """The main table, and with a base one more with all that was found of the distances."""
    titles, rows = main_table(data)
    main = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 1))
    for index, title in enumerate(titles):
        words = index in (0, 1, len(titles) - 1)
        main.add_column(title, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        main.add_row(*row)
    parts: list[RenderableType] = [Text(heading(data), style="bold"), main]
    if data["against"]:
        parts.append(table(*distances(data)))
    parts += [Text(f"note: {note}", style="yellow") for note in data["notes"]]
    return stacked(parts)


def markdown(data: Mapping[str, Any]) -> str:
    """The same tables in Markdown, a line that says what was measured above them."""
    pieces = [heading(data), _markdown(*main_table(data))]
    if data["against"]:
        pieces.append(_markdown(*distances(data)))
    return "\n\n".join(pieces) + "\n"


def heading(data: Mapping[str, Any]) -> str:
    text = data["text"]
    return (f"{text['windows']} windows × {text['context']} tokens of {text['source']}, computed in "
            f"{data['compute_dtype']} on {data['device']}; [ ] 95 % interval, ± standard error, both over windows")


def main_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows, the base first; columns that no row has figures for are left out."""
    rows = [*([data["against"]] if data["against"] else []), *data["models"]]
    columns: list[Column] = [
        ("", lambda row: row["name"]), ("scheme", lambda row: row["scheme"]),
        ("size", lambda row: size(row["weight_bytes"])),
        ("bits/weight", lambda row: f"{row['bits_per_weight']:.4g}"),
        ("of FP16", lambda row: percent(row["of_fp16"])),
        ("perplexity", _perplexity), ("KL", lambda row: _mean(row.get("kl"), "{:.4f}")),
        ("use it for", lambda row: row["use_for"]),
    ]
    cells = [[show(row) for _, show in columns] for row in rows]
    used = [index for index in range(len(columns)) if any(line[index] for line in cells)]
    return [columns[index][0] for index in used], [[line[index] for index in used] for line in cells]


def distances(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How far each model's predictions are from the base's: nats per token, and shares."""
    columns: list[Column] = [
        ("against the base", lambda row: row["name"]),
        ("ln(perplexity ratio)", lambda row: _mean(row["excess"], "{:.4f}")),
        ("KL mean", lambda row: _mean(row["kl"], "{:.4f}")),
        *[(title, lambda row, name=name: f"{row['kl'][name]:.4f} ± {row['kl'][name + '_error']:.4f}")  # type: ignore[misc]
          for title, name in (("median", "median"), ("99 %", "p99"), ("99.9 %", "p999"))],
        ("same most likely token", lambda row: _mean(
            {key: 100 * value for key, value in row["top1_agreement"].items()}, "{:.2f}") + " %"),
    ]
    return [title for title, _ in columns], [[show(row) for _, show in columns] for row in data["models"]]


def _perplexity(row: Row) -> str:
    interval = row["perplexity_interval"]
    return f"{row['perplexity']:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _mean(found: Mapping[str, float] | None, form: str) -> str:
    return "" if found is None else f"{form.format(found['mean'])} ± {form.format(found['error'])}"


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
