"""No pickle, no code of a model, no shell, no network, no file outside of a model's folder."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointError
from tests import tiny
from tests.test_structure import FILES, parsed

ROOT = Path(__file__).parent.parent
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "runpy", "code", "pty", "commands", "urllib",
         "requests", "httpx", "aiohttp", "http", "ftplib", "smtplib", "telnetlib"}
ONLY = {"subprocess": {"processes.py"}, "socket": {"lock.py", "processes.py", "on_ray.py"},
        "yaml": {"safe_yaml.py", "card.py", "checkpoint.py", "jobs.py", "quantizing.py"},
        "huggingface_hub": {"hub.py", "explained.py", "push.py", "calibration.py"}}
CALLS = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("os", "system"), ("os", "popen"), ("os", "execv"),
         ("os", "spawnv"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch.hub", "load")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_has_no_way_to_run_what_it_reads(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]] if node.module != "huggingface_hub.errors" else []
        for name in names:
            assert name not in NEVER, f"{path}:{node.lineno} imports {name}"
            assert name not in ONLY or path.name in ONLY[name], f"{path}:{node.lineno} imports {name}"
        if isinstance(node, ast.Call):
            _check_call(path, node)


def _check_call(path: Path, node: ast.Call) -> None:
    where = f"{path}:{node.lineno}"
    if isinstance(node.func, ast.Name):
        assert node.func.id not in ("eval", "exec", "compile", "__import__", "input"), f"{where} {node.func.id}"
    if isinstance(node.func, ast.Attribute):
        called = (ast.unparse(node.func.value), node.func.attr)
        assert called not in CALLS, f"{where} calls {'.'.join(called)}"
        assert called != ("yaml", "load") or path.name == "safe_yaml.py", f"{where} yaml.load"
    for keyword in node.keywords:
        said = ast.unparse(keyword.value)
        assert keyword.arg not in ("shell", "allow_pickle") or said == "False", f"{where} {keyword.arg}={said}"
        assert keyword.arg != "trust_remote_code" or said == "False", f"{where} remote code"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("safe") / "model", "llama", num_hidden_layers=1)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_directory_is_not_copied(model: Path, tmp_path: Path, name: str) -> None:
    """What would be copied into the output, and from there to the Hub, is a file of the model."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (tmp_path / "private").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*private, outside of .*; put the file itself"):
        open_checkpoint(str(folder)).companions()


def test_links_within_the_directory_and_those_of_the_cache_are_files(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, blobs / str(number))
            (folder / path.name).symlink_to(Path("../../blobs") / str(number))
    (folder / "NOTICE").symlink_to("tokenizer_config.json")
    other = tmp_path / "link"
    other.symlink_to(folder)
    for place in (folder, other):
        names = [path.name for path in open_checkpoint(str(place)).companions()]
        assert "tokenizer.json" in names and "NOTICE" in names
