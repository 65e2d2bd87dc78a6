"""Files with structure-aware damage, through every parser: an error of qtool's own that names the file, or a result.

Never another exception, a hang or much memory. The same tests with more inputs are in tests/trust/test_mutations.py.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool import inspect, journal, manifest, pipeline, recipe
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.gguf_header import read_gguf_header
from qtool.checkpoint.imatrix import read_imatrix, write_imatrix
from qtool.decode import open_model
from qtool.errors import QtoolError
from qtool.evaluate import cache
from qtool.evaluate.predictions import Exits
from qtool.models import skeleton, tokenizer
from qtool.models.streams import StreamStore
from qtool.plan import make_plan
from qtool.workspace import Workspace, state
from tests import mutations, tiny
from tests.checkpoint.gguf_maker import convert

INDEX = "model.safetensors.index.json"
DEADLINE = timedelta(seconds=20)  # of one input; a busy machine takes long for what is quick
Attempt = Callable[[Random, Path], None]  # damages something in the folder, which is its own, and reads it


def named(error: QtoolError, path: Path | str) -> None:
    """A message is one line that names the file, holds nothing that a terminal would obey, and ends."""
    message = str(error)
    assert str(path) in message, message
    assert len(message) < 4000 and message.replace("\n", "").isprintable(), message


def refused_or(path: Path | str, read: Callable[[], Any]) -> Any:
    """What `read` returns; None where it refused."""
    try:
        return read()
    except QtoolError as error:
        named(error, path)
        return None


class Samples:
    """Good files to start from, made once."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny.make(folder / "model", "llama", num_hidden_layers=2)
        self.gguf = convert(self.model, folder / "model.gguf", "llama", tokens=False)
        self.with_tokens = convert(self.model, folder / "tokens.gguf", "llama")
        checkpoint = open_checkpoint(str(self.model))
        self.specs, self.config = checkpoint.specs, checkpoint.config
        quick = recipe.override(recipe.preset("rtn"), {"scheme.group_size": 32})
        self.plan = make_plan(checkpoint, quick, folder / "out", "cpu")
        pipeline.run(checkpoint, self.plan, Silent())
        self.out = folder / "out"
        self.tokenizer = json.loads((self.model / "tokenizer.json").read_text())
        kept = self.tokenizer["model"]["merges"][:20]
        self.tokenizer["model"] |= {"merges": kept}
        held = {name: torch.zeros(2, 3) for name in ("a.weight", "b.weight", "c.bias")}
        save_file(held, folder / "three.safetensors", {"format": "pt"})
        content = (folder / "three.safetensors").read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        self.header, self.data = json.loads(content[8:8 + size]), content[8 + size:]
        self.held = held


class Silent:
    def start(self, blocks: int, done: int) -> None: ...
    def message(self, text: str) -> None: ...
    def linear(self, name: str, error: float | None) -> None: ...
    def block(self, *details: Any) -> None: ...
    def finish(self) -> None: ...


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("mutations"))


def opened(folder: Path) -> None:
    """Open a checkpoint; what opens can be read."""
    checkpoint = refused_or(folder, lambda: open_checkpoint(str(folder)))
    for name, spec in checkpoint.specs.items() if checkpoint else ():
        assert checkpoint.read(name).shape == spec.shape


def safetensors(samples: Samples, random: Random, folder: Path) -> None:
    text = mutations.document(random, samples.header)
    size = len(text) if random.randint(0, 9) else random.choice(mutations.INTEGERS)
    content = struct.pack("<Q", size % 2**64) + text + samples.data
    (folder / "model.safetensors").write_bytes(content if random.randint(0, 4) else mutations.content(random, content))
    (folder / "config.json").write_text("{}")
    opened(folder)


def index(samples: Samples, random: Random, folder: Path) -> None:
    names = {}
    for number, (name, tensor) in enumerate(samples.held.items(), 1):
        names[name] = f"model-{number:05d}-of-00003.safetensors"
        if not (folder / names[name]).exists():
            save_file({name: tensor}, folder / names[name])
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_bytes(mutations.document(random, {"metadata": {"total_size": 72}, "weight_map": names}))
    opened(folder)


def config(samples: Samples, random: Random, folder: Path) -> None:
    """The plan of a recipe that runs nothing, and of one that runs the model."""
    if not (folder / "model.safetensors").exists():
        shutil.copytree(samples.model, folder, dirs_exist_ok=True)
    (folder / "config.json").write_bytes(mutations.document(random, samples.config))
    checkpoint = refused_or(folder, lambda: open_checkpoint(str(folder)))
    if checkpoint is None:
        return
    quick = recipe.override(recipe.preset("rtn"), {"scheme.group_size": 32})
    refused_or("", lambda: make_plan(checkpoint, quick, folder / "out", "cpu"))
    source = refused_or("", lambda: open_model(str(folder)))
    if source is not None:
        refused_or("", lambda: inspect.summary(source))


def built(samples: Samples, random: Random, folder: Path) -> None:
    """config.json through transformers."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "config.json").write_bytes(mutations.document(random, samples.config))
    checkpoint = refused_or(folder, lambda: skeleton_of(folder, samples))
    assert checkpoint is None or checkpoint.blocks


def skeleton_of(folder: Path, samples: Samples) -> Any:
    from qtool.checkpoint.reader import read_config

    return skeleton.build(folder, read_config(folder), samples.specs)


def quantized(samples: Samples, random: Random, folder: Path) -> None:
    """config.json of a quantized checkpoint, whose quantization_config is believed by nobody."""
    if not (folder / "model.safetensors").exists():
        shutil.copytree(samples.out, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
    told = json.loads((samples.out / "config.json").read_text())
    told = told if random.randint(0, 1) else {"quantization_config": told["quantization_config"], "model_type": "llama"}
    (folder / "config.json").write_bytes(mutations.document(random, told))
    source = refused_or("", lambda: open_model(str(folder)))
    for name in source.schemes if source else ():
        refused_or("", partial(source.read, f"{name}.weight"))
    if source is not None:
        refused_or("", lambda: inspect.layers(source, None))


def tokens(samples: Samples, random: Random, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(mutations.document(random, samples.tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    loaded = refused_or(folder, lambda: tokenizer.load(folder))
    assert loaded is None or loaded.vocab_size >= 0


def gguf(samples: Samples, random: Random, folder: Path) -> None:
    """Fields of the header; what is read are names, types and places."""
    path = folder / "m.gguf"
    path.write_bytes(mutations.binary(random, gguf_fields()))
    header = refused_or(path, lambda: read_gguf_header(path))
    for tensor in header.tensors.values() if header else ():
        assert tensor.offset + tensor.nbytes <= path.stat().st_size


def gguf_fields() -> list[Any]:
    def text(value: bytes) -> list[Any]:
        return [("Q", len(value)), value]

    keys = [*text(b"general.architecture"), ("I", 8), *text(b"llama"), *text(b"llama.block_count"), ("I", 4), ("I", 1),
            *text(b"tokenizer.ggml.tokens"), ("I", 9), ("I", 8), ("Q", 3), *text(b"a"), *text(b"b"), *text(b"ab"),
            *text(b"tokenizer.ggml.scores"), ("I", 9), ("I", 6), ("Q", 3), bytes(12), *text(b"general.alignment"),
            ("I", 4), ("I", 32)]
    tensors = [*text(b"token_embd.weight"), ("I", 2), ("Q", 32), ("Q", 3), ("I", 0), ("Q", 0),
               *text(b"blk.0.attn_q.weight"), ("I", 2), ("Q", 32), ("Q", 2), ("I", 2), ("Q", 384)]
    used = len(mutations.packed([b"GGUF", ("I", 3), ("Q", 2), ("Q", 5), *keys, *tensors]))
    return [b"GGUF", ("I", 3), ("Q", 2), ("Q", 5), *keys, *tensors, bytes(-used % 32), bytes(384 + 36)]


def gguf_model(samples: Samples, random: Random, folder: Path, whole: bool = False) -> None:
    """A model's file, opened with all that is made of it."""
    source, path = samples.with_tokens if whole else samples.gguf, folder / "m.gguf"
    content = source.read_bytes()
    end = read_gguf_header(source).tensors["token_embd.weight"].offset
    scalars = content.find(b"tokenizer.ggml.tokens") if whole and random.randint(0, 1) else end
    path.write_bytes(mutations.content(random, content[:scalars]) + content[scalars:])
    checkpoint = refused_or(path, lambda: open_checkpoint(str(path), folder / "work"))
    if checkpoint is not None:
        refused_or(path, lambda: checkpoint.read("model.norm.weight"))


def recipes(samples: Samples, random: Random, folder: Path) -> None:
    """Ready recipes as trees, with everything that a recipe can say; and as text with the rest of YAML in it."""
    path = folder / "r.yaml"
    if random.randint(0, 1):
        text = random.choice([file.read_bytes() for file in recipe.available().values()])
        path.write_bytes(mutations.content(random, text, mutations.YAML))
    else:
        path.write_bytes(mutations.document(random, FULL))
    made = refused_or(path, lambda: recipe.load(str(path)))
    if made is not None:
        json.dumps(made.model_dump(mode="json"))
        made.scheme_for("model.layers.0.mlp.up_proj")


FULL = {
    "name": "full", "steps": [{"asymmetric": {"share": 0.5}}, {"gptq": {"damping": 0.01}}, "refine"],
    "scheme": {"grid": "affine", "bits": 4, "group_size": 32, "symmetric": True, "double_quant": False,
               "activations": "token", "strategy": None},
    "rules": [{"match": "*.down_proj", "bits": 8, "group_size": "auto"}, {"match": "*.layers.0.*", "skip": True}],
    "budget": {"bits": 4.5, "schemes": [{"bits": 3}, {"bits": 8, "group_size": 32}], "samples": 4},
    "format": "compressed-tensors", "kv_cache": None, "dtype": "auto", "seed": 0, "shard_gb": 4.0,
    "calibration": {"source": "builtin", "samples": 4, "sequence_length": 32, "held_out": 0.1, "batch_tokens": 64},
    "outputs": [], "memory_budget_gb": 4.0}


def plans(samples: Samples, random: Random, folder: Path) -> None:
    """Recipes that are valid, on a model."""
    path = folder / "r.yaml"
    base = {**FULL, "budget": None} if random.randint(0, 2) else FULL
    base = {**base, "format": random.choice(FORMATS), "scheme": {**FULL["scheme"], "grid": random.choice(GRIDS)}}
    path.write_bytes(mutations.document(random, base, 3))
    made = refused_or(path, lambda: recipe.load(str(path)))
    if made is not None:
        checkpoint = open_checkpoint(str(samples.model))
        refused_or("", lambda: make_plan(checkpoint, made, folder / "out", "cpu").to_json())


FORMATS = ("compressed-tensors", "gptq", "awq", "mlx", "fp8", "bitsandbytes", "modelopt", "gguf", "hf", "aqlm")
GRIDS = ("affine", "fp8", "nf4", "fp4", "mxfp4", "nvfp4", "q4_k", "vectorwise-int8", "aqlm-2x8")


def imatrix(samples: Samples, random: Random, folder: Path) -> None:
    path = folder / "m"
    if random.randint(0, 1):
        old = [("i", 2), *(field for name in (b"blk.0.attn_k.weight", b"output.weight")
                           for field in (("i", len(name)), name, ("i", 4), ("i", 2), ("f", 8.0), ("f", 2.0)))]
        path.write_bytes(mutations.binary(random, old))
    else:
        if not (folder / "good").exists():
            write_imatrix(folder / "good", {"output.weight": (torch.ones(2, 4), torch.ones(2))}, ["a"], 1, 1)
        path.write_bytes(mutations.content(random, (folder / "good").read_bytes()))
    for means, counts in (refused_or(path, lambda: read_imatrix(path)) or {}).values():
        assert means.shape[0] == len(counts) and bool((means >= 0).all()) and bool(means.isfinite().all())


IDENTITY = {"schema": 1, "recipe": {"bits": 4}, "arithmetic": {"threads": 1}}
STAGES = {"before": {"layers": []}, "block 0": {"layers": [{"name": "a", "relative_error": 0.25}]}, "block 1": {}}


def journals(samples: Samples, random: Random, folder: Path) -> None:
    """Taken up as it was written, or refused: never something that no run has recorded."""
    out, partial_folder = folder / "out", folder / "out.partial"
    partial_folder.mkdir(exist_ok=True)
    lines = [journal.line({"identity": IDENTITY}), *(journal.line({"stage": name, **one})
                                                     for name, one in STAGES.items())]
    place = random.randint(0, len(lines) - 1)
    if random.randint(0, 1):
        told = json.loads(lines[place])
        lines[place] = mutations.document(random, told) + (b"\n" if random.randint(0, 3) else b"")
    else:
        lines = [mutations.content(random, b"".join(lines))]
    (partial_folder / journal.NAME).write_bytes(b"".join(lines))
    refused_or(partial_folder, lambda: state(out, lambda: IDENTITY))
    (partial_folder / "stream-1.bin").write_bytes(b"kept")
    try:
        with Workspace(out, IDENTITY) as work:
            assert all(work.finished[name] == STAGES[name] for name in work.finished)
    except QtoolError as error:
        named(error, partial_folder)


def manifests(samples: Samples, random: Random, folder: Path) -> None:
    """The manifest of a finished output, as inspect reads it."""
    if not (folder / "model.safetensors").exists():
        shutil.copytree(samples.out, folder, dirs_exist_ok=True)
    good = json.loads((samples.out / "manifest.json").read_text())
    good["layers"] = good["layers"][:2] if random.randint(0, 1) else good["layers"]
    (folder / "manifest.json").write_bytes(mutations.document(random, good))
    record = refused_or(folder, lambda: manifest.load(folder))
    if record is None:
        return
    source = open_model(str(folder))
    for ask in (inspect.summary, lambda one: inspect.layers(one, record), lambda one: inspect.verify(one, [])):
        json.dumps(refused_or("", partial(ask, source)), allow_nan=False)


def exits(samples: Samples, random: Random, folder: Path) -> None:
    """A damaged file of the cache counts for none, and an undamaged one is what was written."""
    path = folder / f"{'ab' * 32}.safetensors"
    store = StreamStore(2, 3, 4, torch.float32, 1 << 20, folder)
    store.write(slice(0, 2), torch.arange(24.0).view(2, 3, 4))
    if not (folder / "good").exists():
        cache.save(folder / "good", path.stem, Exits(store, False))
    content = (folder / "good").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if random.randint(0, 1):
        text = mutations.document(random, json.loads(content[8:8 + size]))
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size:])
    else:
        path.write_bytes(mutations.content(random, content))
    found = cache.load(path, path.stem, lambda: StreamStore(2, 3, 4, torch.float32, 1 << 20, folder))
    assert found is None or torch.equal(found.store.read(slice(0, 2)), store.read(slice(0, 2)))


# what is damaged: (how, inputs in `make test`, inputs in `make test-trust`)
PARSERS: dict[str, tuple[Callable[[Samples, Random, Path], None], int, int]] = {
    "safetensors header": (safetensors, 200, 6000), "index": (index, 100, 2000),
    "recipe": (recipes, 60, 1000), "plan of a recipe": (plans, 25, 400),
    "config.json": (config, 20, 300), "config.json through transformers": (built, 20, 300),
    "quantization_config": (quantized, 30, 400), "tokenizer.json": (tokens, 30, 500),
    "GGUF header": (gguf, 200, 7000), "GGUF model": (gguf_model, 30, 600),
    "GGUF model with its vocabulary": (partial(gguf_model, whole=True), 10, 200),
    "imatrix": (imatrix, 100, 3000), "journal": (journals, 30, 600), "manifest": (manifests, 20, 300),
    "evaluation cache": (exits, 60, 1500),
}


def attempts(attempt: Callable[[Samples, Random, Path], None], count: int, samples: Samples, folder: Path) -> None:
    @settings(max_examples=count, deadline=DEADLINE, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def once(random: Random) -> None:
        attempt(samples, random, folder)

    once()


def test_a_document_survives_many_changes() -> None:
    """The damage itself never fails, however often one tree is changed."""
    for seed in range(300):
        assert isinstance(mutations.document(Random(seed), {"a": {"b": "c", "d": [1, None, 2.5]}}, changes=40), bytes)


@pytest.mark.parametrize("name", PARSERS)
def test_damage_is_refused_or_harmless(name: str, samples: Samples, tmp_path: Path) -> None:
    attempt, count, _ = PARSERS[name]
    attempts(attempt, count, samples, tmp_path)
