"""Runs that keep their statistics, and redos on these, killed for good at many places: the same bytes in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.test_kept import KEEP, everything
from tests.test_pipeline import Silent, quantize
from tests.test_redo import SHARDS, again, given

pytestmark = pytest.mark.trust
ROOT = Path(__file__).parent.parent.parent


class Killed(Silent):
    def __init__(self, name: str) -> None:
        self.name = name

    def linear(self, name: str, error: float | None) -> None:
        if name.startswith(self.name):
            os.kill(os.getpid(), signal.SIGKILL)


def killed(code: str) -> None:
    code = f"import torch; torch.set_num_threads(1)\nfrom tests.trust.test_kept_killed import *\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)  # on which the last bits of sums depend
    return tiny.make(tmp_path_factory.mktemp("killed") / "model", "llama", num_hidden_layers=2)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_run_is_killed_in_every_block_and_the_redo_too(method: str, model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "whole", method, **SHARDS, **KEEP)
    for place in ("0.self_attn.q", "0.mlp.down", "1.self_attn.o"):
        killed(f"quantize(Path({str(model)!r}), Path({str(tmp_path / 'killed')!r}), {method!r}, "
               f"progress=Killed('model.layers.{place}'), **SHARDS, **KEEP)")
    quantize(model, tmp_path / "killed", method, **SHARDS, **KEEP)
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    old = everything(tmp_path / "killed")
    again(model, tmp_path / "whole", "*", how=given(scheme__bits=8))
    for place in ("0.mlp.gate", "1.mlp.down"):
        killed(f"again(Path({str(model)!r}), Path({str(tmp_path / 'killed')!r}), '*', how=given(scheme__bits=8), "
               f"progress=Killed('model.layers.{place}'))")
        assert everything(tmp_path / "killed") == old
    again(model, tmp_path / "killed", "*", how=given(scheme__bits=8))
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
