"""What the answers of `qtool inspect` look like beside its summary (report.py): layers, memory, differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text

from qtool import repairs
from qtool.report import facts, stacked, table
from qtool.units import percent, size

Row = Mapping[str, Any]
NAMES_SHOWN = 8
METHODS_SHOWN = 2
WIDEST = 1000  # no table is wider
PARTS = ("weights", "kv_cache", "activations", "overhead", "total")


def _figure(form: str) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else format(value, form)


FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("shape", "shape", lambda shape: " × ".join(map(str, shape))), ("size", "bytes", size),
    ("bits", "bits_per_weight", _figure(".4g")), ("output error", "output_error", percent),
    ("held-out error", "relative_error", percent), ("weight error", "weight_error", percent),
    ("SQNR dB", "sqnr_db", _figure(".1f")), ("expected KL", "expected_kl", _figure(".2g")),
    ("absmax", "absmax", _figure(".3g")), ("std", "std", _figure(".3g")), ("kurtosis", "kurtosis", _figure(".3g")),
    ("zeros", "zeros", percent), ("outliers", "outlier_features", _figure("d")),
    ("damping", "damping", _figure(".3g")), ("tokens", "tokens", lambda value: str(value or "-")),
)
Column = tuple[str, Sequence[str]]


@dataclass(frozen=True)
class Fitting:
    """A table that goes on below, its first column repeated, where the terminal is too narrow for all of it."""

    first: Column
    others: Sequence[Column]
    words: int = 0  # how many of the others are no figures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        start = 0
        while start < len(self.others):
            stop = start + 1
            while stop < len(self.others) and self._width(console, options, start, stop + 1) <= options.max_width:
                stop += 1
            yield self._table(start, stop)
            if stop < len(self.others):
                yield Text("")
            start = stop

    def _width(self, console: Console, options: ConsoleOptions, start: int, stop: int) -> int:
        return Measurement.get(console, options.update_width(WIDEST), self._table(start, stop)).maximum

    def _table(self, start: int, stop: int) -> RenderableType:
        columns = [self.first, *self.others[start:stop]]
        return table([title for title, _ in columns], zip(*(cells for _, cells in columns), strict=True),
                     1 + max(self.words - start, 0))


def layers(rows: Sequence[Row]) -> RenderableType:
    """One line per linear: what is stored, how far off it is, its values, how it was solved.

    Columns without any figure are left out.
    """
    figures = [(title, [show(row.get(key)) for row in rows]) for title, key, show in FIGURES
               if any(row.get(key) for row in rows)]
    notes = [_notes(row) for row in rows]
    schemes = ("scheme", [row["scheme_label"] for row in rows])
    return Fitting(_named(rows), [schemes, *figures, *([("notes", notes)] if any(notes) else [])], 1)


def _notes(row: Row) -> str:
    """What went another way than usual."""
    said = [repairs.KINDS[kind][1] for kind in repairs.kinds(row)]
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
    rows = known["schemes"]
    parts.append(Fitting(("scheme", [f"{row['scheme']} (this)" if row["this"] else row["scheme"] for row in rows]), [
        ("made with --method", [_methods(row) for row in rows]), ("weights", [size(row["weights"]) for row in rows]),
        ("total", ["-" if row["total"] is None else size(row["total"]) for row in rows]),
        ("of bf16", [percent((row["total"] or row["weights"]) / dense) if dense else "-" for row in rows])], 1))
    if known["not_possible"]:
        parts.append(facts("Not possible here", [(f"{one['scheme']}", one["why"]) for one in known["not_possible"]]))
    return stacked(parts)


def _methods(row: Row) -> str:
    shortest = sorted(row["methods"], key=len)
    return ", ".join(shortest[:METHODS_SHOWN]) + (", …" if len(shortest) > METHODS_SHOWN else "")


def difference(data: Mapping[str, Any]) -> RenderableType:
    """Two checkpoints (inspect.difference)."""
    parts: list[RenderableType] = [facts("Compared", [
        (key, f"{one['path']}: {one['format'] or 'plain weights'}, {size(one['weight_bytes'])}, "
              f"{one['bits_per_weight']:.4g} bits per weight") for key, one in (("a", data["a"]), ("b", data["b"]))])]
    if data["linears"]:
        parts.append(_linears(data["linears"]))
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


def _linears(linears: Sequence[Row]) -> RenderableType:
    """Those that differ, the figures of both in pairs."""
    shown: tuple[tuple[str, Callable[[Any], str]], ...] = (("scheme", str), ("bytes", size), ("error", percent))
    pairs = [(f"{title} {side}", ["-" if one[title][place] is None else show(one[title][place]) for one in linears])
             for title, show in shown for place, side in enumerate("ab")]
    stored = ("tensors", ["equal" if one["equal_tensors"] else "differ" for one in linears])
    return Fitting(_named(linears), [*pairs, stored], 2)


def _named(rows: Sequence[Row]) -> Column:
    """The names, without what all of them begin with."""
    start = commonprefix([row["name"] for row in rows])
    start = start[:start.rfind(".") + 1]
    return f"{start}…" if start else "linear", [row["name"].removeprefix(start) for row in rows]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (" ..." if len(names) > NAMES_SHOWN else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
