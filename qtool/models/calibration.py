"""Calibration tokens: equal windows, in order, of built-in text, a file or a Hub dataset."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool import heap
from qtool.errors import CalibrationError
from qtool.models import builtin_text, tokenizer
from qtool.recipe import Calibration

FILE = re.compile(r"(?P<path>.+\.(?P<kind>txt|jsonl|parquet))(?::(?P<field>[^:/]+))?", re.IGNORECASE)
DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:]*){0,3}")
SURROGATE = re.compile("[\ud800-\udfff]")
CHARACTERS_PER_TOKEN = 6  # a first guess of how much text is needed; doubled until it is enough
TOKENIZING = 400  # bytes for a character of text; the tokenizers library ends the process without them
TAIL = 64  # tokens at the end of a cut text that may come out differently when the text goes on
INSTALL = "pip install 'qtool[datasets]'"


@dataclass(frozen=True)
class CalibrationTokens:
    """ids: int64 [samples, length].  sha256: of the ids as little-endian bytes.  description: for the manifest."""

    ids: torch.Tensor
    sha256: str
    description: dict[str, Any]


def load_tokens(spec: Calibration, directory: Path, samples: int, vocabulary: int) -> CalibrationTokens:
    """Cut `samples` windows of spec.sequence_length tokens, in order, from the text that spec.source names.

    directory: holds the tokenizer.  vocabulary: rows of the embedding.  Text is tokenized without special tokens; where
    the tokenizer itself begins a text with a token (Gemma, Llama 3), every window begins with it.
    Sources: builtin, builtin:evaluation, FILE.txt, FILE.jsonl[:field], FILE.parquet[:field],
    HUB-DATASET[:config[:split[:field]]]. Raises CalibrationError.
    """
    text_tokenizer = tokenizer.load(directory)
    length = spec.sequence_length
    begin = [text_tokenizer.bos_token_id] if tokenizer.starts_with_bos(text_tokenizer) else []
    needed = samples * (length - len(begin))
    tokens = _tokenize(text_tokenizer, _pieces(spec.source, text_tokenizer), needed)
    if len(tokens) < needed:
        enough = len(tokens) // (length - len(begin))
        fewer = f", calibration.samples <= {enough}," if enough else ""
        raise CalibrationError(
            f"calibration source '{spec.source}' gives {len(tokens)} tokens, but {samples} samples of {length} need "
            f"{needed}; use more text{fewer} or a smaller calibration.sequence_length")
    ids = torch.tensor(tokens[:needed], dtype=torch.int64).view(samples, -1)
    del tokens, text_tokenizer
    heap.give_back()  # what splitting all of the text at once took, many times its size
    if begin:
        ids = torch.cat([torch.full((samples, 1), begin[0]), ids], dim=1)
    if int(ids.max()) >= vocabulary:
        raise CalibrationError(f"{directory}: the tokenizer gives token {int(ids.max())}, but the embedding has only "
                               f"{vocabulary} rows; tokenizer files and weights do not belong together")
    digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    description = {"source": _without_folder(spec.source), "samples": samples, "sequence_length": length,
                   "begins_with_bos": bool(begin)}
    return CalibrationTokens(ids, digest, description)


def _without_folder(source: str) -> str:
    """The manifest may not depend on where a file lies."""
    found = FILE.fullmatch(source)
    return source if found is None else source[len(found["path"]) - len(Path(found["path"]).name):]


def _tokenize(text_tokenizer: Any, pieces: Iterator[str], needed: int) -> list[int]:
    """The first `needed` tokens of the joined pieces (fewer if the text ends), exactly as of the whole text."""
    text, characters, ended = "", (needed + TAIL) * CHARACTERS_PER_TOKEN, False
    while True:
        parts = [text]
        size = len(text)
        while size < characters and not ended:
            piece = next(pieces, None)
            ended = piece is None
            parts.append(piece or "")
            size += len(piece or "")
        text = "".join(parts)
        heap.reserve(TOKENIZING * (len(text) + (1 << 16)))
        tokens = text_tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if ended or len(tokens) - TAIL >= needed:
            return tokens[:needed]
        characters *= 2


def _pieces(source: str, text_tokenizer: Any) -> Iterator[str]:
    name, _, rest = source.partition(":")
    if name == "builtin":
        if rest not in ("", *builtin_text.PARTS):
            raise CalibrationError(f"calibration source '{source}': builtin text has the parts "
                                   f"{', '.join(builtin_text.PARTS)}")
        return builtin_text.pieces(rest or "calibration")
    found = FILE.fullmatch(source)
    if found is None:
        return _dataset(source, text_tokenizer)
    path = Path(found["path"])
    if not path.is_file():
        why = "is no regular file" if path.exists() else "does not exist"
        raise CalibrationError(f"calibration file {path} {why}; give a text file, or builtin")
    kind = found["kind"].lower()
    if kind == "txt":
        if field := found["field"]:
            raise CalibrationError(f"calibration source '{source}': a .txt file has no fields; leave out ':{field}'")
        return _text_file(path)
    records = _jsonl(path) if kind == "jsonl" else _parquet(path)
    return _fields(records, found["field"], str(path), text_tokenizer)


def _text_file(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(1 << 20):
                if "\0" in piece:
                    raise CalibrationError(f"calibration file {path} holds binary data, not text; give UTF-8 text")
                yield piece
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file {path} is no UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error}") from None


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and integers of more than 4300 digits
        raise CalibrationError(f"calibration file {path}: line {number} is no JSON: {error}; mend it") from None
    except OSError as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error}") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"calibration file {path}: reading Parquet needs pyarrow: {INSTALL}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"calibration file {path} is no readable Parquet file: {error}") from None


def _dataset(source: str, text_tokenizer: Any) -> Iterator[str]:
    if not DATASET.fullmatch(source):
        raise CalibrationError(f"calibration source '{source}' is neither 'builtin', nor a .txt, .jsonl or .parquet "
                               "file, nor a Hub dataset written as NAME[:config[:split[:field]]]")
    name, config, split, field = (source.split(":") + ["", "", ""])[:4]
    try:
        import datasets
    except ImportError:
        raise CalibrationError(f"calibration source '{source}': Hub datasets need the datasets package: {INSTALL}") \
            from None
    from huggingface_hub.errors import HfHubHTTPError

    # the library underneath (httpx, httpx2) changes with huggingface_hub's version; its errors are a base of this one
    failures: tuple[type[BaseException], ...] = (OSError, ValueError, KeyError, RuntimeError, *HfHubHTTPError.__bases__)

    def records() -> Iterator[dict[str, Any]]:
        try:
            yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except failures as error:
            raise CalibrationError(f"calibration dataset '{source}' cannot be read: {_short(error)}") from None

    return _fields(records(), field or None, source, text_tokenizer)


def _fields(records: Iterable[dict[str, Any]], field: str | None, where: str, text_tokenizer: Any) -> Iterator[str]:
    """The text of each record; a list of chat messages goes through the tokenizer's chat template."""
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise CalibrationError(f"{where}: record {number} is no object with fields")
        chosen = field or ("messages" if "text" not in record and "messages" in record else "text")
        if chosen not in record:
            raise CalibrationError(f"{where}: record {number} has no field '{chosen}'; its fields: "
                                   f"{', '.join(map(str, record))}; name one as {Path(where).name}:FIELD")
        value = record[chosen]
        if isinstance(value, list):
            value = _chat(value, f"{where}: record {number}", text_tokenizer)
        if not isinstance(value, str):
            raise CalibrationError(f"{where}: field '{chosen}' of record {number} is {type(value).__name__}, not text")
        if not value.isascii() and SURROGATE.search(value):
            raise CalibrationError(f"{where}: record {number} holds half of a character (a surrogate such as \\ud800); "
                                   "mend it")
        yield value + "\n\n"


def _chat(messages: list[Any], where: str, text_tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return text_tokenizer.apply_chat_template(messages, tokenize=False)
    except (ValueError, TypeError, KeyError, AttributeError, TemplateError) as error:
        raise CalibrationError(f"{where}: the tokenizer's chat template refuses these messages: {_short(error)}") \
            from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
