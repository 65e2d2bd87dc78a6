"""Finds grids, methods and formats by their file name: adding one is adding one file."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qtool.errors import RecipeError

COLLECTIONS = {"grids": ("aqlm", "ggml")}  # files with many members, which are objects in MEMBERS


def names(folder: str) -> list[str]:
    """The members of qtool/<folder>, as users type them (file compressed_tensors.py is compressed-tensors)."""
    return list(_names(folder))


@functools.cache
def _names(folder: str) -> tuple[str, ...]:
    path, collections = Path(__file__).parent / folder, COLLECTIONS.get(folder, ())
    files = {module.name.replace("_", "-") for module in pkgutil.iter_modules([str(path)])
             if not module.name.startswith("_") and module.name not in collections}
    return tuple(sorted(files | set(_collected(folder))))


@functools.cache
def _collected(folder: str) -> dict[str, Any]:
    return {name: member for file in COLLECTIONS.get(folder, ())
            for name, member in importlib.import_module(f"qtool.{folder}.{file}").MEMBERS.items()}


def having(mark: str, steps: Iterable[tuple[ModuleType, Any]]) -> list[tuple[ModuleType, Any]]:
    """Those of the steps whose module has a mark (SCALES_INPUTS, ...) that is true, with their options."""
    return [(module, options) for module, options in steps if getattr(module, mark, False)]


def load(folder: str, name: str, others: Sequence[str] = ()) -> ModuleType:
    """The module of one member (or an object like one). Raises RecipeError with the nearest name for an unknown one.

    others: names that may be given there too, and are no members."""
    if name in _collected(folder):
        member: ModuleType = _collected(folder)[name]
        return member
    known = sorted({*_names(folder), *others})
    if name not in _names(folder):
        close = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise RecipeError(f"unknown {folder[:-1]} '{name}'{hint} (known: {', '.join(known)})")
    return importlib.import_module(f"qtool.{folder}.{name.replace('-', '_')}")
