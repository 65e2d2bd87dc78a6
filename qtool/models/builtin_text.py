"""Text that is there without a download: the Python installation's own prose and code.

Prose is the language reference that `help()` shows, code the sources of a fixed list of standard modules. Both
depend on the Python version only; the hash of the tokens in the manifest tells versions apart. Half of the
documents calibrates, half evaluates; a prefix of either half holds prose and code.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

PARTS = ("calibration", "evaluation")
PIECE = 4000  # characters of prose, then as many of code, and so on
# Long-lived modules that exist as Python source from 3.11 on; one that a later version drops is passed over.
MODULES = """
argparse ast asyncio.base_events asyncio.tasks bdb calendar cmd codecs collections compileall concurrent.futures._base
configparser contextlib copy csv dataclasses decimal difflib dis doctest email.message email.header email.utils enum
filecmp fileinput fractions ftplib functools gettext glob gzip hashlib heapq html.parser http.client http.cookiejar
http.cookies http.server imaplib inspect ipaddress json.decoder json.encoder locale logging logging.config
logging.handlers mailbox mimetypes modulefinder multiprocessing.managers multiprocessing.pool netrc optparse pdb pickle
pickletools pkgutil platform plistlib poplib pprint profile pstats pyclbr pydoc queue random reprlib sched selectors
shelve shlex shutil smtplib socket socketserver statistics string subprocess symtable tarfile tempfile textwrap
threading timeit tokenize trace traceback tracemalloc turtle types typing unittest.case unittest.mock urllib.parse
urllib.request uuid wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree zipfile
""".split()  # noqa: SIM905 - a hundred quoted names are harder to read


def pieces(part: str) -> Iterator[str]:
    """Text of one of PARTS in pieces to be joined as they are: prose and code in turn, then what is left of either."""
    every_other = slice(PARTS.index(part), None, len(PARTS))
    prose = _pieces(topics[name] for name in sorted(topics)[every_other])
    code = _pieces(_source(name) for name in MODULES[every_other])
    for pair in itertools.zip_longest(prose, code, fillvalue=""):
        yield from pair


def _pieces(documents: Iterator[str]) -> Iterator[str]:
    """Cut documents at line ends into pieces of about PIECE characters."""
    piece = ""
    for document in documents:
        for line in (document.strip() + "\n\n\n").splitlines(keepends=True):
            piece += line
            if len(piece) >= PIECE:
                yield piece
                piece = ""
    yield piece


def _source(module: str) -> str:
    """The source text of a module; empty where the installation has none."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return ""
    origin = Path(spec.origin) if spec and spec.origin else None
    if origin is None or origin.suffix != ".py" or not origin.is_file():
        return ""
    return origin.read_text(encoding="utf-8")
