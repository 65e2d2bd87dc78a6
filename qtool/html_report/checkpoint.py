"""The page about one checkpoint: headline figures, maps, tables, where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qtool import heatmap, learned, repairs
from qtool.heatmap import ERRORS, Cells, Measure, Row, Scale
from qtool.html_report.charts import Charts, heat_map, loss_curve
from qtool.html_report.markup import Element, Piece, facts, folded, node, percent, table
from qtool.html_report.runs import MEANINGS, NAMES, Run, Scales, how, kept, source_bytes, spread
from qtool.units import millions, size

WORST = 10  # linears listed by their error


@dataclass(frozen=True)
class Figure:
    """One map: what is drawn, and how its figures are written."""

    title: str
    caption: str
    measure: Measure
    scale: Scale
    show: Callable[[float], str]
    unit: str


def article(run: Run, number: int, name: str | None, known: Scales, charts: Charts) -> Element:
    """All about one checkpoint. name: of one among several, which then has a heading of its own."""
    level = "h3" if name else "h2"
    cells = heatmap.cells(run.rows)
    stayed = kept(run)
    head = node("header", node("h2", name), node("p", how(run), class_="lead")) if name else None
    maps = [_map(figure, cells, stayed, level, charts) for figure in _figures(run, known)]
    return node("article", head, _headline(run), *maps, _worst(run, level), _stored(run, level),
                _learning(run, level, charts), _origin(run, level), id=f"run-{number}")


def _headline(run: Run) -> Element:
    """The few figures that one looks for first."""
    summary, original, key = run.summary, source_bytes(run), heatmap.error_key(run.rows)
    cards: list[tuple[str, str, str]] = [
        ("size", size(summary["weight_bytes"]),
         f"{percent(summary['weight_bytes'] / original)} of {size(original)}" if original else
         f"{summary['bits_per_parameter']:.3g} bits per parameter"),
        ("bits per weight", f"{summary['bits_per_weight']:.4g}",
         f"of {millions(sum(one['weights'] for one in summary['schemes']))} weights in "
         f"{sum(one['linears'] for one in summary['schemes'])} linears"),
    ]
    error = spread(run.rows, key) if key else None
    if key and error:
        cards += [("median error", percent(error[0]), f"of the {ERRORS[key]}"),
                  ("worst error", percent(error[1]), error[2])]
    allocation = summary["allocation"]
    if allocation:
        cards.append(("expected KL", f"{allocation['loss']:.3g}", "nats per token, as the search for bits expects"))
    return node("div", *[node("div", node("p", name, class_="label"), node("p", *_with_unit(value), class_="value"),
                              node("p", *_breakable(more), class_="more"), class_="card")
                         for name, value, more in cards], class_="cards")


def _with_unit(value: str) -> list[Piece]:
    number, _, unit = value.partition(" ")
    return [number, node("span", f" {unit}", class_="unit") if unit else None]


def _breakable(name: str) -> list[Piece]:
    """A dotted name that may be broken after its dots."""
    words = name.split(".")
    return [*(piece for word in words[:-1] for piece in (word + ".", node("wbr"))), words[-1]]


def _figures(run: Run, known: Scales) -> list[Figure]:
    figures, key = [], heatmap.error_key(run.rows)
    if key and key in known.errors:
        name, meaning = MEANINGS[key]
        figures.append(Figure(name, f"{meaning} The colours are logarithmic.", heatmap.median(key), known.errors[key],
                              lambda value: f"{100 * value:.2g}", f"% of the {ERRORS[key]}"))
    if known.bits:
        caption = ["What each linear takes in the file, scales and zero points included, over its weights."]
        values = heatmap.known(heatmap.cells(run.rows), heatmap.bits)
        if max(values, default=0) - min(values, default=0) <= heatmap.ONE_SCHEME:
            caption.append(f"All have the same: {run.summary['bits_per_weight']:.3g}.")
        figures.append(Figure("Bits per weight", " ".join(caption), heatmap.bits, known.bits,
                              lambda value: f"{value:.3g}", "bits per weight"))
    return figures


def _map(figure: Figure, cells: Cells, stayed: Mapping[tuple[int, str], str], level: str,
         charts: Charts) -> Element | None:
    if not cells.blocks:
        return None

    def tell(rows: Sequence[Row]) -> str:
        return _told(rows, figure)

    label = f"{figure.title}, {len(cells.blocks)} blocks by {len(cells.kinds)} kinds; a table with the figures follows"
    specs = {form: heat_map(cells, figure.measure, figure.scale, figure.show, tell, stayed, figure.unit, form == "tall")
             for form in ("wide", "tall")}  # the style sheet shows the one that fits the screen
    drawn = [charts.draw(spec, label, form) for form, spec in specs.items()]
    return node("section", node(level, figure.title), node("figure", *drawn, node("figcaption", figure.caption)),
                folded("The figures as a table", _figures_table(figure, cells)))


def _figures_table(figure: Figure, cells: Cells) -> Element:
    names = heatmap.short(cells.kinds)
    rows = []
    for block in cells.blocks:
        values = [figure.measure(cells.rows.get((block, kind), ())) for kind in cells.kinds]
        rows.append([str(block), *("–" if value is None else f"{figure.show(value)}" for value in values)])
    return node("div", node("p", f"In {figure.unit}, by block.", class_="note"),
                table(["block", *(names[kind] for kind in cells.kinds)], rows))


def _told(rows: Sequence[Row], figure: Figure) -> str:
    """What stands beside a cell of the map."""
    value = figure.measure(rows)
    said = "unknown" if value is None else f"{figure.show(value)} {figure.unit}"
    if len(rows) == 1:
        row = rows[0]
        shape = " × ".join(map(str, row["shape"]))
        lines = [row["name"], said, f"{row['scheme_label']}, {shape}, {size(row['bytes'])}"]
        return "\n".join(lines + ([f"SQNR {row['sqnr_db']:.1f} dB"] if row.get("sqnr_db") is not None else []))
    lines = [f"{rows[0]['name']} and {len(rows) - 1} more", f"{said}, the median" if figure.scale.log else said]
    worst = _sorted(rows)[:1] if figure.scale.log else []
    return "\n".join(lines + [f"worst {figure.show(error)} {figure.unit}: {row['name']}" for error, row in worst])


def _sorted(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """Those whose error is known, the worst first."""
    key = heatmap.error_key(rows)
    known = [(row[key], row) for row in rows if row.get(key) is not None] if key else []
    return sorted(known, key=lambda pair: (-pair[0], pair[1]["name"]))


def _worst(run: Run, level: str) -> Element | None:
    """The linears with the largest error; behind a fold, all of them."""
    known = _sorted(run.rows)
    worst = [row for _, row in known[:WORST]] if len(known) > WORST else []
    everything = folded(f"All {len(run.rows)} linears", _linears(run.rows, run.rows))
    return node("section", node(level, f"The {WORST} worst linears" if worst else "Linears"),
                _linears(worst, run.rows) if worst else None, everything)


def _linears(rows: Sequence[Row], everything: Sequence[Row]) -> Element:
    """A line per linear; columns of which nothing is known of `everything` are left out."""
    columns: list[tuple[str, Callable[[Row], Piece]]] = [
        ("linear", lambda row: node("span", *_breakable(row["name"]))), ("scheme", lambda row: row["scheme_label"]),
        ("shape", lambda row: " × ".join(map(str, row["shape"]))), ("size", lambda row: size(row["bytes"])),
        ("bits/weight", lambda row: f"{row['bits_per_weight']:.4g}")]
    for name, key, show in (*((NAMES[key], key, percent) for key in ERRORS),
                            ("SQNR, dB", "sqnr_db", lambda value: "–" if value is None else f"{value:.1f}"),
                            ("expected KL", "expected_kl", lambda value: "–" if value is None else f"{value:.2g}")):
        if any(row.get(key) is not None for row in everything):
            columns.append((name, lambda row, key=key, show=show: show(row.get(key))))  # type: ignore[misc]
    return table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows], left=2,
                 class_="linears")


def _stored(run: Run, level: str) -> Element:
    """Schemes, and what is not quantized."""
    summary = run.summary
    by_bits = sorted(summary["schemes"], key=lambda one: one["bits_per_weight"])
    schemes = table(["scheme", "linears", "weights", "size", "bits/weight"], [
        [one["scheme"], str(one["linears"]), millions(one["weights"]), size(one["bytes"]),
         f"{one['bits_per_weight']:.4g}"] for one in by_bits])
    rest = table(["not quantized", "why", "tensors", "size", "type"], [
        [one["name"], one["reason"], str(one["tensors"]), size(one["bytes"]), one["dtype"]]
        for one in summary["not_quantized"]], left=2) if summary["not_quantized"] else None
    return node("section", node(level, "What is stored"), schemes, rest)


def _learning(run: Run, level: str, charts: Charts) -> Element | None:
    """How the divergence fell while the whole model learned."""
    told = (run.record or {}).get("learned")
    if not told or len(told["curve"]) < 2:
        return None
    figures = table(["step", "on the text learned from", "on held-out text"], [
        [str(one["step"]), "" if one["fitting"] is None else f"{one['fitting']:.5g}", f"{one['held_out']:.5g}"]
        for one in told["curve"]])
    drawings = [charts.draw(loss_curve(told["curve"], told["kept_step"], tall), "Divergence by step",
                            "tall" if tall else "wide") for tall in (False, True)]
    text = (f"KL divergence of the original model's predictions from this one's, in nats per token. Step "
            f"{told['kept_step']} was the best on held-out text and is what was kept.")
    return node("section", node(level, "Learning"), node("p", text, class_="note"), *drawings,
                folded("Figures", figures))


def _origin(run: Run, level: str) -> Element:
    """Model, method, calibration, versions; recipe and manifest behind folds."""
    summary, record = run.summary, run.record or {}
    made, allocation = summary["made_by"], summary["allocation"]
    pairs: list[tuple[str, Piece]] = [
        ("checkpoint", summary["path"]),
        ("architecture", f"{summary['architecture']}, {millions(summary['parameters'])} parameters, "
                         f"{summary['dtype']}")]
    if made:
        pairs += [("made from", str(made["source"])), ("method", made["method"])]
        pairs += [("learned", text) for text in learned.sentences(record.get("layers", []), record.get("learned"))]
        if made["tokens"]:
            pairs.append(("calibrated on", f"{made['tokens']:,} tokens of {made['calibration']}"))
        if allocation:
            pairs.append(("budget", f"{size(allocation['limit_bytes'])} for the quantized linears, "
                                    f"{percent(allocation['bytes'] / allocation['limit_bytes'])} used"))
        versions = record.get("versions") or {}
        pairs.append(("by", ", ".join([f"qtool {made['qtool']}", *(f"{key} {versions[key]}" for key in (
            "torch", "transformers") if key in versions)])))
    else:
        pairs.append(("made by", "unknown: no manifest.json lies beside the weights"))
    pairs += _notes(run.rows)
    recipe = record.get("recipe")
    return node("section", node(level, "How it was made"), facts(pairs),
                folded("Recipe", node("pre", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)))
                if recipe else None,
                folded("Manifest", node("p", "Without its layers, which are the linears above.", class_="note"),
                       node("pre", json.dumps(_without_layers(record), indent=2, ensure_ascii=False)))
                if record else None)


def _without_layers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "layers"}


def _notes(rows: Sequence[Row]) -> list[tuple[str, Piece]]:
    """What a method had to repair or do without."""
    return [("note", f"{len(names)} linears {heading}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
            for heading, names in repairs.listed(rows)]
