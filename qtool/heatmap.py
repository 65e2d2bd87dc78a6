"""Figures per linear as a map, decoder blocks by kinds of linears: the numbers, their colours, the map in a terminal.

The page of `inspect --report` draws the same cells in the same colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from qtool.errors import InputError

Row = Mapping[str, Any]  # one of inspect.layers
ERRORS = {"output_error": "outputs' energy", "relative_error": "outputs' energy", "weight_error": "weights' energy"}
# viridis and cividis at even steps: perceptually uniform, and readable with any colour vision (Smith and van der Walt
# 2015; Nuñez, Anderton and Renslow 2018)
VIRIDIS = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26",
           "#fde725")
CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
ONE_SCHEME = 0.25  # bits per weight: what linears of one scheme may differ by
SHADES = " .:-=+*#%@"  # where a terminal has no colours and a cell no room for figures
BLOCK_WIDTH, LEAST_WIDTH, MOST_WIDTH = 7, 3, 10
Measure = Callable[[Sequence[Row]], float | None]


@dataclass(frozen=True)
class Cells:
    """The linears of a checkpoint by (decoder block, kind); kinds in order of execution, `outside` is in no block."""

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    rows: Mapping[tuple[int, str], tuple[Row, ...]]
    outside: tuple[Row, ...]


@dataclass(frozen=True)
class Scale:
    """From a figure to a colour: the colours spread evenly from `low` to `high`, over their logarithms if `log`."""

    colours: tuple[str, ...]
    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Where in [0, 1] a figure lies; one beyond the ends is at the end."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        return min(max((at - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def colour(self, value: float) -> str:
        """#rrggbb, linear in sRGB between the nearest two colours."""
        place = self.share(value) * (len(self.colours) - 1)
        index = min(int(place), len(self.colours) - 2)
        pair = [[int(name[at:at + 2], 16) for at in (1, 3, 5)] for name in self.colours[index:index + 2]]
        return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in zip(*pair, strict=True))


def ink(colour: str) -> str:
    """Black or white, whichever is easier to read on #rrggbb (by relative luminance, WCAG 2)."""
    red, green, blue = ((int(colour[at:at + 2], 16) / 255) ** 2.2 for at in (1, 3, 5))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"


def cells(rows: Sequence[Row]) -> Cells:
    """The layers of inspect.layers in their places; all experts of a block are one cell."""
    placed = [(*_place(row["name"]), row) for row in rows]
    stacks = {stack for stack, block, _, _ in placed if block is not None}
    found: dict[tuple[int, str], list[Row]] = {}
    for stack, block, kind, row in placed:
        if block is not None:  # of two towers, each has kinds of its own
            found.setdefault((block, f"{stack}.*.{kind}" if len(stacks) > 1 else kind), []).append(row)
    return Cells(tuple(sorted({block for block, _ in found})), tuple(dict.fromkeys(kind for _, kind in found)),
                 {place: tuple(members) for place, members in found.items()},
                 tuple(row for _, block, _, row in placed if block is None))


def _place(name: str) -> tuple[str, int | None, str]:
    """(what comes before the number of the block, the number or None, the kind: what comes after it, numbers as *)"""
    words = name.split(".")
    at = next((index for index, word in enumerate(words) if word.isdecimal()), None)
    if at is None or at + 1 == len(words):
        return "", None, name
    kind = ".".join("*" if word.isdecimal() else word for word in words[at + 1:])
    return ".".join(words[:at]), int(words[at]), kind


def short(kinds: Sequence[str]) -> dict[str, str]:
    """Each kind by as many of its last words as tell it from the others: q_proj of self_attn.q_proj."""
    words = {kind: kind.split(".") for kind in kinds}
    count = dict.fromkeys(kinds, 1)
    while True:
        names = {kind: ".".join(words[kind][-count[kind]:]) for kind in kinds}
        alike = [kind for kind in kinds if list(names.values()).count(names[kind]) > 1
                 and count[kind] < len(words[kind])]
        if not alike:
            return names
        for kind in alike:
            count[kind] += 1


def known(placed: Cells, measure: Measure) -> list[float]:
    """The figures of all cells that have one."""
    return [value for rows in placed.rows.values() if (value := measure(rows)) is not None]


def error_key(rows: Sequence[Row]) -> str | None:
    """Which error is known: of the outputs, measured from the files or while solving, else of the weights; or None."""
    return next((key for key in ERRORS if any(row.get(key) is not None for row in rows)), None)


def median(key: str) -> Measure:
    """The middle one of the known figures of a cell (of an even number the upper one), None where none is."""
    def measure(rows: Sequence[Row]) -> float | None:
        known = sorted(row[key] for row in rows if row.get(key) is not None)
        return known[len(known) // 2] if known else None
    return measure


def bits(rows: Sequence[Row]) -> float | None:
    """Bits per weight over the linears of a cell."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return 8 * sum(row["bytes"] for row in rows) / weights if weights else None


def error_scale(values: Sequence[float]) -> Scale | None:
    """Logarithmic, since errors differ by orders of magnitude; None where no figure is positive.

    The few smallest all have the first colour, so that one linear with next to no error leaves colours to the others.
    """
    positive = sorted(value for value in values if value > 0)
    return Scale(VIRIDIS, positive[len(positive) // 20], positive[-1], True) if positive else None


def bits_scale(values: Sequence[float]) -> Scale | None:
    """Linear, and never so fine that the shares of scales in layers of one scheme look like different schemes."""
    if not values:
        return None
    low, high = min(values), max(values)
    return Scale(CIVIDIS, low, high, False) if high - low > ONE_SCHEME else Scale(CIVIDIS, low - 1, high + 4, False)


@dataclass(frozen=True)
class TerminalMap:
    """One map for rich: a line per block, a column per kind, coloured backgrounds with the figure where it fits."""

    title: str
    cells: Cells
    measure: Measure
    scale: Scale
    show: Callable[[float], str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kinds, coloured = self.cells.kinds, console.color_system is not None
        width = (min(options.max_width, 120) - BLOCK_WIDTH) // max(len(kinds), 1)
        width = min(max(width, LEAST_WIDTH), MOST_WIDTH)
        known = {place: value for place, rows in self.cells.rows.items() if (value := self.measure(rows)) is not None}
        figures = all(len(self.show(value)) < width for value in known.values())
        yield Text(self.title, style="bold")
        yield from self._legend(coloured, figures)
        names = short(kinds)
        heading = Text(f"{'block':>{BLOCK_WIDTH - 2}}  ", style="bold")
        for kind in kinds:
            heading.append(_fitted(names[kind], width - 1).rjust(width - 1) + " ")
        yield heading
        for block in self.cells.blocks:
            line = Text(f"{block:>{BLOCK_WIDTH - 2}}  ", no_wrap=True)
            for kind in kinds:
                line.append_text(self._cell(known.get((block, kind)), width, coloured, figures))
            yield line

    def _cell(self, value: float | None, width: int, coloured: bool, figures: bool) -> Text:
        if value is None:
            return Text(("-" if figures else "").rjust(width - 1) + " ", style="dim")
        if figures:
            text = self.show(value).rjust(width - 1) + " "
        else:
            shade = SHADES[min(int(self.scale.share(value) * len(SHADES)), len(SHADES) - 1)]
            text = (" " if coloured else shade) * width
        colour = self.scale.colour(value)
        return Text(text, style=Style(color=ink(colour), bgcolor=colour) if coloured else "")

    def _legend(self, coloured: bool, figures: bool) -> RenderResult:
        """From the least to the most, where colours or shades are all there is."""
        steps = 24
        low, high = self.show(self.scale.low), self.show(self.scale.high)
        line = Text(f"≤ {low} " if self.scale.log else f"{low} ")
        for step in range(steps):
            at = step / (steps - 1)
            value = (self.scale.low * (self.scale.high / self.scale.low) ** at if self.scale.log
                     else self.scale.low + (self.scale.high - self.scale.low) * at)
            shade = " " if coloured else SHADES[min(int(at * len(SHADES)), len(SHADES) - 1)]
            line.append(shade, Style(bgcolor=self.scale.colour(value)) if coloured else None)
        if coloured or not figures:
            yield line.append(f" {high}")


def _fitted(name: str, width: int) -> str:
    return name if len(name) <= width else name[:max(width - 1, 1)] + "…"


def terminal(path: str, rows: Sequence[Row]) -> list[TerminalMap]:
    """The maps of a checkpoint: the error where one is known, the bits where they differ.

    Raises InputError where there is neither.
    """
    placed, maps = cells(rows), []
    key = error_key(rows)
    scale = error_scale(known(placed, median(key))) if key else None
    if key and scale:
        maps.append(TerminalMap(f"Error per linear, % of the {ERRORS[key]}", placed, median(key), scale,
                                lambda value: f"{100 * value:.2g}"))
    spread = known(placed, bits)
    by_bits = bits_scale(spread)
    if by_bits and max(spread) - min(spread) > ONE_SCHEME:
        maps.append(TerminalMap("Bits per weight", placed, bits, by_bits, lambda value: f"{value:.3g}"))
    if not placed.blocks or not maps:
        raise InputError(f"--heatmap: no error of a linear of {path} is known, and all have the same bits; --against "
                         "MODEL measures the errors")
    return maps
