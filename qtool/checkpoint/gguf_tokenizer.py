"""The vocabulary of a model as GGUF has it, from tokenizer.json, tokenizer.model or another GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType

from qtool.checkpoint import gguf_pre
from qtool.checkpoint.gguf_families import SPACE
from qtool.checkpoint.gguf_header import read_gguf_header
from qtool.checkpoint.header import read_json
from qtool.errors import CheckpointError, PlanError, printable
from qtool.explained import Explained

ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0  # as in llama.cpp's converter
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Added tokens that some tokenizers do not mark as special although they are (llama.cpp's converter has the same list)
LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
KNOWN_STEPS = ("Prepend", "Replace", "Metaspace", "Split")
MAX_TOKENS = 8_000_000  # the largest vocabularies have 0.3 million
AGAIN = "download the file again"


@dataclass
class Vocabulary:
    """tokens: text of each number, None where there is none.  scores: of SentencePiece only."""

    model: str
    pre: str
    tokens: list[str | None]
    types: list[int]
    scores: list[float] | None = None
    flags: dict[str, bool] = field(default_factory=dict)


def add(keys: GGUFWriter, directory: Path, config: Mapping[str, Any], rows: int, source: Path | None) -> None:
    """Put the vocabulary, padded to `rows` tokens, its special tokens and the chat template among the keys.

    source: a GGUF file whose vocabulary is kept as it is. Raises PlanError, CheckpointError.
    """
    if source is not None and _copy(keys, source, rows):
        return
    path = directory / "tokenizer.json"
    if path.is_file():
        tokenizer = read_json(path)
        with Explained(path, "is no usable tokenizer", AGAIN):
            vocabulary = _from_json(path, tokenizer)
            special = gguf.SpecialVocab(directory, load_merges=vocabulary.scores is None, n_vocab=rows)
            special.add_special_token = _added_ends(path, special)
    elif (directory / "tokenizer.model").is_file():
        vocabulary = _from_sentencepiece(directory)
        special = gguf.SpecialVocab(directory, n_vocab=rows)
        special.add_special_token = {"bos": True, "eos": False, **_said(special)}
    else:
        raise PlanError(f"{directory}: there is no tokenizer.json or tokenizer.model, and a GGUF file holds the "
                        "tokenizer too; copy the tokenizer of the model there")
    _put(keys, vocabulary, rows, str(path))
    special.add_to_gguf(keys, quiet=True)
    templates = keys.kv_data[0].get(gguf.Keys.Tokenizer.CHAT_TEMPLATES)
    if templates is not None:
        templates.value = sorted(templates.value)  # a set until now: its order would change from run to run


def _from_json(path: Path, tokenizer: Mapping[str, Any]) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("merges"):
        raise PlanError(f"{path}: is a {model.get('type')} tokenizer; of these llama.cpp reads BPE only; export the "
                        "model to another format")
    added = tokenizer.get("added_tokens", [])
    _refuse_numbers(path, [*model["vocab"].values(), *(entry["id"] for entry in added)])
    tokens: list[str | None] = [None] * (1 + max(model["vocab"].values()))
    for text, number in model["vocab"].items():
        tokens[number] = text
    types = [int(TokenType.UNUSED if text is None else TokenType.NORMAL) for text in tokens]
    if model.get("byte_fallback"):
        made = _sentencepiece(path, tokenizer, tokens, types)
    else:
        made = Vocabulary("gpt2", gguf_pre.rule(path, tokenizer), tokens, types)
    _apply_added(made, {entry["id"]: entry for entry in added}, model.get("unk_token"))
    return made


def _refuse_numbers(path: Path, numbers: list[Any]) -> None:
    """A list has a place for each number up to the largest."""
    for number in numbers:
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise CheckpointError(f"{path}: a token has the number {printable(repr(number), 60)}; {AGAIN}")


def _sentencepiece(path: Path, tokenizer: Mapping[str, Any], tokens: list[str | None], types: list[int]) -> Vocabulary:
    """A SentencePiece vocabulary that was turned into merges: pieces score by the rank of the merge that makes them."""
    steps = [step.get("type") for node in (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")) if node
             for step in node.get("normalizers", node.get("pretokenizers", [node]))]
    if any(step not in KNOWN_STEPS for step in steps):
        raise PlanError(f"{path}: normalises text by {', '.join(map(str, steps))}, which llama.cpp's SentencePiece "
                        "tokenizer does not; export the model to another format")
    number = {text: index for index, text in enumerate(tokens)}
    merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"])
    order = dict.fromkeys(number["".join(merge)] for merge in merges)
    for index, text in enumerate(tokens):
        if text is not None and BYTE.fullmatch(text):
            types[index] = int(TokenType.BYTE)
        elif text is not None:
            order.setdefault(index)  # single characters come last
    scores = [0.0] * len(tokens)
    for rank, index in enumerate(order):
        scores[index] = -float(rank)
    return Vocabulary("llama", "default", tokens, types, scores, {"add_space_prefix": _adds_space(tokenizer)})


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    node = tokenizer.get("normalizer") or {}
    if any(step.get("type") == "Prepend" for step in node.get("normalizers", [node])):
        return True
    node = tokenizer.get("pre_tokenizer") or {}
    return any(step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
               for step in node.get("pretokenizers", [node]))


def _from_sentencepiece(directory: Path) -> Vocabulary:
    """tokenizer.model, read by the package sentencepiece."""
    path = directory / "tokenizer.model"
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise PlanError(f"{path}: to read it, pip install sentencepiece; or put the tokenizer.json of the model beside "
                        "it") from None
    with Explained(path, "is no usable tokenizer", AGAIN):
        entries = [(text.decode(), score, int(kind)) for text, score, kind in
                   gguf.SentencePieceVocab(directory).all_tokens()]
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    made = Vocabulary("llama", "default", [text for text, _, _ in entries], [kind for _, _, kind in entries],
                      [score for _, score, _ in entries],
                      {"add_space_prefix": bool(settings.get("add_prefix_space", True))})
    added = {int(key): entry for key, entry in settings.get("added_tokens_decoder", {}).items()}
    _refuse_numbers(directory / "tokenizer_config.json", list(added))
    _apply_added(made, added, None)
    return made


def _apply_added(made: Vocabulary, added: Mapping[int, Mapping[str, Any]], unknown: str | None) -> None:
    """Tokens beside the vocabulary: control tokens and texts that are never split."""
    missing = max([-1, *added]) + 1 - len(made.tokens)
    made.tokens += [None] * missing
    made.types += [int(TokenType.UNUSED)] * missing
    if made.scores is not None:
        made.scores += [UNUSED_SCORE] * missing
    for number, entry in added.items():
        text = entry["content"]
        special = entry.get("special") or LOOKS_SPECIAL.fullmatch(text)
        made.tokens[number] = text if special else text.replace(SPACE, " ")
        made.types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        if made.scores is not None:
            made.scores[number] = ADDED_SCORE
    if made.scores is not None and unknown in made.tokens:
        made.types[made.tokens.index(unknown)] = int(TokenType.UNKNOWN)


def _put(keys: GGUFWriter, made: Vocabulary, rows: int, where: str) -> None:
    """Write the vocabulary with exactly `rows` tokens; those without a row can never be meant."""
    normal = [number for number, kind in enumerate(made.types) if kind == TokenType.NORMAL]
    if normal and normal[-1] >= rows:
        raise PlanError(f"{where}: has a token number {normal[-1]}, and the embedding of the model has {rows} rows; "
                        "the tokenizer belongs to another model")
    named = [text or f"[PAD{number}]" for number, text in enumerate(made.tokens[:rows])]
    tokens = named + [f"[PAD{number}]" for number in range(len(named), rows)]
    if len(set(tokens)) != len(tokens):
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise PlanError(f"{where}: the token {twice!r} has two numbers, which llama.cpp refuses; export the model to "
                        "another format")
    keys.add_tokenizer_model(made.model)
    keys.add_tokenizer_pre(made.pre)
    keys.add_token_list(tokens)
    keys.add_token_types(made.types[:rows] + [int(TokenType.UNUSED)] * (rows - len(named)))
    if made.scores is not None:
        keys.add_token_scores(made.scores[:rows] + [UNUSED_SCORE] * (rows - len(named)))
    for name, value in made.flags.items():
        keys.add_bool(f"tokenizer.ggml.{name}", value)


def _said(special: gguf.SpecialVocab) -> dict[str, bool]:
    return {end: special.add_special_token[end] for end in ("bos", "eos") if end in special.add_special_token}


def _added_ends(path: Path, special: gguf.SpecialVocab) -> dict[str, bool]:
    """Whether the tokenizer puts its first and last token around a text: asked of the tokenizer itself."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(path)).encode("a").ids
    ends = {"bos": ids[:1], "eos": ids[-1:]}
    return {end: found == [special.special_token_ids.get(end)] for end, found in ends.items()}


def _copy(keys: GGUFWriter, source: Path, rows: int) -> bool:
    """The tokenizer of another GGUF file; False where it has none, or not one token for each row."""
    metadata = read_gguf_header(source).metadata
    if len(metadata.get(gguf.Keys.Tokenizer.LIST, ())) != rows:
        return False
    kinds: dict[type, Any] = {bool: keys.add_bool, int: keys.add_uint32, float: keys.add_float32,
                              str: keys.add_string, list: keys.add_array}
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            kinds[type(value)](key, value)
    return True
