"""One page about quantized checkpoints: figures, maps, recipe and manifest in a file that needs nothing else.

Nothing of it is loaded from anywhere, and its Content-Security-Policy forbids the browser to try. The same runs give
the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from qtool import storage
from qtool.errors import InputError
from qtool.html_report import sections
from qtool.html_report.charts import Charts
from qtool.html_report.checkpoint import article
from qtool.html_report.markup import Element, document, node
from qtool.html_report.runs import Run, names, scales

__all__ = ["Run", "page", "refuse", "write"]


def refuse(path: Path) -> None:
    """Raise InputError where no page can be drawn or written, before anything is measured for it."""
    if importlib.util.find_spec("vl_convert") is None:
        raise InputError("--report draws with vl-convert, which is not installed: pip install 'qtool[report]'")
    if path.is_dir():
        raise InputError(f"--report {path}: is a directory; give the name of a file, such as report.html")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--report {path}: the directory {path.absolute().parent} does not exist; make it first")


def write(path: Path, runs: Sequence[Run]) -> int:
    """Write the page in one step, over an older one; returns its bytes. Raises StorageError."""
    refuse(path)
    content = page(runs)
    try:
        storage.write(path, content)
    except OSError as error:
        raise storage.failed(error, path, "the page", len(content), then=storage.AGAIN) from None
    return len(content)


def page(runs: Sequence[Run]) -> bytes:
    """The page as UTF-8. Raises InputError for a run without a quantized linear."""
    for run in runs:
        if not run.rows or not run.summary["schemes"]:
            raise InputError(f"{run.summary['path']}: nothing is quantized in it, so there is nothing to report; give "
                             "what `qtool quantize` or another quantizer wrote")
    charts, known = Charts(), scales(runs)
    parts: list[Element | None] = [sections.heading(runs)]
    if len(runs) > 1:
        parts.append(sections.comparison(runs, charts))
    for number, (run, name) in enumerate(zip(runs, names(runs), strict=True), 1):
        parts.append(article(run, number, name if len(runs) > 1 else None, known, charts))
    style, script = (resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
                     for name in ("page.css", "page.js"))
    head = node("head", node("meta", charset="utf-8"), _policy(style, script),
                node("meta", name="viewport", content="width=device-width, initial-scale=1"),
                node("meta", name="color-scheme", content="light dark"),
                node("title", sections.title(runs)), node("style", style))
    body = node("body", node("main", *parts), node("div", id="tip", role="tooltip"), node("script", script))
    return document(node("html", head, body, lang="en"))


def _policy(style: str, script: str) -> Element:
    """Nothing may be fetched, embedded, sent or run but this page's own style and script, told by their hashes."""
    allowed = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
               for text in (style, script)]
    return node("meta", http_equiv="Content-Security-Policy", content=(
        f"default-src 'none'; style-src {allowed[0]}; script-src {allowed[1]}; base-uri 'none'; form-action 'none'"))
