"""Checkpoints that are not what they should be: each command says so in one line, names the file, writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
COMMANDS = {
    "quantize": "quantize MODEL --method rtn --group-size 32 --out out --quiet",
    "inspect": "inspect MODEL",
    "eval": "eval MODEL --windows 1 --context 16",
    "export": "export MODEL --to gguf --out out.gguf --quiet",
}
OPENING = tuple(COMMANDS)  # what is found by every command, when it opens the checkpoint
RUNNING = ("quantize", "eval", "export")  # what is found when the model is built
Damage = Callable[[Path], None]


def written(name: str, content: bytes | str) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model / name).write_bytes(data) and None


def removed(*names: str) -> Damage:
    return lambda model: [(model / name).unlink() for name in names] and None


def config(**changes: Any) -> Damage:
    """None removes a key."""
    def damage(model: Path) -> None:
        values = {**json.loads((model / "config.json").read_text()), **changes}
        kept = {key: value for key, value in values.items() if value is not None}
        (model / "config.json").write_text(json.dumps(kept))
    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(model: Path) -> None:
        held = load_file(model / WEIGHTS)
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, model / WEIGHTS, {"format": "pt"})
    return damage


def header(change: Callable[[dict[str, Any]], Any], raw: Callable[[bytes], bytes] = bytes) -> Damage:
    """Edit the JSON of the safetensors header, its data staying as they are."""
    def damage(model: Path) -> None:
        content = (model / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        told = json.loads(content[8:8 + size])
        change(told)
        text = raw(json.dumps(told).encode())
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size:])
    return damage


def norm(**changes: Any) -> Damage:
    return header(lambda told: told["model.norm.weight"].update(changes))


def shards(change: Damage | None = None, **places: str) -> Damage:
    """Two shards with an index, then `change`; places: tensors (_ for a dot) that the index places elsewhere."""
    def damage(model: Path) -> None:
        held = load_file(model / WEIGHTS)
        names, half = sorted(held), len(held) // 2
        save_file({name: held[name] for name in names[:half]}, model / FIRST)
        save_file({name: held[name] for name in names[half:]}, model / SECOND)
        (model / WEIGHTS).unlink()
        told = {name: FIRST if place < half else SECOND for place, name in enumerate(names)}
        told |= {key.replace("__", "."): value for key, value in places.items()}
        (model / INDEX).write_text(json.dumps({"weight_map": told}))
        if change is not None:
            change(model)
    return damage


def linked(name: str, target: str) -> Damage:
    """Move a file out of the directory and leave a link to it; target: other than the file itself."""
    def damage(model: Path) -> None:
        outside = model.parent / "outside"
        outside.mkdir()
        if (model / name).exists():
            shutil.move(model / name, outside / name)
        (model / name).symlink_to(target.replace("OUTSIDE", str(outside)))
    return damage


def pipe(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
    return damage


def device(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("/dev/zero")
    return damage


def in_turn(*damages: Damage) -> Damage:
    return lambda model: [damage(model) for damage in damages] and None


def cut(name: str, count: int) -> Damage:
    return lambda model: os.truncate(model / name, (model / name).stat().st_size - count)


def poisoned(name: str, value: float) -> Damage:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[name].view(-1)[3] = value
    return tensors(change)


def grown(model: Path) -> None:
    """A tokenizer of another model, with more tokens than the embedding has rows."""
    told = json.loads((model / "tokenizer.json").read_text())
    told["model"]["vocab"] |= {f"more{index}": 480 + index for index in range(200)}
    (model / "tokenizer.json").write_text(json.dumps(told))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
# what was done, how, what the message says, which commands notice
CASES: list[tuple[str, Damage, str, tuple[str, ...]]] = [
    ("no config", removed("config.json"), "model: there is no config.json; give the folder", OPENING),
    ("no weights", removed(WEIGHTS), "model: holds no .safetensors file", OPENING),
    ("empty shard", written(WEIGHTS, b""), f"{WEIGHTS}: the file is empty; download", OPENING),
    ("truncated shard", cut(WEIGHTS, 7), f"{WEIGHTS}: truncated: tensor '", OPENING),
    ("truncated in the header", lambda model: os.truncate(model / WEIGHTS, 300),
     "truncated inside its header", OPENING),
    ("missing shard", shards(removed(SECOND)), f"1 of 2 weight files in {INDEX} are missing: {SECOND}", OPENING),
    ("missing shard, no index", shards(removed(SECOND, INDEX)), f"1 of 2 weight files are missing: {SECOND}", OPENING),
    ("duplicate shard", shards(lambda model: shutil.copy(model / FIRST, model / SECOND) and None),
     f"is in two files, {FIRST} and {SECOND}; remove", OPENING),
    ("extra shard", shards(lambda model: shutil.copy(model / FIRST, model / "model-old.safetensors") and None),
     f"model-old.safetensors holds tensors, but {INDEX} does not list it; remove", OPENING),
    ("index points outside", shards(model__norm__weight="../x.safetensors"),
     f"{INDEX}: tensor '{NORM}' lies in '../x.safetensors', which is not", OPENING),
    ("index to a link that leads outside", shards(linked(SECOND, f"OUTSIDE/{SECOND}")),
     f"{SECOND}: is a link that leads out of this directory, to", OPENING),
    ("weights a link to the outside", linked(WEIGHTS, f"OUTSIDE/{WEIGHTS}"), "is a link that leads out of", OPENING),
    ("tokenizer a link to the outside", linked("tokenizer.json", "/etc/passwd"), "tokenizer.json: is a link", OPENING),
    ("config a link to the outside", linked("config.json", "OUTSIDE/config.json"), "config.json: is a link", OPENING),
    ("config a loop of links", lambda model: in_turn(removed("config.json"), linked("config.json",
     "config.json"))(model),
     "there is no config.json", OPENING),
    ("index to a tensor that is not there", shards(ghost=FIRST),
     f"{INDEX}: tensor 'ghost' should be in {FIRST}", OPENING),
    ("index without a map", shards(written(INDEX, '{"weight_map": [1]}')), f"{INDEX}: has no weight_map", OPENING),
    ("header beyond the file", written(WEIGHTS, struct.pack("<Q", 1 << 20) + b"{}"), "truncated inside its", OPENING),
    ("header of 2^63 bytes", written(WEIGHTS, struct.pack("<Q", 1 << 63) + b"{}"),
     "announces a header of 92233", OPENING),
    ("overlapping offsets", header(lambda told: told[NORM].update(data_offsets=[0, 128])),
     "overlap; download", OPENING),
    ("negative offset", norm(data_offsets=[-8, 0]), f"'{NORM}' has no valid data_offsets", OPENING),
    ("unknown dtype", norm(dtype="F7"), f"'{NORM}' has the unknown dtype F7; known: BOOL", OPENING),
    ("shape overflow", norm(shape=[1 << 40, 1 << 40]), "overflows 63 bits", OPENING),
    ("deep header", header(lambda told: None, lambda text: b'{"a":' * 100_000), "header: nested too deeply", OPENING),
    ("deep config", written("config.json", "[" * 100_000), "config.json: nested too deeply", OPENING),
    ("enormous config", written("config.json", '{"a": "' + "x" * (17 << 20) + '"}'),
     "it is larger than 16,384 KiB", OPENING),
    ("key twice in the config", written("config.json", '{"a": 1, "a": 2}'), "config.json: key 'a' is given", OPENING),
    ("key twice in the header", header(lambda told: None, lambda text: text[:-1] + b',"lm_head.weight":{}}'),
     "header: key 'lm_head.weight' is given twice", OPENING),
    ("half a character", written("config.json", '{"model_type": "\\ud800"}'), "holds half of a character", OPENING),
    ("escapes in a tensor name", header(lambda told: told.update({"\x1b[31mred": told.pop(NORM)})),
     "tensor '?[31mred' has an empty name or one with control characters", OPENING),
    ("pickled weights only", lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin") and None,
     "only holds pickled weights (pytorch_model.bin), and unpickling can run any code", OPENING),
    ("Git LFS pointer", written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer", OPENING),
    ("weights a pipe", pipe(WEIGHTS), "model: holds no .safetensors file", OPENING),
    ("config a pipe", pipe("config.json"), "there is no config.json", OPENING),
    ("config a device", device("config.json"), "there is no config.json", OPENING),
    ("remote code", config(model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Model"}),
     "model type 'own' is defined by code inside the checkpoint (auto_map), which qtool never runs", RUNNING),
    ("an architecture that nobody has", config(model_type="own"), "config.json: transformers cannot read", RUNNING),
    ("no architecture", config(model_type=None), "config.json: ", RUNNING),
    ("weight of the wrong shape", tensors(lambda held: held.update({UP: held[UP][:96]})),
     f"{UP} has shape [96, 64] in the checkpoint, but config.json asks for [128, 64]", RUNNING),
    ("tensor missing", tensors(lambda held: held.pop(UP)), f"the checkpoint lacks {UP}", RUNNING),
    ("tensor too many", tensors(lambda held: held.update({"model.more": torch.ones(3)})),
     "place in the model: model.more",
     RUNNING),
    ("more layers than tensors", config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, but", RUNNING),
    ("a size that is text", config(hidden_size="many"), "config.json: ", RUNNING),
    ("a size that is endless", config(intermediate_size=10**30), "config.json", RUNNING),
    ("NaN in a weight", poisoned(UP, float("nan")), f"{UP}: 1 of 8192 values are NaN or infinite", ("quantize",
     "export")),
    ("infinity in a norm", poisoned(NORM, float("inf")), f"{NORM}: 1 of 64 values are NaN or infinite", ("quantize",
     "export")),
    ("tokenizer too large", grown, "the tokenizer has 592 tokens, but the embedding only 512 rows", ("quantize",
     "eval")),
    ("no tokenizer", removed("tokenizer.json", "tokenizer_config.json"),
     "no tokenizer found (tokenizer.json", ("eval",)),
    ("tokenizer damaged", written("tokenizer.json", '{"model": {"type": "BPE", "vocab": 5}}'),
     "the tokenizer cannot be loaded: ", ("eval",)),
]


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the model to be damaged."""
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(run: Run, line: str, message: str, place: Path) -> str:
    """One message, status 2, no traceback, nothing new in the folder."""
    before = sorted(path.name for path in place.iterdir())
    status, out, err = run(*line.replace("MODEL", str(place / "model")).split())
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert message in err, err
    assert len(err) < 1500 and err[:-1].isprintable()
    assert [name for name in sorted(path.name for path in place.iterdir()) if name not in before] in (
        [], ["out.partial"], ["out.gguf.partial"])  # where weights are read, work has begun; no output ever
    return err


@pytest.mark.parametrize(("damage", "message", "command"), [
    pytest.param(damage, message, command, id=f"{name}-{command}")
    for name, damage, message, commands in CASES for command in commands])
def test_every_command_refuses_it(damage: Damage, message: str, command: str, run: Run, place: Path) -> None:
    damage(place / "model")
    refused(run, COMMANDS[command], message, place)
