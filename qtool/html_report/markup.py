"""HTML as a tree, so that whatever a checkpoint says becomes text and never markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from qtool.escape import clean

Element = ElementTree.Element
Piece = Element | str | None
LONG_NUMBERS = re.compile(r"\d+\.\d{3,}")  # of coordinates, in pixels
REFERENCES = re.compile(r"url\(#([^)]+)\)")


def percent(share: float | None) -> str:
    """0.0123 as 1.23 %, 0.01 as 1.00 %: three figures, so that columns of them can be compared."""
    return "–" if share is None else f"{100 * share:#.3g}".rstrip(".") + " %"


def node(tag: str, *children: Piece, **attributes: str) -> Element:
    """An element; strings among its children are text. class_="x" is the attribute class, data_x="y" is data-x."""
    made = Element(tag, {key.rstrip("_").replace("_", "-"): clean(value) for key, value in attributes.items()})
    for child in children:
        if isinstance(child, str):
            if len(made):
                made[-1].tail = (made[-1].tail or "") + clean(child)
            else:
                made.text = (made.text or "") + clean(child)
        elif child is not None:
            made.append(child)
    return made


def table(columns: Sequence[str], rows: Iterable[Sequence[Piece]], left: int = 1, class_: str = "") -> Element:
    """A table whose first `left` columns are words and whose others are figures, aligned right."""
    sides = ["word" if index < left else "figure" for index in range(len(columns))]
    head = node("tr", *[node("th", name, scope="col", class_=side) for name, side in zip(columns, sides, strict=True)])
    body = [node("tr", *[node("td", cell, class_=side) for cell, side in zip(row, sides, strict=True)]) for row in rows]
    return node("div", node("table", node("thead", head), node("tbody", *body)), class_=f"scroll {class_}".strip())


def folded(title: str, *content: Piece) -> Element:
    """What opens with a click."""
    return node("details", node("summary", title), *content)


def facts(pairs: Iterable[tuple[str, Piece]]) -> Element:
    """Names and values, one pair a line."""
    return node("dl", *[node("div", node("dt", name), node("dd", value)) for name, value in pairs], class_="facts")


def drawing(svg: str, name: str, label: str, class_: str) -> Element:
    """An SVG document as part of a page: ids of its own, descriptions of marks as their titles, one label for it all.

    name: begins its ids, so that two drawings of a page have none in common. They are numbered anew, as Vega counts on
    from one drawing of a process to the next.
    """
    root = ElementTree.fromstring(svg)
    ids = {one.attrib["id"]: f"{name}-{index}" for index, one in enumerate(
        one for one in root.iter() if "id" in one.attrib)}
    for one in root.iter():
        one.tag = one.tag.rpartition("}")[2]
        told = one.attrib.get("aria-label")
        for key in [key for key in one.attrib if key.startswith("aria-") or key in ("role", "style") or "}" in key]:
            del one.attrib[key]
        for key, value in one.attrib.items():
            value = LONG_NUMBERS.sub(lambda found: f"{float(found[0]):.2f}", value)
            one.attrib[key] = ids[value] if key == "id" else REFERENCES.sub(
                lambda found: f"url(#{ids[found[1]]})", value)
        if told and one.tag in ("path", "rect"):
            one.append(node("title", told))
            one.attrib["class"] = "mark"
    root.attrib |= {"role": "img", "aria-label": label, "class": f"drawing {class_}"}
    return root


def document(root: Element) -> bytes:
    """The page as UTF-8."""
    return b"<!doctype html>\n" + ElementTree.tostring(root, encoding="unicode", method="html").encode() + b"\n"
