"""One tiny model and what the commands make of it, shared by the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.cli import main
from tests import tiny

SMALL = ["--group-size", "32", "--samples", "12", "--sequence-length", "32", "--quiet"]
Run = Callable[..., tuple[int, str, str]]  # arguments -> exit status, stdout, stderr


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process, as a shell sees it."""
    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err
    return call


def make(*words: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert not stopped.value.code


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("cli") / "tiny", "llama")


@pytest.fixture(scope="session")
def gptq(model: Path) -> Path:
    """Solved with GPTQ, stored as compressed-tensors."""
    out = model.with_name("gptq-out")
    make("quantize", model, "--out", out, *SMALL)
    return out


@pytest.fixture(scope="session")
def rtn(model: Path) -> Path:
    """Rounded, asymmetric, two schemes."""
    recipe = model.with_name("mixed.yaml")
    recipe.write_text("steps: [rtn]\nscheme: {bits: 4, group_size: 32, symmetric: false}\n"
                      "rules: [{match: '*.down_proj', bits: 8}, {match: '*.layers.0.*', skip: true}]\n")
    out = model.with_name("rtn-out")
    make("quantize", model, "--recipe", recipe, "--out", out, "--quiet")
    return out
