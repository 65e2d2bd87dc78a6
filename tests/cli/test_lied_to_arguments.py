"""Paths, recipes, texts and outputs that are not what they should be: one line, status 2, nothing written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_hub import Remote, httpx, remote  # noqa: F401 - the fixture
from tests.cli.conftest import Run
from tests.cli.test_lied_to import COMMANDS, refused

QUICK = "--method rtn --group-size 32"
TEXT = "--group-size 32 --samples 4 --sequence-length 32"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
# a recipe, what the message says
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "an unknown key": ("name: x\nscheme:\n  bist: 4\n", "unknown key 'scheme.bist' (line 3); did you mean 'bits'?"),
    "an unknown key of a rule": ("scheme: {bits: 4}\nrules:\n- {match: '*', bits: 4}\n- match: a\n  skipp: 1\n",
                                 "unknown key 'rules.1.skipp' (line 5); did you mean 'skip'?"),
    "a bomb": (BOMB, "aliases (*name) are not allowed, line 2"),
    "a tag": ("steps: [rtn]\nname: !!python/object/apply:os.system ['touch run']\n", "tags (tag:yaml.org,2002:python"),
    "a tag for the root": ("!!set {a, b}\n", "tags (tag:yaml.org,2002:set) are not allowed, line 1"),
    "a mapping as a key": ("? [a]\n: b\n", "a key is a word, not a list or a mapping, line 1"),
    "a key twice": ("name: a\nname: b\n", "key 'name' is given twice, line 2"),
    "a date that is none": ("name: x\nseed: 2001-99-99\n", "seed (line 2): Input should be a valid integer"),
    "base 60": ("seed: 1" + ":59" * 1000, "seed (line 1): Input should be a valid integer"),
    "depth": ("[" * 3000, "r.yaml: not valid YAML"),
    "size": ("#" * (1 << 18), "r.yaml cannot be read: it is larger than 128 KiB; give a YAML file"),
    "no text": (b"\xff\xfe\x00", "r.yaml cannot be read: it is no UTF-8 text"),
    "escapes": ('"\\e[31mred": 1\n', "unknown key '?[31mred' (line 1)"),
    "1 bit": ("scheme: {bits: 1}", "scheme.bits (line 1): Input should be greater than or equal to 2 (given: 1)"),
    "9 bits": ("scheme:\n  bits: 9", "scheme.bits (line 2): Input should be less than or equal to 8 (given: 9)"),
    "a size of 400 digits": ("budget: {size: " + "9" * 400 + "GB}", "a size has at most 20 digits"),
    "a million complaints": ("\n".join(f"k{index}: 1" for index in range(99)), "; and 91 more"),
    "a group that does not divide": ("steps: [rtn]\nscheme: {group_size: 48}", "group size 48 does not divide the 64"),
    "a rule that matches nothing": ("steps: [rtn]\nscheme: {group_size: 32}\nrules: [{match: '*.nope', bits: 8}]",
                                    "rule '*.nope' decides nothing: it matches no linear"),
    "a rule behind another": (
        "steps: [rtn]\nscheme: {group_size: 32}\nrules: [{match: '*.mlp.*', bits: 8}, {match: '*.up_proj', bits: 3}]",
        "rule '*.up_proj' decides nothing: it matches no linear, or earlier rules match all that it does"),
    "a grid that the format cannot hold": ("steps: [rtn]\nscheme: {grid: nf4, group_size: 64}\nformat: gptq",
                                           "gptq holds integers, not the nf4 grid"),
    "a budget over automatic groups": (
        "steps: [rtn]\nbudget: {bits: 5, schemes: [{bits: 4, group_size: auto}, {bits: 8, group_size: 32}]}",
        "budget: group_size auto has no size to count with"),
}
# a calibration text: name, content, what the message says
TEXTS: dict[str, tuple[str, str | bytes, str]] = {
    "short": ("t.txt", "hello there", "tokens, but 4 samples of 32 need 128; use more text or a smaller"),
    "empty": ("t.txt", "", "'t.txt' gives 0 tokens, but 4 samples"),
    "NUL": ("t.txt", b"abc\0def" * 99, "t.txt holds binary data, not text; give UTF-8 text"),
    "not UTF-8": ("t.txt", b"\xff\xfe" * 99, "t.txt is no UTF-8 text"),
    "no JSON": ("t.jsonl", '{"text": "a"}\n{"text": \n', "t.jsonl: line 2 is no JSON"),
    "a number of 5000 digits": ("t.jsonl", '{"text": ' + "9" * 5000 + "}", "t.jsonl: line 1 is no JSON"),
    "deep JSON": ("t.jsonl", "[" * 100_000, "t.jsonl: line 1 is no JSON"),
    "no object": ("t.jsonl", "[1]\n", "t.jsonl: record 1 is no object with fields"),
    "no such field": ("t.jsonl", '{"body": "a"}\n', "t.jsonl: record 1 has no field 'text'; its fields: body"),
    "half a character": ("t.jsonl", '{"text": "a \\ud800 b"}\n' * 99, "t.jsonl: record 1 "),
}


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, run: Run, place: Path) -> None:
    content, message = RECIPES[name]
    Path("r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(run, "quantize MODEL --recipe r.yaml --out out", message, place)


@pytest.mark.parametrize(("make", "message"), [
    (os.mkfifo, "r.yaml cannot be read: it is no regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "r.yaml cannot be read: it is no regular file"),
    (os.mkdir, "r.yaml cannot be read: Is a directory"),
])
def test_recipes_that_are_no_files(make: Callable[[Path], Any], message: str, run: Run, place: Path) -> None:
    make(Path("r.yaml"))
    refused(run, "quantize MODEL --recipe r.yaml --out out", message, place)


@pytest.mark.parametrize("name", TEXTS)
def test_calibration(name: str, run: Run, place: Path) -> None:
    file, content, message = TEXTS[name]
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(run, f"quantize MODEL {TEXT} --calibration {file} --out out", message, place)


@pytest.mark.parametrize(("make", "name"), [(os.mkfifo, "t.txt"), (os.mkdir, "t.txt"), (os.mkdir, "t.jsonl")])
def test_calibration_that_is_no_file(make: Callable[[Path], Any], name: str, run: Run, place: Path) -> None:
    make(Path(name))
    refused(run, f"quantize MODEL {TEXT} --calibration {name} --out out", f"{name} is no regular file", place)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("path", "message"), [
    ("absent", "absent: no such file or folder, and not a Hub id"),
    ("~nobody-here/x", "~nobody-here/x: no such file or folder"),
    ("a" * 5000, "too long to be a path or a Hub id"),
    ("nowhere", "nowhere: is a link that leads nowhere"), ("circle", "circle: is a link that leads nowhere"),
    ("pipe", "pipe: is neither a file nor a folder"), ("/dev/zero", "/dev/zero: is neither a file nor a folder"),
    ("weights.pt", "weights.pt: holds pickled weights, and unpickling can run any code"),
    ("pytorch_model.bin", "holds pickled weights"), ("weights.pkl", "holds pickled weights"),
    ("bad.gguf", "bad.gguf: begins with b'nope', not with GGUF"),
])
def test_paths(path: str, message: str, command: str, run: Run, place: Path) -> None:
    Path("nowhere").symlink_to("gone")
    Path("circle").symlink_to("circle")
    os.mkfifo("pipe")
    Path("bad.gguf").write_bytes(b"nope")
    for name in ("weights.pt", "weights.pkl", "pytorch_model.bin"):
        Path(name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch run'\ntR.")
    refused(run, COMMANDS[command].replace("MODEL", path), message, place)


@pytest.mark.parametrize(("path", "message"), [
    ("~nobody-here/x", "~nobody-here/x: no such file or folder"), ("absent", "absent: no such file or folder"),
    ("a" * 5000, "too long to be a path or a Hub id")])
def test_paths_to_verify(path: str, message: str, run: Run, place: Path) -> None:
    refused(run, f"inspect {path} --verify", message, place)


def partial(place: Path) -> None:
    (place / "out.partial").mkdir()
    (place / "out.partial" / "precious.txt").write_text("mine")


@pytest.mark.parametrize(("make", "out", "message"), [
    (lambda place: (place / "out").mkdir() or (place / "out" / "x").touch(), "out", "out exists and is not empty"),
    (lambda place: (place / "out").touch(), "out", "out exists and is not a directory"),
    (lambda place: os.mkfifo(place / "out"), "out", "out exists and is not a directory"),
    (lambda place: (place / "out").symlink_to("gone"), "out", "out exists and is not a directory"),
    (lambda place: None, "model", "is what is read; choose another --out"),
    (lambda place: None, "model/out", "lies in it, and that is what is read"),
    (lambda place: (place / "link").symlink_to("model"), "link/out", "lies in it, and that is what is read"),
    (lambda place: None, "/proc/out", "0 B are free; choose an --out on another disk"),
    (lambda place: None, "model/config.json/out", "choose another --out"),
    (partial, "out", "out.partial holds precious.txt and no journal, so it is no unfinished run of qtool"),
    (partial, "out --restart", "out.partial holds precious.txt and no journal, so it is no unfinished run of qtool"),
])
def test_outputs(make: Callable[[Path], Any], out: str, message: str, run: Run, place: Path) -> None:
    make(place)
    before = {path: path.lstat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    status, printed, err = run(*f"quantize {place}/model {QUICK} --out {out}".split())
    assert (status, printed) == (2, "") and message in err, err
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    assert {path for path in place.rglob("*") if path.is_file()} - {place / "out.partial" / "lock"} == {*before}


def test_a_source_with_the_name_of_an_unfinished_run_is_not_emptied(run: Run, place: Path) -> None:
    (place / "model").rename(place / "small.partial")
    status, _, err = run(*f"quantize {place}/small.partial {QUICK} --out small".split())
    assert status == 2 and "and that is what is read" in err
    assert (place / "small.partial" / "model.safetensors").exists()


@pytest.mark.parametrize(("to", "out"), [("hf", "quantized/x"), ("gguf", "quantized/x.gguf"), ("onnx", "quantized/x")])
def test_exports_into_their_source(to: str, out: str, run: Run, place: Path, gptq: Path) -> None:
    shutil.copytree(gptq, place / "quantized")
    status, _, err = run("export", "quantized", "--to", to, "--out", out)
    assert status == 2 and "and that is what is read" in err and not Path(out).exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("failure", "message"), [
    (httpx.ConnectError("no route"), "the Hub cannot be reached (no route), and the cache does not hold"),
    ((403, "GatedRepo"), "org/name: this model is gated; accept its conditions at https://huggingface.co/org/name"),
    ((404, "RepoNotFound"), "org/name: no such folder here, and no such repository on the Hub"),
    ((500, "x"), "org/name: the Hub refused: "), (None, "only holds pickled weights (pytorch_model.bin)"),
])
def test_the_hub(failure: Any, message: str, command: str, run: Run, place: Path, remote: Remote) -> None:  # noqa: F811
    if failure is not None:
        remote.failures["/api/models/org/name"] = failure
    for path in remote.folder.glob("*.safetensors*"):
        path.unlink()
    (place / "cache").mkdir()
    refused(run, COMMANDS[command].replace("MODEL", "org/name"), message, place)
