"""The top of the page: its title, and what several checkpoints have in common."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.heatmap import ERRORS
from qtool.html_report.charts import Charts, error_by_size
from qtool.html_report.markup import Element, Piece, node, percent, table
from qtool.html_report.runs import (
    MEANINGS,
    NAMES,
    Run,
    common_error,
    format_name,
    how,
    model,
    names,
    source_bytes,
    spread,
)
from qtool.units import size

ONLY_WEIGHTS = ("Only the error of the weights is known of all. Methods that look at the outputs raise it to lower "
                "theirs: compare such checkpoints with qtool eval.")


def title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"{model(runs[0])}, quantized"
    models = list(dict.fromkeys(model(run) for run in runs))
    return f"{models[0]}, {len(runs)} ways" if len(models) == 1 else f"{len(runs)} quantized checkpoints"


def heading(runs: Sequence[Run]) -> Element:
    if len(runs) == 1:
        return node("header", node("h1", model(runs[0])), node("p", how(runs[0]), class_="lead"))
    links = [node("a", name, href=f"#run-{number}") for number, name in enumerate(names(runs), 1)]
    return node("header", node("h1", title(runs)), node("nav", *links))


def comparison(runs: Sequence[Run], charts: Charts) -> Element:
    """All runs in a drawing, if they know the same error, and in a table."""
    key = common_error(runs)
    drawn = _scatter(runs, key, charts) if key else node(
        "p", "No kind of error is known of all of these checkpoints, so none is drawn.", class_="note")
    return node("section", node("h2", "Error against size"), drawn, _table(runs, key))


def _scatter(runs: Sequence[Run], key: str, charts: Charts) -> Piece:
    points = []
    for run, name in zip(runs, names(runs), strict=True):
        error = spread(run.rows, key)
        if error and error[0] > 0:
            sizes = f"{size(run.summary['weight_bytes'])}, {run.summary['bits_per_weight']:.4g} bits per weight"
            tip = [name, sizes, f"median error {percent(error[0])}", f"worst {percent(error[1])} in {error[2]}"]
            points.append({"name": name, "bytes": run.summary["weight_bytes"], "median": error[0], "worst": error[1],
                           "tip": "\n".join(tip)})
    if not points:
        return node("p", "All errors are zero, so none is drawn.", class_="note")
    label = f"Median error against size of {len(points)} checkpoints; the table below has the figures"
    caption = ONLY_WEIGHTS if key == "weight_error" else MEANINGS[key][1]
    drawn = [charts.draw(error_by_size(points, ERRORS[key], tall), label, f"scatter {'tall' if tall else 'wide'}")
             for tall in (False, True)]
    return node("figure", *drawn, node("figcaption", f"A dot is the median over the linears, its line goes up to the "
                                       f"worst one. {caption}"))


def _table(runs: Sequence[Run], shared: str | None) -> Element:
    """With the error that all know, or else all that any knows."""
    keys = [shared] if shared else [key for key in ERRORS if any(spread(run.rows, key) for run in runs)]
    lines: list[list[Piece]] = []
    for number, (run, name) in enumerate(zip(runs, names(runs), strict=True), 1):
        summary, original, made = run.summary, source_bytes(run), run.summary["made_by"]
        figures: list[Piece] = []
        for key in keys:
            figures += [percent(value) for value in (spread(run.rows, key) or (None, None))[:2]]
        lines.append([node("a", name, href=f"#run-{number}"), made["method"] if made else "–", format_name(run),
                      size(summary["weight_bytes"]),
                      percent(summary["weight_bytes"] / original) if original else "–",
                      f"{summary['bits_per_weight']:.4g}", *figures])
    errors = [name for key in keys for name in (NAMES[key], "worst")]
    return table(["checkpoint", "method", "format", "size", "of the original", "bits/weight", *errors], lines, left=3)
