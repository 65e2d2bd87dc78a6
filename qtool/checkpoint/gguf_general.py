"""What a GGUF file says of a model in general: its size, and what its card and its generation config tell.

The keys are those of llama.cpp's converter, found by the same rules, which are the gguf package's. The card is the work
of others: only plain texts and lists of them are taken from it, and what is no such thing is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from gguf.metadata import Metadata
from gguf.utility import size_label

from qtool import safe_yaml
from qtool.checkpoint.gguf_families import EXPERT
from qtool.errors import InputError
from qtool.files import read_limited

CARD, GENERATION = "README.md", "generation_config.json"
MAX_BYTES = 1 << 20
MAX_TEXT, MAX_ITEMS = 1000, 200
FENCE = "---\n"
# key of generation_config.json -> Metadata's, and whether it is a whole number
SAMPLING = {"top_k": ("sampling_top_k", True), "top_p": ("sampling_top_p", False), "min_p": ("sampling_min_p", False),
            "temperature": ("sampling_temp", False)}


def add(keys: GGUFWriter, directory: Path, config: Mapping[str, Any], name: str,
        parameters: Mapping[str, tuple[int, ...]]) -> None:
    """Put them among the keys. name: of the model.  parameters: shape of every tensor by its Hugging Face name."""
    path = config.get("_name_or_path")
    said = {"_name_or_path": path} if _is_text(path) else {}
    total, shared, expert, count = _counts(parameters)
    found = Metadata.apply_metadata_heuristic(Metadata(), _card(directory / CARD), said, Path(name[:MAX_TEXT]), total)
    found.name = name
    found.size_label = found.size_label or (size_label(total, shared, expert, count) if total else None)
    for key, value in _sampling(directory / GENERATION).items():
        setattr(found, key, value)
    found.set_gguf_meta_model(keys)


def _counts(parameters: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Parameters: all, those outside of the experts, those of one expert of each layer; and experts of a layer."""
    total = sum(math.prod(shape) for shape in parameters.values())
    experts = {name: math.prod(shape) for name, shape in parameters.items() if re.search(EXPERT, name)}
    first = sum(size for name, size in experts.items() if re.search(r"(?<=\.)experts\.0(?=\.)", name))
    numbers = {int(match[1]) for name in experts if (match := re.search(EXPERT, name))}
    return total, total - sum(experts.values()), first, len(numbers)


def _card(path: Path) -> dict[str, Any]:
    """The plain texts, and lists of them, before the text of a model card; {} where there are none."""
    try:
        text = read_limited(path, MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
        if not text.startswith(FENCE):
            return {}
        front = text[len(FENCE):].partition("\n" + FENCE.rstrip())[0] + "\n"
        front = front.replace("- no\n", '- "no"\n').replace("\t", "  ")  # the language Norwegian; as the converter does
        said = safe_yaml.parse(front, str(path))
    except (OSError, UnicodeDecodeError, InputError):  # what a card says is no reason to refuse a model
        return {}
    return {key: value for key, value in said.items() if _is_plain(value)} if isinstance(said, dict) else {}


def _is_plain(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and 0 < len(value) <= MAX_ITEMS and all(map(_is_text, value)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _sampling(path: Path) -> dict[str, Any]:
    """How to draw tokens, where generation_config.json says so; as Metadata calls it."""
    try:
        said = json.loads(read_limited(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    made: dict[str, Any] = {}
    for theirs, (ours, whole) in SAMPLING.items() if isinstance(said, dict) else ():
        value: Any = said.get(theirs)
        if type(value) in ((int,) if whole else (int, float)) and 0 <= value < 1 << 31:
            made[ours] = value if whole else float(value)
    return made
