"""Our AQLM checkpoints in transformers with the package aqlm, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool.recipe import Rule, Scheme
from tests.loaders.checkpoints import Case, answer, assert_close, build, expected, read

pytestmark = pytest.mark.loaders
VENV = ".venv-loaders-aqlm"
TWO = Scheme(grid="aqlm-2x8", bits=2, group_size=8)
LEFT = (Rule(match="*.layers.0.self_attn.o_proj", skip=True), Rule(match="*.layers.1.mlp.gate_proj", skip=True))
BUT_TWO = (Rule(match="*.layers.0.*", skip=True), Rule(match="*.layers.1.mlp.*", skip=True),
           Rule(match="*.layers.1.self_attn.[qk]_proj", skip=True))  # a codebook takes 1 MiB
CASES = [
    Case("2x8", "aqlm", TWO), Case("2x8-some", "aqlm", TWO, LEFT), Case("2x8-biases", "aqlm", TWO, family="qwen2"),
    Case("3x8", "aqlm", TWO.model_copy(update={"grid": "aqlm-3x8", "bits": 3})),
    Case("4x8", "aqlm", TWO.model_copy(update={"grid": "aqlm-4x8", "bits": 4})),
    Case("levels", "aqlm", Scheme(grid="lloyd4", bits=4, group_size=-1)),
    Case("1x16", "aqlm", TWO.model_copy(update={"grid": "aqlm-1x16"}), BUT_TWO),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aqlm")
    for one in CASES:
        build(one, folder)
    read(VENV, "read_with_transformers.py", [{"model": str(folder / one.name), "out": str(folder / f"{one}.aqlm")}
                                             for one in CASES], folder)
    return folder


@pytest.mark.parametrize("one", CASES, ids=str)
def test_aqlm_computes_what_we_decode(one: Case, folder: Path) -> None:
    """Codebooks and scales are cast to float32, in which aqlm's kernels for CPUs work; the order of sums differs."""
    tensors, remarks = answer(folder / f"{one}.aqlm")
    assert "QuantizedLinear" in remarks["modules"]
    left = json.loads((folder / one.name / "config.json").read_text())["quantization_config"]
    assert ("Linear" in remarks["modules"].split()) and "lm_head" in left["linear_weights_not_to_quantize"]
    assert_close(tensors["logits"], expected(folder / one.name, folder), 1e-4)
