"""What the answers of `qtool inspect` look like beside its summary (report.py): layers, memory, differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from qtool.report import facts, stacked, table
from qtool.units import percent, size

Row = Mapping[str, Any]
NAMES_SHOWN = 8
PARTS = ("weights", "kv_cache", "activations", "overhead", "total")


def _figure(form: str) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else format(value, form)


STORED: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("shape", "shape", lambda shape: " × ".join(map(str, shape))), ("size", "bytes", size),
    ("bits", "bits_per_weight", _figure(".4g")), ("output error", "output_error", percent),
    ("at calibration", "relative_error", percent), ("weight error", "weight_error", percent),
    ("SQNR dB", "sqnr_db", _figure(".1f")), ("expected KL", "expected_kl", _figure(".2g")),
)
VALUES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("absmax", "absmax", _figure(".3g")), ("std", "std", _figure(".3g")), ("kurtosis", "kurtosis", _figure(".3g")),
    ("zeros", "zeros", percent), ("outliers", "outlier_features", _figure("d")),
    ("damping", "damping", _figure(".3g")), ("tokens", "tokens", lambda value: str(value or "-")),
)


def layers(rows: Sequence[Row]) -> RenderableType:
    """One line per linear: what is stored and how far off it is; below, its values and how it was solved.

    Columns without any figure are left out.
    """
    start = commonprefix([row["name"] for row in rows])
    start = start[:start.rfind(".") + 1]
    title = f"{start}…" if start else "linear"
    short = [row["name"].removeprefix(start) for row in rows]
    schemes = [("scheme", [row["scheme_label"] for row in rows])]
    parts = [_columns((title, short), schemes, rows, STORED)]
    notes = [_notes(row) for row in rows]
    if any(notes) or any(row.get(key) for row in rows for _, key, _ in VALUES):
        parts.append(_columns((title, short), [], rows, VALUES, [("notes", notes)] if any(notes) else []))
    return stacked(parts)


Column = tuple[str, Sequence[str]]


def _columns(first: Column, words: Sequence[Column], rows: Sequence[Row], wanted: Sequence[tuple[str, str, Any]],
             last: Sequence[Column] = ()) -> RenderableType:
    figures = [(title, [show(row.get(key)) for row in rows]) for title, key, show in wanted
               if any(row.get(key) for row in rows)]
    columns = [first, *words, *figures, *last]
    return table([title for title, _ in columns], zip(*(cells for _, cells in columns), strict=True), 1 + len(words))


def _notes(row: Row) -> str:
    """What went another way than usual."""
    said = ["Hessian repaired"] if row.get("repaired") else []
    said += ["few tokens of its own"] if row.get("pooled") else []
    return ", ".join([*said, *(["rescaled"] if row.get("rescaled") else [])])


def memory(data: Mapping[str, Any]) -> RenderableType:
    """What footprint.inference found, and the same with other weights."""
    known = data["memory"]
    of = f"{known['batch']} × {known['context']} tokens, keys and values in {known['kv_dtype']}"
    lines: list[tuple[str, str | Text]] = [
        (key.replace("_", " "), "not known" if known[key] is None else size(known[key])) for key in PARTS]
    lines += [("note", Text(text, style="yellow")) for text in known["notes"]]
    parts = [facts(f"Memory to run {of}", lines)]
    dense = next((row["total"] or row["weights"] for row in known["schemes"] if row["format"] == "hf"), None)
    parts.append(table(("scheme", "format", "with --method", "weights", "total", "of bf16"), [
        (_scheme(row), row["format"] or "", ", ".join(row["methods"]), size(row["weights"]),
         "-" if row["total"] is None else size(row["total"]),
         percent((row["total"] or row["weights"]) / dense) if dense else "-") for row in known["schemes"]], left=3))
    if known["not_possible"]:
        parts.append(facts("Not possible here", [(f"{one['scheme']}", one["why"]) for one in known["not_possible"]]))
    return stacked(parts)


def _scheme(row: Row) -> Text:
    return Text(f"{row['scheme']} (this one)" if row["this"] else row["scheme"], style="bold" if row["this"] else "")


def difference(data: Mapping[str, Any]) -> RenderableType:
    """Two checkpoints (inspect.difference)."""
    parts: list[RenderableType] = [facts("Compared", [
        (key, f"{one['path']}: {one['format'] or 'plain weights'}, {size(one['weight_bytes'])}, "
              f"{one['bits_per_weight']:.4g} bits per weight") for key, one in (("a", data["a"]), ("b", data["b"]))])]
    if data["linears"]:
        parts.append(table(("linear", "scheme a", "b", "size a", "b", "error a", "b", "bytes"), [
            (one["name"], *_pair(one["scheme"], str), *_pair(one["bytes"], size), *_pair(one["error"], percent),
             "equal" if one["equal_tensors"] else "differ") for one in data["linears"]], left=3))
    tensors = data["tensors"]
    lines = [("tensors", Text(f"{tensors['equal']} are equal byte for byte", style="green"))]
    lines += [("", Text(f"{len(tensors[key])} {what}: {_some(tensors[key])}", style="yellow"))
              for key, what in (("different", "differ"), ("only_a", "only in a"), ("only_b", "only in b"))
              if tensors[key]]
    for title in ("config", "recipe"):
        lines += [(title if not index else "", Text(f"{one['key']}: {_short(one['a'])} → {_short(one['b'])}"))
                  for index, one in enumerate(data[title])]
    if data["identical"]:
        lines.append(("", Text("The two are identical.", style="green")))
    return stacked([*parts, facts("The rest", lines)])


def _pair(values: Sequence[Any], show: Callable[[Any], str]) -> list[str]:
    return ["-" if value is None else show(value) for value in values]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (" ..." if len(names) > NAMES_SHOWN else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
