"""What commands do to the world, by Python's own audit events: no code of a model, no pickle, no process, no socket."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.trust


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/tmp/qtool-was-unpickled", "w")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with code and pickles beside its weights, whose tokenizer names files elsewhere."""
    folder = tiny.make(tmp_path_factory.mktemp("safe") / "model", "llama", num_hidden_layers=2)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pth", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization_llama.py", "torch.py", "json.py",
                 "sitecustomize.py", "conftest.py", "__init__.py"):
        (folder / name).write_text("open('/tmp/qtool-ran-code', 'w')\n")
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    for key in ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "added_tokens_file",
                "chat_template_file", "tokenizer_model_file", "sp_model_file"):
        said[key] = str(secret)
    path.write_text(json.dumps({**said, "name_or_path": "evil/model"}))
    return folder


def test_nothing_but_the_model_is_opened_and_no_one_is_called(model: Path, tmp_path: Path) -> None:
    """Python's own audit events of five commands: files, processes, sockets, pickles, modules."""
    small = ["--group-size", "32", "--quiet"]
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    commands = [
        ["quantize", str(model), "--method", "gptq", "--samples", "4", "--sequence-length", "16", *small,
         "--out", str(tmp_path / "gptq"), "--calibration", str(text)],
        ["inspect", str(tmp_path / "gptq"), "--verify", "--json", "--report", str(tmp_path / "page.html")],
        ["eval", str(tmp_path / "gptq"), "--against", str(model), "--text", str(text), "--context", "32", "--quiet"],
        ["export", str(tmp_path / "gptq"), "--to", "gguf", "--out", str(tmp_path / "m.gguf"), "--quiet"],
        ["inspect", str(tmp_path / "m.gguf"), "--layers"],
    ]
    told = tmp_path / "told.json"
    ended = subprocess.run([sys.executable, "-m", "tests.trust.watched", str(told)], cwd=ROOT,
                           input=json.dumps(commands), capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(told.read_text())
    assert found["statuses"] == [0] * len(commands), ended.stdout[-1000:] + ended.stderr[-2000:]
    opened = {path for event, path in found["events"] if event == "open"}
    inside = {Path(path).name for path in opened if Path(path).parent == model}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= inside
    assert not [name for name in inside if name.endswith((".py", ".bin", ".pt", ".pth"))], inside
    assert str(model.parent / "secret.json") not in opened
    assert not [path for path in found["modules"] if path.startswith(str(model.parent))]
    others = [(event, what) for event, what in found["events"] if event != "open"]
    assert not [one for one in others if one[0] != "pickle.find_class"], others
    assert not Path("/tmp/qtool-was-unpickled").exists() and not Path("/tmp/qtool-ran-code").exists()
    names = {path.name for path in (tmp_path / "gptq").iterdir()}
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".pth"))], names
