"""qtool export --to gguf."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from qtool import decode
from qtool.checkpoint.gguf_writer import GgufWriter
from tests import tiny
from tests.cli.conftest import Run


def test_any_checkpoint_becomes_one_file(run: Run, model: Path, gptq: Path, tmp_path: Path) -> None:
    """A quantized one is decoded; the file says what it holds."""
    status, out, _ = run("export", gptq, "--to", "gguf", "--type", "f32", "--out", tmp_path, "--json")
    result, path = json.loads(out), tmp_path / "gptq-out-F32.gguf"
    assert status == 0 and result["out"] == str(path) and list(tmp_path.iterdir()) == [path]
    assert (result["format"], result["from"], result["linears"], result["lossless"]) == (
        "gguf F32", "compressed-tensors", 21, False)
    assert result["outputs"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    source, back = decode.open_model(str(gptq)), decode.open_model(str(path))
    assert set(source.specs) == set(back.specs)
    assert all(torch.equal(source.read(name).float(), back.read(name)) for name in source.specs)
    status, out, _ = run("export", model, "--to", "gguf", "--out", tmp_path / "d.gguf")
    assert status == 0 and "Exported bfloat16 weights to gguf BF16" in out and "lossless" in out
    status, out, _ = run("inspect", tmp_path / "d.gguf", "--json")
    assert status == 0 and "BF16" in json.loads(out)["format"]


def test_a_stopped_export_goes_on(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    original = GgufWriter.write

    def write(self: GgufWriter, name: str, tensor: torch.Tensor) -> None:
        if len(written) == 9:
            raise SystemExit(9)
        written.append(name)
        original(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(GgufWriter, "write", write)
        assert run("export", model, "--to", "gguf", "--out", tmp_path / "m.gguf")[0] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.partial"]
    status, _, err = run("export", model, "--to", "gguf", "--type", "f16", "--out", tmp_path / "m.gguf")
    assert status == 2 and 'type: "BF16" -> "F16"' in err  # another command does not go on with it
    assert run("export", model, "--to", "gguf", "--out", tmp_path / "m.gguf", "--quiet") == (0, "", "")
    assert run("export", model, "--to", "gguf", "--out", tmp_path / "n.gguf", "--quiet") == (0, "", "")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "n.gguf"]


def test_what_is_refused_and_what_is_noted(run: Run, model: Path, gptq: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    for words, text in (
            (("export", model, "--to", "gguf", "--out", tmp_path / "m.gguf"), "m.gguf exists; remove it or choose"),
            (("export", model, "--to", "gguf", "--type", "q9"), "--type q9: give one of auto, f32, f16, bf16"),
            (("export", gptq, "--to", "gptq", "--type", "f16"), "--type is for --to gguf, not gptq")):
        status, _, err = run(*words)
        assert status == 2 and text in err and "Traceback" not in err
    windowed = tiny.make(tmp_path / "windowed", "mistral", num_hidden_layers=1)
    status, _, err = run("export", windowed, "--to", "gguf", "--out", tmp_path / "w.gguf")
    assert status == 0 and "note: the model attends to the last 8 tokens; llama.cpp has no such window" in " ".join(
        err.split())
