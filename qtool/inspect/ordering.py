"""The rows of a table in the order of one of their figures."""

from __future__ import annotations

import difflib
from typing import Any

from qtool.errors import InputError

ALIASES = {"error": ("output_error", "relative_error", "weight_error"), "sqnr": ("sqnr_db",), "size": ("bytes",),
           "linear": ("name",), "scheme": ("scheme_label",)}
SMALL_FIRST = ("sqnr_db", "weight_sqnr_db", "output_sqnr_db")  # where a small figure is the bad one


def arranged(rows: list[dict[str, Any]], key: str | None, top: int | None) -> list[dict[str, Any]]:
    """The first `top` rows by `key`: figures with the worst or largest first, names in order; no figure: at the end.

    error is the measured output error, else the recorded one, else that of the weights. Raises InputError.
    """
    if top is not None and top < 1:
        raise InputError(f"--top {top}: at least 1")
    if key is not None:
        rows = _by(rows, _settled(rows, key))
    return rows[:top]


def _settled(rows: list[dict[str, Any]], key: str) -> str:
    """The key of the rows that is meant."""
    known = [name for name in dict.fromkeys(name for row in rows for name in row)
             if any(isinstance(row.get(name), (int, float, str)) for row in rows)]
    for name in ALIASES.get(key, (key,)):
        if name in known:
            return name
    near = difflib.get_close_matches(key, [*known, *ALIASES], 1, 0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    why = "is known of no linear here" if any(key in row for row in rows) or key in ALIASES else "is no key of a layer"
    raise InputError(f"--sort {key}: that {why}{hint}; keys: {', '.join(known)}")


def _by(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    having = [row for row in rows if row.get(key) is not None]
    without = [row for row in rows if row.get(key) is None]
    text = any(isinstance(row[key], str) for row in having)
    if text:
        having.sort(key=lambda row: str(row[key]))
    else:
        having.sort(key=lambda row: row[key], reverse=key not in SMALL_FIRST)
    return having + without
