"""The vocabulary in a GGUF file: tokens, types, scores, the rule that splits words, special tokens, templates."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from qtool.checkpoint import gguf_pre, gguf_tokenizer
from qtool.errors import CheckpointError, PlanError
from tests import tiny

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
# The regular expressions as the tokenizer.json files of these models have them
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4O = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(expression: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), behavior, invert), BYTES])


def saved(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """Tokenizer files in a folder with an empty config.json."""
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def changed(folder: Path, change: Any) -> Path:
    """The folder with an edited tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def keys_of(folder: Path, rows: int) -> dict[str, Any]:
    writer = GGUFWriter(None, "llama")
    gguf_tokenizer.add(writer, folder, {}, rows, None)
    return {key.removeprefix("tokenizer."): value.value for key, value in writer.kv_data[0].items()}


def byte_level(path: Path, pre: Any, ignore_merges: bool) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.save(str(path))
    return json.loads(path.read_text())


@pytest.mark.parametrize(("pre", "ignore_merges", "expected"), [
    (WORDS, False, "gpt-2"), (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), WORDS]), False, "smollm"),
    (split(LLAMA3), True, "llama-bpe"), (split(LLAMA3, "removed", True), False, "smaug-bpe"),
    (split(QWEN2), False, "qwen2"), (split(TEKKEN), True, "tekken"), (split(GPT4O), False, "gpt-4o")])
def test_rules_are_recognised_by_their_structure(tmp_path: Path, pre: Any, ignore_merges: bool, expected: str) -> None:
    assert gguf_pre.rule(tmp_path / "t", byte_level(tmp_path / "t", pre, ignore_merges)) == expected


@pytest.mark.parametrize(("pre", "ignore_merges", "text"), [
    (pre_tokenizers.Whitespace(), False, "text into words .Whitespace. is none that llama.cpp"),
    (split(QWEN2), True, "Split, ByteLevel"), (split(QWEN2, "removed"), False, "Split, ByteLevel"),
    (split(r"\d+"), False, "none that llama.cpp is known to have.*newer llama.cpp"),
    (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), WORDS]), False, "Digits, ByteLevel"),
    (pre_tokenizers.ByteLevel(add_prefix_space=True), False, "ByteLevel")])
def test_rules_that_llama_cpp_lacks_are_refused(tmp_path: Path, pre: Any, ignore_merges: bool, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        gguf_pre.rule(tmp_path / "t", byte_level(tmp_path / "t", pre, ignore_merges))


def test_a_known_hash_decides_before_the_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(tmp_path / "t", WORDS, False)
    monkeypatch.setitem(gguf_pre.HASHES, gguf_pre.fingerprint(tmp_path / "t"), "deepseek-llm")
    assert gguf_pre.rule(tmp_path / "t", tokenizer) == "deepseek-llm"


def test_byte_level_vocabulary(tmp_path: Path) -> None:
    """Types, padding, special tokens, merges, ends and template."""
    from tokenizers import AddedToken

    tokenizer = tiny.tokenizer(bos=True)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|odd|>", normalized=False)])
    plain = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    folder = saved(tmp_path / "t", tokenizer, chat_template="{{ 1 }}")
    keys = keys_of(folder, 600)
    count = len(tokenizer)
    assert len(keys["ggml.tokens"]) == len(keys["ggml.token_type"]) == 600
    assert keys["ggml.model"] == "gpt2" and keys["ggml.pre"] == "gpt-2"
    assert all(keys["ggml.tokens"][number] == text for text, number in plain["vocab"].items())
    assert keys["ggml.tokens"][count:] == [f"[PAD{number}]" for number in range(count, 600)]
    kinds = dict(zip(keys["ggml.tokens"], keys["ggml.token_type"], strict=True))
    assert [kinds[token] for token in ("<s>", "</s>", "<tool>", "<|odd|>", "a", "[PAD599]")] == [
        TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.NORMAL,
        TokenType.UNUSED]
    assert keys["ggml.merges"] == [" ".join(merge) for merge in plain["merges"]]
    assert (keys["ggml.bos_token_id"], keys["ggml.eos_token_id"]) == (0, 1)
    assert (keys["ggml.add_bos_token"], keys["ggml.add_eos_token"]) == (True, False)
    assert keys["chat_template"] == "{{ 1 }}" and "ggml.scores" not in keys
    assert keys_of(saved(tmp_path / "u", tiny.tokenizer()), 600)["ggml.add_bos_token"] is False


def test_several_templates_come_in_one_order(tmp_path: Path) -> None:
    templates = [{"name": name, "template": f"{{{{ '{name}' }}}}"} for name in ("default", "tool_use", "rag", "a", "b")]
    keys = keys_of(saved(tmp_path / "t", tiny.tokenizer(), chat_template=templates), 512)
    assert keys["chat_templates"] == ["a", "b", "rag", "tool_use"] and keys["chat_template"] == "{{ 'default' }}"
    assert keys["chat_template.rag"] == "{{ 'rag' }}"


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_vocabulary(tmp_path: Path, space: bool) -> None:
    tokenizer = tiny.sentencepiece(space)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    keys = keys_of(saved(tmp_path / "t", tokenizer), 512)
    assert (keys["ggml.model"], keys["ggml.pre"], keys["ggml.add_space_prefix"]) == ("llama", "default", space)
    assert "ggml.merges" not in keys and keys["ggml.add_bos_token"] is True
    kinds = dict(zip(keys["ggml.tokens"], keys["ggml.token_type"], strict=True))
    assert [kinds[token] for token in ("<unk>", "<s>", "<0x0A>", "<|turn|>", "<think>", "▁a", "[PAD511]")] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE, TokenType.CONTROL, TokenType.USER_DEFINED,
        TokenType.NORMAL, TokenType.UNUSED]
    scores = dict(zip(keys["ggml.tokens"], keys["ggml.scores"], strict=True))
    ranked = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    assert [scores[piece] for piece in ranked] == [-float(rank) for rank in range(len(ranked))]
    assert scores["a"] < scores[ranked[-1]] and scores["<think>"] == -1000 and scores["[PAD511]"] == -10000


def test_tokens_without_a_row_are_left_out_or_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folder = saved(tmp_path / "t", tokenizer)
    keys = keys_of(folder, size)
    assert "<pad>" not in keys["ggml.tokens"] and "ggml.padding_token_id" not in keys
    with pytest.raises(PlanError, match=f"has a token number {size - 1}, and the embedding of the model has 300 rows"):
        keys_of(folder, 300)


def test_tokenizers_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(PlanError, match="there is no tokenizer.json or tokenizer.model.*copy the tokenizer"):
        keys_of(empty, 512)
    folder = saved(tmp_path / "t", tiny.tokenizer())
    with pytest.raises(PlanError, match="is a Unigram tokenizer"):
        keys_of(changed(folder, lambda content: content["model"].update(type="Unigram")), 512)
    folder = saved(tmp_path / "s", tiny.sentencepiece())
    with pytest.raises(PlanError, match="normalises text by NFKC"):
        keys_of(changed(folder, lambda content: content.update(normalizer={"type": "NFKC"})), 512)
    folder = saved(tmp_path / "d", tiny.sentencepiece())
    with pytest.raises(PlanError, match="the token 'a' has two numbers"):
        keys_of(changed(folder, lambda content: content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 500, "content": "a", "special": False})), 512)
    folder = saved(tmp_path / "b", tiny.tokenizer())
    with pytest.raises(CheckpointError, match="tokenizer.json: a token has the number .b.; download"):
        keys_of(changed(folder, lambda content: content["model"].update(vocab={"a": "b"})), 512)
    (empty / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(PlanError, match="pip install sentencepiece; or put the tokenizer.json"):
        keys_of(empty, 512)


def test_a_tokenizer_model_is_read_by_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package finds, with the added tokens of tokenizer_config.json on top."""
    pieces = [(b"<unk>", 0.0, TokenType.UNKNOWN), (b"<s>", 0.0, TokenType.CONTROL), (b"\xe2\x96\x81a", -1.5, 1),
              (b"b", -2.5, TokenType.NORMAL)]
    monkeypatch.setitem(sys.modules, "sentencepiece", types.ModuleType("sentencepiece"))
    monkeypatch.setattr(gguf, "SentencePieceVocab", lambda folder: types.SimpleNamespace(all_tokens=lambda: pieces))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "config.json").write_text('{"bos_token_id": 1}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "add_prefix_space": False, "added_tokens_decoder": {"4": {"content": "<turn>", "special": True}}}))
    keys = keys_of(tmp_path, 6)
    assert keys["ggml.tokens"] == ["<unk>", "<s>", "▁a", "b", "<turn>", "[PAD5]"]
    assert keys["ggml.scores"] == [0.0, 0.0, -1.5, -2.5, -1000.0, -10000.0]
    assert keys["ggml.token_type"] == [2, 3, 1, 1, 3, 5]
    assert keys["ggml.add_space_prefix"] is False and keys["ggml.bos_token_id"] == 1


@pytest.mark.parametrize("number", [1 << 40, -1, 2.5, "3", None, True])
@pytest.mark.parametrize("added", [True, False])
def test_numbers_of_tokens_that_no_list_has(tmp_path: Path, number: object, added: bool) -> None:
    """A list as long as the largest number said was made."""
    token = {"id": number, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2 if added else number}, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [token] if added else [],
                                                         "model": model}))
    with pytest.raises(CheckpointError, match="tokenizer.json: a token has the number"):
        gguf_tokenizer.add(GGUFWriter(None, "llama"), tmp_path, {}, 512, None)
