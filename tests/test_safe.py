"""The source has no pickle, no shell, no code of models, and few ways to the network; trust/test_no_code.py watches."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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
