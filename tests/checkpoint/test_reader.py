"""Safetensors directories: what opens, and the message for everything that must not."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.header import MAX_HEADER_BYTES, parse_json, read_header
from qtool.errors import CheckpointError

INDEX = "model.safetensors.index.json"
TENSORS = {
    "model.embed_tokens.weight": torch.randn(8, 4).bfloat16(),
    "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4).half(),
    "model.norm.weight": torch.randn(4),
}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def single(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    save_file(TENSORS if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    return folder


def sharded(folder: Path, index: bool = True) -> Path:
    names = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: tensor}, folder / file)
        names[name] = file
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    (folder / "config.json").write_text("{}")
    return folder


def raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    (folder / "config.json").write_text("{}")
    return folder


def refused(folder: Path, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    message = str(caught.value)
    assert re.search(text, message), message
    assert str(folder) in message and "\n" not in message and len(message) < 1000


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("make", [single, sharded, lambda folder: sharded(folder, index=False)])
def test_reads_every_tensor(tmp_path: Path, make: Any) -> None:
    checkpoint = open_checkpoint(str(make(tmp_path)))
    assert (checkpoint.kind, checkpoint.name, checkpoint.origin) == ("safetensors", tmp_path.name, str(tmp_path))
    assert checkpoint.directory == tmp_path
    assert list(checkpoint.specs) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and read.is_contiguous() and torch.equal(read, tensor)
        assert checkpoint.specs[name].shape == tuple(tensor.shape)
        assert torch.equal(checkpoint.read_rows(name, 1, 3), tensor[1:3])
        assert checkpoint.read_rows(name, 2, 2).shape == (0, *tensor.shape[1:])
    checkpoint.close()


def test_other_names_than_model(tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    save_file({"y": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert list(open_checkpoint(str(tmp_path)).specs) == sorted(TENSORS)


def test_the_links_of_the_hub_cache(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--Small-1B" / "blobs"
    snapshot = blobs.parent / "snapshots" / "a1b2"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for file in sharded(blobs).iterdir():
        (snapshot / file.name).symlink_to(file)
    checkpoint = open_checkpoint(str(snapshot))
    assert checkpoint.name == "Small-1B"
    assert torch.equal(checkpoint.read("model.norm.weight"), TENSORS["model.norm.weight"])


def test_hashes_are_sha256_of_weights_index_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    checkpoint = open_checkpoint(str(sharded(tmp_path)))
    hashes = checkpoint.hashes()
    assert sorted(hashes) == sorted(file.name for file in tmp_path.iterdir())
    assert all(hashes[file.name] == hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir())
    for file in tmp_path.iterdir():
        file.unlink()
    assert checkpoint.hashes() == hashes  # kept


def test_companions_are_the_small_files_of_the_model(tmp_path: Path) -> None:
    wanted = ["LICENSE.txt", "License", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "generation_config.json",
              "merges.txt", "preprocessor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
              "tokenizer_config.json", "vocab.json"]
    for name in [*wanted, "README.md", "modeling_odd.py", "tokenization_odd.py", "tokenizer_evil.py", "events.log",
                 "training_args.bin", "tokenizer.pt", "optimizer.pt", ".gitattributes"]:
        (tmp_path / name).write_text("x")
    (tmp_path / "tokenizer").mkdir()
    assert [path.name for path in open_checkpoint(str(single(tmp_path))).companions()] == wanted


def test_unknown_tensors_and_rows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(single(tmp_path)))
    with pytest.raises(CheckpointError, match="no tensor 'lm_head.weight' in this checkpoint"):
        checkpoint.read("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"\[4\] has no rows 3 to 5"):
        checkpoint.read_rows("model.norm.weight", 3, 5)


# What is no checkpoint at all


@pytest.mark.parametrize(("model", "revision", "text"), [
    ("no/such/folder/here", None, "no such file or folder, and not a Hub id"),
    ("gone.gguf", None, "no such file or folder"),
    ("bert", None, "not a Hub id .org/name"),
    ("org/name@", None, "not a Hub id"),
    ("org/name@one", "two", "two revisions are given, one and two"),
])
def test_not_found(model: str, revision: str | None, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(model, revision)


def test_a_revision_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="goes with a Hub id"):
        open_checkpoint(str(single(tmp_path)), "main")


def test_a_single_file(tmp_path: Path) -> None:
    single(tmp_path)
    with pytest.raises(CheckpointError, match="give the folder that holds it and config.json"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(("content", "text"), [
    (None, "there is no config.json"),
    (b"", "config.json: not valid JSON"),
    (b"[1, 2]", "config.json: not a JSON object, but a list"),
    (b"{", "config.json: not valid JSON"),
    (b'{"a": 1, "a": 2}', "config.json: key 'a' is given twice"),
    (b"\xff\xfe{}", "config.json: not valid JSON"),
    (b'{"a":' * 200_000, "config.json: nested too deeply"),
    (b"[" * 200_000, "config.json: nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "config.json: not valid JSON"),
    (b'{"a": "' + b"x" * (17 << 20) + b'"}', "config.json: .*larger than 16,384 KiB"),
])
def test_bad_config(tmp_path: Path, content: bytes | None, text: str) -> None:
    single(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, text)


@pytest.mark.parametrize(("files", "text"), [
    (["pytorch_model.bin"], "pickled weights.*unpickling can run any code.*save_pretrained"),
    (["pytorch_model-00001-of-00002.bin", "training_args.bin"], "pickled weights"),
    (["model.pt"], "pickled weights"),
    (["adapter_model.safetensors"], "LoRA adapter, not a model; merge it first"),
    (["model-Q4_K_M.gguf"], "to use model-Q4_K_M.gguf, give the path"),
    ([], "holds no .safetensors file"),
])
def test_no_weights(tmp_path: Path, files: list[str], text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path, text)


# Shards and index


def test_missing_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "1 of 3 weight files in model.safetensors.index.json are missing: model-00002-of-00003")
    (tmp_path / INDEX).unlink()
    refused(tmp_path, "1 of 3 weight files are missing: model-00002-of-00003.safetensors; download")


def test_a_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").symlink_to(tmp_path / "blob")
    refused(tmp_path, "missing: model-00003")


@pytest.mark.parametrize("file", [
    "../model.safetensors", "/etc/model.safetensors", "..\\model.safetensors", "sub/model.safetensors",
    "a\x00.safetensors", ".hidden.safetensors", "model.bin", "", "C:model.safetensors"])
def test_index_that_points_outside(tmp_path: Path, file: str) -> None:
    edit_index(sharded(tmp_path), **{"model.norm.weight": file})
    refused(tmp_path, "tensor 'model.norm.weight' lies in .* not the name of a .safetensors file in this directory")


def test_index_with_odd_content(tmp_path: Path) -> None:
    sharded(tmp_path)
    for content in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}):
        (tmp_path / INDEX).write_text(json.dumps(content))
        refused(tmp_path, "has no weight_map")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": 5}}))
    refused(tmp_path, "tensor 'a' lies in '5'")


def test_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), ghost="model-00001-of-00003.safetensors")
    refused(tmp_path, "tensor 'ghost' should be in model-00001-of-00003.safetensors, but is not")
    sharded(tmp_path)
    save_file({"model.norm.weight": TENSORS["model.norm.weight"], "b": torch.zeros(1)},
              tmp_path / "model-00003-of-00003.safetensors")
    edit_index(tmp_path, b="model-00001-of-00003.safetensors")
    refused(tmp_path, "'b' should be in model-00001.*, but is in model-00003")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"model.norm.weight": torch.zeros(4)}, tmp_path / "model-00001-of-00003.safetensors")
    refused(tmp_path, "tensor 'model.norm.weight' is in two files, model-00001.* and model-00003")


def test_a_file_that_the_index_does_not_list(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"more": torch.zeros(4)}, tmp_path / "model-extra.safetensors")
    refused(tmp_path, "model-extra.safetensors holds tensors, but model.safetensors.index.json does not list it")
    save_file({}, tmp_path / "model-extra.safetensors")
    open_checkpoint(str(tmp_path))  # empty: nothing is ambiguous


def test_no_tensors_at_all(tmp_path: Path) -> None:
    refused(single(tmp_path, {}), "the weight files hold no tensors: model.safetensors")


# Damaged and hostile headers


@pytest.mark.parametrize(("content", "text"), [
    (b"", "the file is empty"),
    (b"abc", "3 bytes are too few"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    (struct.pack("<Q", 1 << 63) + b"{}", "announces a header of 9223372036854775808 bytes"),
    (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "announces a header of"),
    (struct.pack("<Q", 500) + b"{}", r"truncated inside its header \(needs 508 bytes, has 10\)"),
    (struct.pack("<Q", 2) + b"[]", "does not begin with"),
    (struct.pack("<Q", 0), "does not begin with"),
])
def test_damaged_files(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "model.safetensors: .*" + text)


@pytest.mark.parametrize(("header", "data", "text"), [
    (b'{"a": {}, "a": {}}', 0, "key 'a' is given twice"),
    (b'{"a": ' * 100_000, 0, "nested too deeply"),
    ({"a": 5}, 0, "'a' is not described by exactly dtype, shape and data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' is not described"),
    ({"a": {**ENTRY, "extra": 1}}, 8, "'a' is not described"),
    ({"a": {**ENTRY, "dtype": "F7"}}, 8, "'a' has the unknown dtype F7; known: BOOL"),
    ({"a": {**ENTRY, "dtype": ["F32"]}}, 8, "unknown dtype"),
    ({"a": {**ENTRY, "shape": [-2]}}, 8, "'a' has no valid shape"),
    ({"a": {**ENTRY, "shape": [True, 2]}}, 8, "'a' has no valid shape"),
    ({"a": {**ENTRY, "shape": [2.0]}}, 8, "'a' has no valid shape"),
    ({"a": {**ENTRY, "shape": "22"}}, 8, "'a' has no valid shape"),
    ({"a": {**ENTRY, "shape": [1 << 63]}}, 8, "'a' has no valid shape"),
    ({"a": {**ENTRY, "shape": [1] * 65}}, 8, "'a' has no valid shape"),
    ({"a": {**ENTRY, "shape": [1 << 32, 1 << 32]}}, 8, r"'a': shape \[4294967296, 4294967296\] overflows"),
    ({"a": {**ENTRY, "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}, 0, "overflows"),
    ({"a": {**ENTRY, "shape": [3]}}, 8, r"'a': F32 \[3\] takes 12 bytes, but data_offsets \[0, 8\] hold 8"),
    ({"a": {**ENTRY, "data_offsets": [0, -8]}}, 8, "'a' has no valid data_offsets"),
    ({"a": {**ENTRY, "data_offsets": [8, 0]}}, 8, "'a' has no valid data_offsets"),
    ({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, 8, "'a' has no valid data_offsets"),
    ({"a": ENTRY, "b": ENTRY}, 8, "tensors 'a' and 'b' overlap"),
    ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, 12, "tensors 'a' and 'b' overlap"),
    ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, 20, "4 bytes before tensor 'b' belong to no tensor"),
    ({"a": ENTRY}, 7, "truncated: tensor 'a' ends at byte 8 of the data, but the file holds 7"),
    ({"a": ENTRY}, 9, "1 bytes after the last tensor belong to no tensor"),
    ({"": ENTRY}, 8, "empty name"),
    ({"a\nb": ENTRY}, 8, r"tensor 'a\?b' has an empty name or one with control"),
    (b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "control characters"),
    ({"a" * 300: ENTRY}, 8, "aaa...' has an empty name"),
    ({"__metadata__": {"format": 5}, "a": ENTRY}, 8, "__metadata__ is not a map from text to text"),
    ({"__metadata__": [], "a": ENTRY}, 8, "__metadata__"),
])
def test_hostile_headers(tmp_path: Path, header: Any, data: int, text: str) -> None:
    refused(raw(tmp_path, header, bytes(data)), "model.safetensors.*" + text)


GOOD = json.dumps({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                   "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}).encode()


REPLACEMENTS = st.sampled_from([b"", b"0", b"9", b"-", b"{", b"}", b'"', b",", b"\\", b"e9", b"[[", b"\x00", b"\xff",
                                b"18446744073709551616", b'"a":1,', b"NaN", b"null"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) + 40), REPLACEMENTS), min_size=1, max_size=4), st.integers(0, 40))
@example([(8, b"")], 0)
def test_mutated_headers_give_a_checkpoint_error_or_open(tmp_path_factory: pytest.TempPathFactory,
                                                        mutations: list[tuple[int, bytes]], cut: int) -> None:
    """Never another exception; and what opens can be read."""
    content = bytearray(struct.pack("<Q", len(GOOD)) + GOOD + bytes(32))
    for position, replacement in mutations:
        content[position:position + 1] = replacement
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "model.safetensors").write_bytes(bytes(content[:len(content) - cut]))
    (folder / "config.json").write_text("{}")
    try:
        checkpoint = open_checkpoint(str(folder))
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        assert all(checkpoint.read(name).shape == spec.shape for name, spec in checkpoint.specs.items())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_json(content: bytes) -> None:
    try:
        assert isinstance(parse_json(content, "there"), dict)
    except CheckpointError as error:
        assert str(error).startswith("there: ")


# Files that change while they are open


def test_truncated_after_it_was_opened(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(single(tmp_path)))
    path, times = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat()
    os.truncate(path, times.st_size - 8)
    with pytest.raises(CheckpointError, match="was changed while the checkpoint was open"):
        checkpoint.read("model.norm.weight")
    path.unlink()
    with pytest.raises(CheckpointError, match="tensor 'model.norm.weight' cannot be read: No such file"):
        checkpoint.read("model.norm.weight")


def test_unreadable_files(tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: the file does not exist"):
        read_header(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_a_limit_takes_no_memory(tmp_path: Path) -> None:
    """Python takes memory for as many bytes as it may read before it reads any."""
    import tracemalloc

    from qtool.files import read_limited

    (tmp_path / "small").write_bytes(b"x" * 100)
    tracemalloc.start()
    assert read_limited(tmp_path / "small", 1 << 30) == b"x" * 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(OSError, match="larger than 0 KiB"):
        read_limited(tmp_path / "small", 99)
