"""Hub repositories. huggingface_hub itself runs; its HTTP client is replaced by one that serves a local folder."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import _http
from safetensors.torch import save_file

from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSORS = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16(), "model.norm.weight": torch.randn(4)}
INDEX = "model.safetensors.index.json"
httpx = importlib.import_module(errors.HTTPError.__module__.split(".")[0])  # httpx, or httpx2 in newer versions


class Remote:
    """The part of the Hub's HTTP interface that is needed, over the files of a folder. `log`: what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[str] = []
        self.failures: dict[str, Any] = {}  # part of a URL -> an exception, or (status, X-Error-Code)
        self.sizes_of_other_files: dict[str, int] = {}

    def answer(self, request: Any) -> Any:
        path = request.url.path
        for part, failure in self.failures.items():
            if part in path:
                if isinstance(failure, Exception):
                    raise failure
                return httpx.Response(failure[0], headers={"X-Error-Code": failure[1]}, request=request)
        if path.startswith("/api/models/org/name"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", COMMIT):
                return httpx.Response(404, headers={"X-Error-Code": "RevisionNotFound"}, request=request)
            self.log.append(f"info {revision}")
            info = {"id": "org/name", "sha": COMMIT, "siblings": self.siblings()}
            return httpx.Response(200, json=info, request=request)
        prefix = f"/org/name/resolve/{COMMIT}/"
        if not path.startswith(prefix):
            return httpx.Response(404, headers={"X-Error-Code": "RepoNotFound"}, request=request)
        return self.file(request, path.removeprefix(prefix))

    def siblings(self) -> list[dict[str, Any]]:
        found = [{"rfilename": str(path.relative_to(self.folder)), "size": path.stat().st_size,
                  **({"lfs": {"size": path.stat().st_size, "sha256": digest(path), "pointerSize": 130}}
                     if path.suffix == ".safetensors" else {})}
                 for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return found + [{"rfilename": name, "size": size} for name, size in self.sizes_of_other_files.items()]

    def file(self, request: Any, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            return httpx.Response(404, headers={"X-Error-Code": "EntryNotFound"}, request=request)
        content = path.read_bytes()
        headers = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return httpx.Response(200, headers={**headers, "Content-Length": str(len(content))}, request=request)
        if "range" in request.headers and not request.headers["range"].endswith("-"):
            first, last = request.headers["range"].removeprefix("bytes=").split("-")
            self.log.append(f"head of {name}")
            return httpx.Response(206, headers=headers, content=content[int(first):int(last) + 1], request=request)
        self.log.append(f"whole {name}")
        return httpx.Response(200, headers=headers, content=content, request=request)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    folder = tmp_path / "remote"
    folder.mkdir()
    names = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        names[name] = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensor}, folder / names[name])
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name in ("tokenizer.json", "LICENSE", "README.md", "modeling_odd.py", "pytorch_model.bin"):
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"x")
    server = Remote(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.set_client_factory(lambda: httpx.Client(
        transport=httpx.MockTransport(server.answer), event_hooks={"request": [_http.hf_request_event_hook]},
        follow_redirects=True))
    yield server
    huggingface_hub.set_client_factory(_http.default_client_factory)


def refused(model: str, text: str, revision: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        open_checkpoint(model, revision)
    assert str(caught.value).startswith("org/") and "\n" not in str(caught.value)


def test_headers_come_first_and_shards_when_needed(remote: Remote) -> None:
    checkpoint = open_checkpoint("org/name")
    assert (checkpoint.origin, checkpoint.name, checkpoint.kind) == (f"org/name@{COMMIT}", "name", "hub")
    assert checkpoint.config == {"model_type": "llama"}
    assert {name: (spec.dtype, spec.shape) for name, spec in checkpoint.specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    assert sorted(path.name for path in checkpoint.companions()) == ["LICENSE", "tokenizer.json"]
    assert (checkpoint.directory / "config.json").is_file()
    assert remote.log == [
        "info main", "whole config.json", f"whole {INDEX}", "whole LICENSE", "whole tokenizer.json",
        "head of model-00001-of-00002.safetensors", "head of model-00002-of-00002.safetensors"]
    assert torch.equal(checkpoint.read("model.norm.weight"), TENSORS["model.norm.weight"])
    assert torch.equal(checkpoint.read_rows("model.norm.weight", 1, 3), TENSORS["model.norm.weight"][1:3])
    assert remote.log[7:] == ["whole model-00002-of-00002.safetensors"]


def test_hashes_need_no_download(remote: Remote) -> None:
    checkpoint = open_checkpoint("org/name")
    asked = len(remote.log)
    assert checkpoint.hashes() == {name: digest(remote.folder / name) for name in (
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json", INDEX)}
    assert len(remote.log) == asked


@pytest.mark.parametrize(("model", "revision"), [
    (f"org/name@{COMMIT}", None), ("org/name", COMMIT), ("org/name@main", None)])
def test_revisions(remote: Remote, model: str, revision: str | None) -> None:
    assert open_checkpoint(model, revision).origin == f"org/name@{COMMIT}"


def test_a_second_time_nothing_is_downloaded_and_offline_works(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_checkpoint("org/name")
    for name in TENSORS:
        first.read(name)
    remote.log.clear()
    again = open_checkpoint("org/name")
    assert torch.equal(again.read("model.norm.weight"), TENSORS["model.norm.weight"])
    assert remote.log == ["info main"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(remote.folder)
    offline = open_checkpoint("org/name", COMMIT)
    assert (offline.origin, offline.name, offline.kind) == (f"org/name@{COMMIT}", "name", "hub")
    assert offline.hashes() == first.hashes()
    assert torch.equal(offline.read("model.embed_tokens.weight"), TENSORS["model.embed_tokens.weight"])
    assert offline.specs == first.specs


def test_unreachable_hub_uses_the_cache_or_says_so(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits between its attempts
    remote.failures["/"] = httpx.ConnectError("no route to host")
    refused("org/name", "the Hub cannot be reached .no route to host., and the cache does not hold this repository")
    refused("org/name@v2", "does not hold v2; check the network")
    remote.failures.clear()
    first = open_checkpoint("org/name")
    first.read("model.norm.weight")
    remote.failures["/"] = httpx.ConnectError("no route to host")
    with pytest.raises(CheckpointError, match="1 of 2 weight files in .* are missing: model-00001-of-00002"):
        open_checkpoint("org/name", COMMIT)
    with pytest.raises(CheckpointError, match="model-00001.*(cannot be reached|not in the cache).*(network|online)"):
        first.read("model.embed_tokens.weight")


@pytest.mark.parametrize(("part", "failure", "text"), [
    ("/api/", (403, "GatedRepo"), "gated; accept its conditions at https://huggingface.co/org/name, then log in"),
    ("config.json", (403, "GatedRepo"), "org/name@.*/config.json: this model is gated"),
    ("/api/", (401, "RepoNotFound"), "no such folder here, and no such repository on the Hub.*hf auth login"),
    ("/api/", (418, ""), "the Hub refused: .*; try again later"),
    ("00002.safetensors", (404, "EntryNotFound"), "model-0000.*the file is not in the repository"),
    ("00002.safetensors", OSError(28, "No space left on device"), "cannot be downloaded: .*No space left"),
    ("00002.safetensors", httpx.ReadTimeout("too slow"), "the Hub cannot be reached: too slow; check the network"),
])
def test_what_can_go_wrong_on_the_way(remote: Remote, part: str, failure: Any, text: str) -> None:
    remote.failures[part] = failure
    refused("org/name", text)


def test_unknown_repository_and_revision(remote: Remote) -> None:
    refused("org/other", "org/other: no such folder here, and no such repository on the Hub")
    refused("org/name@v9", "the repository has no revision 'v9'")
    refused("org/na--me", "not a Hub id")


def test_repositories_without_a_usable_model(remote: Remote) -> None:
    for path in remote.folder.glob("model*"):
        path.unlink()
    refused("org/name", "pickled weights .pytorch_model.bin.")
    (remote.folder / "config.json").unlink()
    refused("org/name", "has no config.json in its top folder")


def test_missing_and_unlisted_shards(remote: Remote) -> None:
    save_file({"more": torch.zeros(1)}, remote.folder / "model-more.safetensors")
    refused("org/name", "model-more.safetensors holds tensors, but model.safetensors.index.json does not list it")
    (remote.folder / "model-more.safetensors").unlink()
    (remote.folder / "model-00001-of-00002.safetensors").unlink()
    refused("org/name", "1 of 2 weight files .* are missing")


def test_large_companions_stay_away(remote: Remote) -> None:
    remote.sizes_of_other_files["tokenizer.model"] = 1 << 40
    open_checkpoint("org/name")


@pytest.mark.parametrize("header", [
    b"[]", b"{", b'{"a": 5}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"null", b"[" * 50_000,
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": 7}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
    b'{"a": {"dtype": "F32", "shape": 5, "data_offsets": ["x", 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
])
def test_hostile_remote_headers(remote: Remote, header: bytes) -> None:
    (remote.folder / INDEX).unlink()
    for path in remote.folder.glob("model*.safetensors"):
        path.unlink()
    (remote.folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused("org/name", "model.safetensors: ")


def test_a_shard_that_is_not_what_was_announced(remote: Remote) -> None:
    checkpoint = open_checkpoint("org/name")
    save_file({"other": torch.zeros(1)}, remote.folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="holds other tensors than the Hub announced.*remove it from the cache"):
        checkpoint.read("model.norm.weight")
