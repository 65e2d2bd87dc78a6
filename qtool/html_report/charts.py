"""The drawings of the page: Vega-Lite specifications, made into SVG here and now by vl-convert.

Colours of text, axes and points come from the page's style sheet, which knows light from dark; only the colours that
stand for figures are in the drawings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtool.escape import clean
from qtool.heatmap import Cells, Measure, Row, Scale, ink, short
from qtool.html_report.markup import Element, drawing

VEGA_LITE = "6.1"
WIDE, CELL, MOST_CELL = 974, 26, 56  # pixels: a map's width with its labels, the height of its rows, its widest cell
TALL = 340  # pixels: the width of a map for narrow screens
LABELS = 130  # pixels: at most so much for the names of kinds
ROOM_FOR_FIGURES = 38  # pixels
LEAST_GAP = 0.17  # of a legend's length between two of its labels
SCHEMES = {True: "viridis", False: "cividis"}  # of logarithmic and linear scales
PERCENT = "format(datum.value * 100, '.2~g')"
BITS = "format(datum.value, '.3~g')"
CONFIG: dict[str, Any] = {
    "font": "Helvetica, Arial, sans-serif", "background": None, "view": {"stroke": None},
    "axis": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelFontWeight": "normal",
             "domain": False, "ticks": False, "labelPadding": 6, "titlePadding": 8},
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "gradientThickness": 10,
               "gradientLength": 260, "gradientStrokeWidth": 0, "offset": 10, "orient": "top", "titlePadding": 6},
    "text": {"fontSize": 10},
}


class Charts:
    """Draws; numbers its drawings, so that their ids differ."""

    def __init__(self) -> None:
        import vl_convert  # the extra qtool[report]

        self._convert = vl_convert.vegalite_to_svg
        self._drawn = 0

    def draw(self, spec: Mapping[str, Any], label: str, class_: str = "") -> Element:
        self._drawn += 1
        svg = self._convert({"config": CONFIG, **spec}, vl_version=VEGA_LITE, allowed_base_urls=[])
        return drawing(svg, f"drawing{self._drawn}", label, class_)


def heat_map(cells: Cells, measure: Measure, scale: Scale, show: Callable[[float], str],
             tell: Callable[[tuple[Row, ...]], str], kept: Mapping[tuple[int, str], str], title: str,
             tall: bool) -> dict[str, Any]:
    """Blocks along, kinds down; for narrow screens the other way round.

    show: a figure as it stands in a cell; tell: what is said of a cell; kept: of cells without a figure, why.
    """
    kinds = list(dict.fromkeys([*cells.kinds, *(kind for _, kind in kept)]))
    blocks = sorted({*cells.blocks, *(block for block, _ in kept)})
    names = {kind: clean(name) for kind, name in short(kinds).items()}
    values = []
    for (block, kind), rows in cells.rows.items():
        value = measure(rows)
        if value is not None:
            values.append({"block": block, "kind": names[kind], "value": value, "figure": show(value),
                           "ink": ink(scale.colour(value)), "tip": clean(tell(rows))})
    empty = [{"block": block, "kind": names[kind], "tip": clean(text)} for (block, kind), text in kept.items()]
    along = len(kinds) if tall else len(blocks)
    width = TALL if tall else min(WIDE, LABELS + MOST_CELL * along)
    by_block = {"field": "block", "type": "ordinal", "title": "block", "sort": blocks,
                "axis": {"labelAngle": 0, "labelOverlap": True}}
    by_kind = {"field": "kind", "type": "nominal", "title": None, "sort": [names[kind] for kind in kinds],
               "axis": {"labelLimit": LABELS, **({"labelAngle": -50, "orient": "top"} if tall else {})}}
    places = {"x": by_kind, "y": by_block} if tall else {"x": by_block, "y": by_kind}
    return {
        "width": width, "height": {"step": 22 if tall else CELL}, "autosize": {"type": "fit-x", "contains": "padding"},
        "encoding": places,
        "layer": [_coloured(values, scale, title), *([_kept(empty)] if empty else []),
                  *([_figures(values)] if (width - LABELS / 2) / max(along, 1) >= ROOM_FOR_FIGURES else [])],
    }


def _coloured(values: Sequence[Mapping[str, Any]], scale: Scale, title: str) -> dict[str, Any]:
    ticks = _ticks([one["value"] for one in values], scale)
    least = f"(datum.value > {scale.low * 1.0001!r} ? '' : '≤ ') + " if scale.log else ""
    legend = {"title": title, "values": ticks, "labelOverlap": False,
              "labelExpr": least + (PERCENT if scale.log else BITS)}
    kind: dict[str, Any] = {"type": "log" if scale.log else "linear", "domain": [scale.low, scale.high], "nice": False,
                            "zero": False, "clamp": True, "scheme": SCHEMES[scale.log]}
    if scale.high == scale.low:
        kind = {"type": "ordinal", "range": [scale.colour(scale.low)]}
    return {"data": {"values": values}, "mark": "rect", "encoding": {
        "description": {"field": "tip"},
        "color": {"field": "value", "type": "quantitative", "scale": kind,
                  "legend": legend if len(ticks) > 1 else None}}}


def _ticks(values: Sequence[float], scale: Scale) -> list[float]:
    """What a legend names: the ends and round figures between; of a linear scale, the most frequent figures."""
    if scale.log:
        found = [figure * 10.0 ** power for power in range(-12, 3) for figure in (1, 2, 5)]
    else:
        found = [value for value, _ in Counter(round(value, 2) for value in sorted(values)).most_common()]
    ends = [scale.low, scale.high] if scale.log else sorted({min(found), max(found)})
    chosen = list(ends)
    for value in found:
        gaps = {other: abs(scale.share(value) - scale.share(other)) for other in chosen}
        beside_least = gaps[scale.low] / 1.6 if scale.log else 1.0  # its label is longer, by ≤
        if scale.low < value < scale.high and min(*gaps.values(), beside_least) >= LEAST_GAP:
            chosen.append(value)
    return sorted(chosen)


def _kept(empty: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"data": {"values": empty}, "mark": {"type": "rect", "fillOpacity": 0, "strokeWidth": 1, "stroke": "#888888",
                                                "strokeDash": [2, 2]},
            "encoding": {"description": {"field": "tip"}}}


def _figures(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"data": {"values": values}, "mark": {"type": "text", "aria": False},
            "encoding": {"text": {"field": "figure"}, "fill": {"field": "ink", "type": "nominal", "scale": None}}}


def error_by_size(points: Sequence[Mapping[str, Any]], of: str, tall: bool) -> dict[str, Any]:
    """A dot per run: its size against its median error, a line to its worst one. tall: for narrow screens.

    points: name, bytes, median, worst, tip; errors are positive.
    """
    height, width = (280, TALL) if tall else (340, WIDE)
    low, high = min(one["median"] for one in points) * 0.7, max(one["worst"] for one in points) * 1.3
    sizes = [one["bytes"] / 1e6 for one in points]
    span = max(sizes) - min(sizes) or max(sizes)
    places = _apart([height * (1 - math.log(one["median"] / low) / math.log(high / low)) for one in points], 15)
    values = [{**one, "name": clean(one["name"]), "tip": clean(one["tip"]), "megabytes": one["bytes"] / 1e6,
               "label": low * (high / low) ** (1 - place / height)} for one, place in zip(points, places, strict=True)]
    round_ones = [figure * 10.0 ** power for power in range(-12, 3) for figure in (1, 2, 5)]
    x = {"field": "megabytes", "type": "quantitative", "title": "size of all tensors, MB",
         "scale": {"domain": [min(sizes) - span * 0.08, max(sizes) + span * (0.7 if tall else 0.3)], "zero": False,
                   "nice": False}, "axis": {"grid": False, "tickCount": 4 if tall else 8}}
    y = {"type": "quantitative", "title": None, "scale": {"type": "log", "domain": [low, high], "nice": False},
         "axis": {"labelExpr": PERCENT, "values": [value for value in round_ones if low <= value <= high]}}
    title = {"text": f"error, % of the {of}", "anchor": "start", "fontSize": 11, "fontWeight": "normal", "offset": 10}
    return {
        "width": width, "height": height, "autosize": {"type": "fit-x", "contains": "padding"}, "title": title,
        "data": {"values": values},
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 1.5, "aria": False},
             "encoding": {"x": x, "y": {**y, "field": "median"}, "y2": {"field": "worst"}}},
            {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
             "encoding": {"x": x, "y": {**y, "field": "median"}, "description": {"field": "tip"}}},
            {"mark": {"type": "text", "align": "left", "dx": 10, "fontSize": 11 if tall else 13, "limit": 110 if tall
                      else 260, "aria": False},
             "encoding": {"x": x, "y": {**y, "field": "label"}, "text": {"field": "name"}}},
        ],
    }


def loss_curve(points: Sequence[Mapping[str, Any]], kept: int, tall: bool) -> dict[str, Any]:
    """Two lines over the steps: on the text that was learned from, and on held-out text, with the step that was kept.

    points: step, fitting (or None), held_out. tall: for narrow screens.
    """
    names = {"fitting": "text learned from", "held_out": "held-out text"}
    values = [{"step": one["step"], "loss": one[key], "of": name,
               "tip": f"step {one['step']}, {name}: {one[key]:.5g} nats per token"}
              for key, name in names.items() for one in points if one[key] is not None]
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"grid": False, "tickMinStep": 1,
                                                                          "tickCount": 4 if tall else 8}}
    y = {"field": "loss", "type": "quantitative", "title": None, "scale": {"zero": False}, "axis": {"tickCount": 5}}
    colour = {"field": "of", "type": "nominal", "title": None, "sort": list(names.values()),
              "scale": {"domain": list(names.values()), "range": ["#3b7dd8", "#d9822b"]},
              "legend": {"columnPadding": 24}}
    title = {"text": "divergence, nats per token", "anchor": "start", "fontSize": 11, "fontWeight": "normal",
             "offset": 10}
    return {
        "width": TALL if tall else WIDE, "height": 240 if tall else 280, "title": title,
        "autosize": {"type": "fit-x", "contains": "padding"}, "data": {"values": values},
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 2, "aria": False}, "encoding": {"x": x, "y": y, "color": colour}},
            {"mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
             "encoding": {"x": x, "y": y, "color": colour, "description": {"field": "tip"}}},
            {"transform": [{"filter": f"datum.step == {kept} && datum.of == '{names['held_out']}'"}],
             "mark": {"type": "point", "size": 170, "strokeWidth": 1.5, "aria": False}, "encoding": {"x": x, "y": y}},
        ],
    }


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The same places in the same order, moved down where two are nearer than `least`."""
    moved, last = [0.0] * len(places), -math.inf
    for index in sorted(range(len(places)), key=lambda index: (places[index], index)):
        last = moved[index] = max(places[index], last + least)
    return moved
