"""What a checkpoint says, where people read it: nothing of it is a command to a terminal, a browser or a spreadsheet.

HTML is escaped by its tree (html_report/markup.py).
"""

from __future__ import annotations

import re

# controls but tab and newline, halves of surrogate pairs, and marks that turn the reading direction or end the text
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
LINE_END = re.compile(r"[\n\t\x0b\x0c\r\x1c-\x1e\x85\u2028\u2029]+")
# what begins emphasis, code, links, HTML, entities, cells, mathematics or mentions in CommonMark or GitHub's dialect
MARKUP = re.compile(r"[\\`*\[\]<>|&~!@$]|(?<![^\W_])_|_(?![^\W_])|(?<=[a-z]):(?=//)|(?<=\bwww)\.", re.IGNORECASE)
FORMULA = re.compile("[\\s\ufeff\u200b-\u200f\u2060]*[=+@\uff1d\uff0b\uff0d\uff20-]")


def clean(text: str) -> str:
    """The text with a replacement character for each that cannot be shown; as XML and UTF-8 can hold it."""
    return UNPRINTABLE.sub("\ufffd", text)


def markdown(text: str) -> str:
    """The text as Markdown that shows it within a line or a cell of a table: one line, no markup, no links."""
    return MARKUP.sub(r"\\\g<0>", clean(LINE_END.sub(" ", text)))


def code(text: str) -> str:
    """The text as a code span of Markdown outside of tables, in as many backticks as keep it together."""
    line = clean(LINE_END.sub(" ", text))
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ") or not line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fenced(text: str, language: str) -> str:
    """Lines of text as a code block of Markdown, in a fence that none of them can close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{clean(text).strip()}\n{fence}"


def cell(value: object) -> object:
    """A value for a CSV file: text that a spreadsheet would compute as a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = clean(LINE_END.sub(" ", value))
    return "'" + text if FORMULA.match(text) else text
