"""Where calibration tokens come from, that they are always the same, and what bad text gets."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool.errors import CalibrationError
from qtool.models import builtin_text, calibration, tokenizer
from qtool.recipe import Calibration
from tests import tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a tokenizer that adds nothing by itself."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bos")
    tiny.tokenizer(bos=True).save_pretrained(folder)
    return folder


def load(source, folder, samples=4, length=32, vocabulary=tiny.VOCABULARY):
    return calibration.load_tokens(Calibration(source=str(source), sequence_length=length), folder, samples, vocabulary)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_file_is_cut_in_order(plain, tmp_path):
    line = "Line {} of a text,\n\n with   odd   spaces and {} things.\n"
    text = "".join(line.format(number, number * 37) for number in range(900))
    (tmp_path / "corpus.txt").write_text(text)
    found = load(tmp_path / "corpus.txt", plain, 40, 64)
    expected = tokenizer.load(plain)(text, add_special_tokens=False).input_ids[:40 * 64]
    assert found.ids.dtype == torch.int64 and found.ids.tolist() == torch.tensor(expected).view(40, 64).tolist()
    assert found.sha256 == hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
    assert found.description == {"source": "corpus.txt", "samples": 40, "sequence_length": 64, "begins_with_bos": False}


def test_every_window_begins_with_bos_where_the_tokenizer_asks_for_it(plain, with_bos, tmp_path):
    (tmp_path / "corpus.txt").write_text("some words and some more words\n" * 200)
    found = load(tmp_path / "corpus.txt", with_bos)
    without = load(tmp_path / "corpus.txt", plain, 4, 31)
    assert (found.ids[:, 0] == 0).all() and torch.equal(found.ids[:, 1:], without.ids)
    assert found.description["begins_with_bos"]


def test_builtin_text_is_fixed_and_its_halves_are_apart(plain):
    first, again = load("builtin", plain, 8, 64), load("builtin", plain, 8, 64)
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
    assert torch.equal(load("builtin:calibration", plain, 8, 64).ids, first.ids)
    assert load("builtin:evaluation", plain, 8, 64).sha256 != first.sha256
    halves = ["".join(builtin_text.pieces(part)) for part in builtin_text.PARTS]
    assert all(len(half) > 1_500_000 for half in halves)  # 512 samples of 512 tokens of a usual tokenizer
    paragraphs = [{part for part in half.split("\n\n") if len(part) > 300} for half in halves]
    assert len(paragraphs[0] & paragraphs[1]) < 0.03 * len(paragraphs[0])


def test_a_prefix_of_the_builtin_text_holds_prose_and_code():
    pieces = builtin_text.pieces("calibration")
    prose, code = next(pieces), next(pieces)
    assert "statement" in prose and "import " in code and len(prose + code) < 20_000


def test_jsonl_fields(plain, tmp_path):
    records = [{"text": f"document {n} " * 20, "other": "x y z " * 40} for n in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    first, other = load(path, plain), load(f"{path}:other", plain)
    joined = "".join(f"document {n} " * 20 + "\n\n" for n in range(20))
    assert first.ids.flatten().tolist() == tokenizer.load(plain)(joined).input_ids[:128]
    assert other.sha256 != first.sha256 and other.description["source"] == "a.jsonl:other"


def test_messages_go_through_the_chat_template(tmp_path):
    model = tiny.tokenizer()
    model.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    model.save_pretrained(tmp_path)
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hello " * 200}]}] * 3)
    found = load(path, tmp_path)
    assert tokenizer.load(tmp_path).decode(found.ids[0]).startswith("[user] hello hello")


def test_parquet(plain, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {number} " * 20 for number in range(20)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    same = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert load(tmp_path / "a.parquet", plain).sha256 == load(same, plain).sha256
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(CalibrationError, match="bad.parquet is no readable Parquet file"):
        load(tmp_path / "bad.parquet", plain)


@pytest.mark.parametrize(("source", "content", "message"), [
    ("short.txt", b"a few words", r"gives \d+ tokens, but 4 samples of 32 need 128; use more text or a smaller"),
    ("empty.txt", b"", r"gives 0 tokens, but 4 samples of 32 need 128"),
    ("zero.txt", b"text\0text", "zero.txt holds binary data"),
    ("bytes.txt", b"\xff\xfe\x00\x80", "bytes.txt is no UTF-8 text"),
    ("absent.txt", None, "absent.txt does not exist"),
    ("bad.jsonl", b'{"text": "x"}\n{"text": \n', "bad.jsonl: line 2 is no JSON"),
    ("list.jsonl", b"[1]\n", "record 1 is no object"),
    ("field.jsonl", b'{"body": "x"}\n', "no field 'text'; its fields: body; name one as field.jsonl:FIELD"),
    ("number.jsonl", b'{"text": 3}\n', "field 'text' of record 1 is int, not text"),
    ("chat.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "chat template refuses"),
    ("a.txt:field", b"x", "no fields"),
    ("what is this?", None, "neither 'builtin', nor a .txt"),
    ("builtin:other", None, "parts calibration, evaluation"),
])
def test_bad_sources(plain, tmp_path, source, content, message):
    if content is not None:
        (tmp_path / source.partition(":")[0]).write_bytes(content)
    where = source if source.startswith(("what", "builtin")) else str(tmp_path / source)
    with pytest.raises(CalibrationError, match=message):
        load(where, plain)


def test_more_tokens_than_the_embedding_has_rows(plain, tmp_path):
    (tmp_path / "a.txt").write_text("some words and some more words\n" * 200)
    with pytest.raises(CalibrationError, match=r"gives token \d+, but the embedding has only 100 rows"):
        load(tmp_path / "a.txt", plain, vocabulary=100)


def test_missing_or_broken_tokenizer(tmp_path):
    with pytest.raises(CalibrationError, match="no tokenizer found"):
        load("builtin", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CalibrationError, match="the tokenizer cannot be loaded"):
        load("builtin", tmp_path)


def test_packages_that_are_not_installed(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for source in ("some-org/some-dataset", str(tmp_path / "a.parquet")):
        with pytest.raises(CalibrationError, match=r"pip install 'qtool\[datasets\]'"):
            load(source, plain)


def test_hub_dataset(plain, monkeypatch):
    asked = {}

    class Datasets:
        @staticmethod
        def load_dataset(name, config, split, streaming):
            asked.update(name=name, config=config, split=split, streaming=streaming)
            if name == "org/absent":
                raise ValueError("no such dataset")
            return iter([{"body": "words and words " * 20}] * 40)

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert load("org/name:en:validation:body", plain).ids.shape == (4, 32)
    assert asked == {"name": "org/name", "config": "en", "split": "validation", "streaming": True}
    with pytest.raises(CalibrationError, match="'org/absent' cannot be read: no such dataset"):
        load("org/absent", plain)
    assert asked["split"] == "train" and asked["config"] is None


MEMORY = """
import re, sys
from pathlib import Path
from qtool import heap
heap.reuse()
from qtool.models import calibration
from qtool.recipe import Calibration

def load(samples):
    spec = Calibration(source="builtin", samples=samples, sequence_length=512)
    calibration.load_tokens(spec, Path(sys.argv[1]), samples, 1 << 30)

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load(1)
before = memory("VmRSS")
load(600)
print((memory("VmRSS") - before) / (memory("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what a process holds")
def test_memory_of_splitting_the_text_is_given_back(plain):
    """Blocks are solved beside what stays of it."""
    done = subprocess.run([sys.executable, "-c", MEMORY, plain], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2
