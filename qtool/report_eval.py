"""The results of `qtool eval` as a table, for a terminal or as Markdown. Nothing here prints or computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qtool.escape import markdown as escaped
from qtool.report import stacked
from qtool.units import percent, size

WORDS = 24  # columns that a sentence needs at least

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


class _Fitting:
    """The tables where the terminal is wide enough for them, else a column for each model, as many as go side by side.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.main = main_table(data)
        self.distances = distances(data) if data["against"] else ([], [])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tables = [_wide(*self.main, sentence=True), *([_wide(*self.distances)] if self.distances[1] else [])]
        unlimited = options.update(width=10_000)
        if all(Measurement.get(console, unlimited, one).maximum <= options.max_width for one in tables):
            tables[0].columns[-1].width = None  # from the least that it may have to all that is left
            yield stacked(tables)
            return
        (titles, rows), (further, others) = self.main, self.distances
        known = {line[0]: dict(zip(further, line, strict=True)) for line in others}
        order = [*titles[1:-1], *(one for one in further[1:] if one != "KL mean"), titles[-1]]
        models = [{**known.get(row[0], {}), **dict(zip(titles, row, strict=True))} for row in rows]
        count = max(1, (options.max_width - WORDS) // (WORDS + 2))
        yield stacked([_upright(order, models[start:start + count], titles[0])
                       for start in range(0, len(models), count)])


def _upright(titles: Sequence[str], models: Sequence[Mapping[str, str]], name: str) -> Table:
    """A column for each model: title -> cell."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 1))
    made.add_column("", style="cyan", no_wrap=True)
    for model in models:
        made.add_column(model[name], overflow="fold", width=WORDS if len(models) > 1 else None)
    for title in titles:
        if any(model.get(title) for model in models):
            made.add_row(title, *[model.get(title, "") for model in models])
    return made


def evaluated(data: Mapping[str, Any]) -> RenderableType:
    """The main table, and with a base one more with all that was found of the distances."""
    notes = [Text(f"note: {note}", style="yellow") for note in data["notes"]]
    return stacked([Text(heading(data), style="bold"), _Fitting(data), *notes])


def _wide(titles: Sequence[str], rows: Sequence[Sequence[str]], sentence: bool = False) -> Table:
    """sentence: whether the last column is words that may be folded."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 1))
    for index, title in enumerate(titles):
        folds = sentence and index == len(titles) - 1
        made.add_column(title, justify="left" if folds or index == 0 or title == "scheme" else "right",
                        no_wrap=not folds, width=WORDS if folds else None)
    for row in rows:
        made.add_row(*row)
    return made


def markdown(data: Mapping[str, Any]) -> str:
    """The same tables in Markdown, a line that says what was measured above them."""
    pieces = [escaped(heading(data)), _markdown(*main_table(data))]
    if data["against"]:
        pieces.append(_markdown(*distances(data)))
    return "\n\n".join(pieces) + "\n"


def heading(data: Mapping[str, Any]) -> str:
    text = data["text"]
    line = (f"{text['windows']} windows × {text['context']} tokens of {text['source']}, computed in "
            f"{data['compute_dtype']} on {data['device']}; [ ] 95 % interval, ± standard error, both over windows")
    first = data["models"][0]
    if "memory" in first:
        line += f"; memory with {first['memory']['batch']} × {first['memory']['context']} tokens"
    if "speed" in first:
        line += (f"; speed with a prompt of {first['speed']['prompt_tokens']} tokens and "
                 f"{first['speed']['new_tokens']} new ones")
    return line


def main_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows, the base first; columns that no row has figures for are left out."""
    rows = [*([data["against"]] if data["against"] else []), *data["models"]]
    columns: list[Column] = [
        ("", lambda row: row["name"]), ("scheme", lambda row: row["scheme"]),
        ("size", lambda row: size(row["weight_bytes"])),
        ("bits", lambda row: f"{row['bits_per_weight']:.4g}"),
        ("of FP16", lambda row: percent(row["of_fp16"])),
        ("memory", lambda row: size(row["memory"]["total"]) if row.get("memory", {}).get("total") else ""),
        ("tokens/s", lambda row: _speed(row, "tokens_per_s")),
        ("prompt tokens/s", lambda row: _speed(row, "prompt_tokens_per_s")),
        ("first token", lambda row: f"{_speed(row, 'first_token_s')} s" if "speed" in row else ""),
        ("perplexity", _perplexity), ("KL", lambda row: _mean(row.get("kl"), "{:.4f}")),
        *[(title, lambda row, title=title: _task(row, title)) for title in _task_titles(rows)],  # type: ignore[misc]
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
          for title, name in (("KL median", "median"), ("KL 99 %", "p99"), ("KL 99.9 %", "p999"))],
        ("same most likely token", lambda row: _mean(
            {key: 100 * value for key, value in row["top1_agreement"].items()}, "{:.2f}") + " %"),
    ]
    return [title for title, _ in columns], [[show(row) for _, show in columns] for row in data["models"]]


def _speed(row: Row, key: str) -> str:
    return f"{row['speed'][key]:.3g}" if "speed" in row else ""


def _task_titles(rows: Sequence[Row]) -> list[str]:
    """Task and metric of what is shown of the tasks, in order."""
    return list(dict.fromkeys(_task_title(one) for row in rows for one in row.get("tasks", ()) if one["main"]))


def _task_title(record: Mapping[str, Any]) -> str:
    return f"{record['task']} {record['metric']}"


def _task(row: Row, title: str) -> str:
    found = [one for one in row.get("tasks", ()) if one["main"] and _task_title(one) == title]
    return f"{found[0]['value']:.4g}" + (f" ± {found[0]['error']:.2g}" if found[0]["error"] is not None else "") \
        if found else ""


def _perplexity(row: Row) -> str:
    interval = row["perplexity_interval"]
    return f"{row['perplexity']:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _mean(found: Mapping[str, float] | None, form: str) -> str:
    return "" if found is None else f"{form.format(found['mean'])} ± {form.format(found['error'])}"


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(map(escaped, titles)), ["---"] * len(titles), *[list(map(escaped, row)) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
