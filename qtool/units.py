"""Numbers as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people, decimal units: 92.4 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def span(seconds: float) -> str:
    """Seconds for people: 42 s, 2 min 05 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def clock(seconds: float) -> str:
    """0:02:05, as a progress bar writes time."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def percent(share: float | None) -> str:
    """0.0123 as 1.23 %; a dash where there is no figure."""
    return "-" if share is None else f"{100 * share:.3g} %"


def millions(count: float) -> str:
    """135 M, 8.19 B (billions), as models are called."""
    for unit, scale in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}" if count < 999.5 * scale else f"{count / scale:.0f}{unit}"
    return f"{count:.0f}"
