"""GPTQ checkpoints in GPTQModel, and in transformers with optimum on top of GPTQModel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool import decode
from qtool.grids import affine
from qtool.recipe import Rule
from tests.loaders.checkpoints import Case, answer, assert_close, build, case, expected, read

pytestmark = pytest.mark.loaders
NAME, VENV = "gptq", ".venv-loaders-gptqmodel"
MIXED = (Rule(match="*.layers.1.mlp.down_proj", bits=8, group_size=-1),
         Rule(match="*.layers.0.self_attn.o_proj", skip=True))
ALIKE = [case(NAME, 4, 32), case(NAME, 8, 64), case(NAME, 3, 32), case(NAME, 2, 16), case(NAME, 4, -1),
         case(NAME, 4, 128, False), case(NAME, 3, 32, False), case(NAME, 8, -1, False),
         case(NAME, 4, 64, True, Rule(match="*.o_proj", skip=True), name="no-o_proj")]
CASES = [*ALIKE, case(NAME, 4, 32, True, *MIXED, name="mixed")]
AWQ = [case("awq", 4, 32, False, name="awq"),
       case("awq", 4, 64, False, Rule(match="*.o_proj", skip=True), name="awq-64")]
HALF = 0.03  # logits of size 1 computed in float16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptqmodel")
    for one in (*CASES, *AWQ):
        build(one, folder)
    read(VENV, "read_with_gptqmodel.py",
         [{"model": str(folder / one.name), "out": str(folder / f"{one}.gptqmodel"), "format": one.format}
          for one in (*CASES, *AWQ)], folder)
    return folder


@pytest.fixture(scope="module")
def transformers(folder: Path) -> Path:
    read(VENV, "read_with_transformers.py",
         [{"model": str(folder / one.name), "out": str(folder / f"{one}.transformers"), "dtype": "float16"}
          for one in ALIKE], folder)
    return folder


@pytest.mark.parametrize("one", CASES, ids=str)
def test_gptqmodel_decodes_the_weights_that_we_meant(one: Case, folder: Path) -> None:
    tensors, _ = answer(folder / f"{one}.gptqmodel")
    source = decode.open_model(str(folder / one.name))
    assert {f"{name}.weight" for name in source.schemes} == set(tensors) - {"logits"}
    for name in source.schemes:
        assert torch.equal(tensors[f"{name}.weight"], affine.decode(source.read_quantized(name)).half()), name
    assert_close(tensors["logits"], expected(folder / one.name, folder), HALF)


@pytest.mark.parametrize("one", ALIKE, ids=str)
def test_transformers_computes_what_we_decode(one: Case, transformers: Path) -> None:
    tensors, remarks = answer(transformers / f"{one}.transformers")
    assert "Linear" in remarks["modules"].replace("Linear ", ""), "nothing was replaced by a quantized module"
    assert_close(tensors["logits"], expected(transformers / one.name, transformers), HALF)


@pytest.mark.parametrize("one", AWQ, ids=str)
def test_gptqmodel_computes_what_we_decode_of_awq(one: Case, folder: Path) -> None:
    tensors, remarks = answer(folder / f"{one}.gptqmodel")
    assert "Awq" in remarks["modules"]
    assert_close(tensors["logits"], expected(folder / one.name, folder), HALF)
