"""Uploads. huggingface_hub itself runs; its HTTP client is replaced by a Hub in memory, which keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import _http

from tests.cli.conftest import Run

httpx = importlib.import_module(errors.HTTPError.__module__.split(".")[0])  # httpx, or httpx2 in newer versions
NAME = "me/tiny-gptq"


class Hub:
    """The part of the Hub's HTTP interface that an upload needs. `files`: name -> bytes, of the one repository."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.private: bool | None = None  # None: there is no repository
        self.sent: list[str] = []  # blobs and commits
        self.failures: dict[str, Any] = {}  # part of a URL -> status, or an exception

    def answer(self, request: Any) -> Any:
        path = request.url.path
        for part, failure in self.failures.items():
            if part in path:
                if isinstance(failure, Exception):
                    raise failure
                return httpx.Response(failure, request=request, json={"error": "no"})
        for part, reply in (("/api/repos/create", self.create), ("/preupload/", self.preupload),
                            ("/lfs/objects/batch", self.batch), ("/blob/", self.blob), ("/commit/", self.commit),
                            ("/api/validate-yaml", self.card)):
            if part in path:
                return httpx.Response(200, request=request, json=reply(request))
        assert path.startswith(f"/api/models/{NAME}")
        return httpx.Response(200, request=request, json={"id": NAME, "sha": "a" * 40, "private": bool(self.private)})

    def create(self, request: Any) -> dict[str, Any]:
        asked = json.loads(request.content)
        assert (asked["organization"], asked["name"]) == tuple(NAME.split("/"))
        if self.private is None:
            self.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        return {"url": f"https://huggingface.co/{NAME}"}

    def card(self, request: Any) -> dict[str, Any]:
        assert "library_name" in json.loads(request.content)["content"]
        return {"errors": [], "warnings": []}

    def preupload(self, request: Any) -> dict[str, Any]:
        return {"files": [{"path": one["path"], "shouldIgnore": False, "oid": self.oid(one["path"]),
                           "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                          for one in json.loads(request.content)["files"]]}

    def oid(self, name: str) -> str | None:
        """As git has it; of an LFS file its sha256."""
        content = self.files.get(name)
        if content is None:
            return None
        return (hashlib.sha256(content) if name.endswith(".safetensors")
                else hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()

    def batch(self, request: Any) -> dict[str, Any]:
        return {"transfer": "basic", "objects": [
            {**one, **({} if one["oid"] in self.blobs else
                       {"actions": {"upload": {"href": f"https://huggingface.co/blob/{one['oid']}"}}})}
            for one in json.loads(request.content)["objects"]]}

    def blob(self, request: Any) -> dict[str, Any]:
        content, oid = request.read(), request.url.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.blobs[oid] = content
        self.sent.append(oid)
        return {}

    def commit(self, request: Any) -> dict[str, Any]:
        for line in map(json.loads, request.read().decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        self.sent.append("commit")
        return {"success": True, "commitOid": "c" * 40, "commitUrl": f"https://huggingface.co/{NAME}/commit/{'c' * 40}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.set_client_factory(lambda: httpx.Client(
        transport=httpx.MockTransport(server.answer), event_hooks={"request": [_http.hf_request_event_hook]},
        follow_redirects=True))
    yield server
    huggingface_hub.set_client_factory(_http.default_client_factory)


@pytest.fixture
def out(gptq: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gptq, tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_sent_is_the_output_and_nothing_else(run: Run, hub: Hub, out: Path) -> None:
    expected = contents(out)
    (out / "notes.txt").write_text("mine")
    (out / ".cache").mkdir()
    status, told, _ = run("export", out, "--push-to", NAME, "--json")
    pushed = json.loads(told)["pushed"]
    assert status == 0 and hub.files == expected and not hub.private
    assert {"README.md", "manifest.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert pushed == {"repository": NAME, "url": f"https://huggingface.co/{NAME}", "commit": "c" * 40,
                      "private": False, "files": sorted(expected)}
    sent = len(hub.sent)
    assert run("export", out, "--push-to", NAME, "--quiet") == (0, "", "") and len(hub.sent) == sent  # nothing new
    status, told, _ = run("export", out, "--push-to", NAME)
    assert status == 0 and f"https://huggingface.co/{NAME}" in told and "hf_secret" not in told


def test_an_interrupted_upload_goes_on(run: Run, hub: Hub, out: Path) -> None:
    hub.failures["/commit/"] = httpx.ConnectError("no route")
    status, told, err = run("export", out, "--push-to", NAME)
    assert (status, told) == (1, "") and "the Hub cannot be reached: no route; check the network, then: qtool" in err
    assert len(hub.blobs) == 1 and not hub.files
    hub.failures.clear()
    assert run("export", out, "--push-to", NAME, "--quiet")[0] == 0
    assert hub.sent == [next(iter(hub.blobs)), "commit"] and hub.files == contents(out)  # the weights went once


def test_export_and_push_in_one(run: Run, hub: Hub, gptq: Path, tmp_path: Path) -> None:
    status, told, _ = run("export", gptq, "--to", "gptq", "--out", tmp_path / "g", "--push-to", NAME, "--private",
                          "--json")
    result = json.loads(told)
    assert status == 0 and result["format"] == "gptq" and result["pushed"]["private"] and hub.private
    assert hub.files == contents(tmp_path / "g") and "quantize_config.json" in hub.files


def test_private_files_do_not_go_to_a_public_repository(run: Run, hub: Hub, out: Path) -> None:
    hub.private = False
    status, _, err = run("export", out, "--push-to", NAME, "--private")
    assert status == 2 and f"{NAME} is there and public" in err and not hub.sent


@pytest.mark.parametrize(("failure", "message"), [
    (401, r"the Hub refused \(401: .*log in with 'hf auth login'"),
    (403, r"the Hub refused \(403: .*use a token that may write to me, then: qtool export"),
    (503, r"the Hub refused \(503: .*try again later"),
    (httpx.ConnectTimeout("too slow"), "cannot be reached: too slow; check the network"),
    (errors.LocalTokenNotFoundError("none"), "no token of the Hub is set; log in with 'hf auth login'"),
])
def test_refusals_are_one_message(failure: Any, message: str, run: Run, hub: Hub, out: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries some failures again
    hub.failures["/api/"] = failure
    status, told, err = run("export", out, "--push-to", NAME)
    assert (status, told) == (1, "") and err.startswith(f"error: {NAME}: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert not hub.sent and "hf_secret" not in err


@pytest.mark.parametrize(("damage", "status", "message"), [
    (lambda out: (out / "model.safetensors").write_bytes(b"x"), 3, "model.safetensors is missing, or not what was"),
    (lambda out: (out / "tokenizer.json").unlink(), 3, "tokenizer.json is missing, or not what was written"),
    (lambda out: (out / "README.md").unlink(), 3, "README.md is missing"),
    (lambda out: (out / "journal.jsonl").write_text("{}"), 2, "is not finished; give the command that makes it again"),
    (lambda out: out.rename(out.with_name("out.partial")), 2, "out is not finished; give the command that makes it"),
    (lambda out: (out / "manifest.json").unlink(), 2, "manifest.json cannot be read"),
])
def test_what_is_not_whole_is_not_sent(damage: Any, status: int, message: str, run: Run, hub: Hub, out: Path) -> None:
    damage(out)
    got, _, err = run("export", out, "--push-to", NAME)
    assert got == status and message in err and not hub.sent and hub.private is None


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing that another test imported is needed."""
    done = subprocess.run([sys.executable, "-m", "qtool", "export", str(tmp_path), "--push-to", NAME],
                          cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "manifest.json cannot be read" in done.stderr


def test_of_several_outputs_one_is_pushed(run: Run, hub: Hub, out: Path) -> None:
    record = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**record, "several": ["int4", "nf4"]}))
    status, _, err = run("export", out, "--push-to", NAME)
    assert status == 2 and f"push one of them: {out / 'int4'}" in err and not hub.sent
