"""compressed-tensors checkpoints in transformers: with the library in our own venv, and with the version of vLLM's."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.recipe import Rule
from tests.loaders.checkpoints import Case, answer, assert_close, build, case, expected, read

pytestmark = pytest.mark.loaders
NAME = "compressed-tensors"
MIXED = (Rule(match="*.layers.1.mlp.down_proj", bits=8), Rule(match="*.o_proj", skip=True),
         Rule(match="*.layers.0.mlp.*", group_size=-1))
SYMMETRIC = [case(NAME, 4, 32), case(NAME, 8, 64), case(NAME, 3, 32), case(NAME, 2, 16), case(NAME, 4, -1),
             case(NAME, 4, 32, True, *MIXED, name="mixed")]
ASYMMETRIC = [case(NAME, 4, 32, False), case(NAME, 3, 64, False), case(NAME, 8, -1, False)]
EXPERTS = case(NAME, 4, 32, True, Rule(match="*.gate", skip=True), name="experts", family="qwen3_moe")
BOTH = [*SYMMETRIC[:2], SYMMETRIC[-1], ASYMMETRIC[0], ASYMMETRIC[2]]  # what 0.17 and 0.20 store alike


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every checkpoint, and what each venv makes of it."""
    folder = tmp_path_factory.mktemp("transformers")
    for one in (*SYMMETRIC, *ASYMMETRIC):
        build(one, folder)
    build(EXPERTS, folder)
    plain = [{"model": str(folder / one.name), "out": str(folder / f"{one}.now")} for one in (*SYMMETRIC, EXPERTS)]
    dequantized = [{"model": str(folder / one.name), "out": str(folder / f"{one}.now"), "dequantize": True}
                   for one in ASYMMETRIC]
    read("", "read_with_transformers.py", plain + dequantized, folder)
    return folder


@pytest.fixture(scope="module")
def older(folder: Path) -> Path:
    read(".venv-loaders-vllm", "read_with_transformers.py",
         [{"model": str(folder / one.name), "out": str(folder / f"{one}.older")} for one in BOTH], folder)
    return folder


@pytest.mark.parametrize("one", SYMMETRIC, ids=str)
def test_transformers_computes_what_we_decode(one: Case, folder: Path) -> None:
    tensors, _ = answer(folder / f"{one}.now")
    assert_close(tensors["logits"], expected(folder / one.name, folder), 1e-4)


def test_transformers_decodes_experts(folder: Path) -> None:
    """It stacks the experts of a layer, decoded to bfloat16: exact it is not."""
    tensors, _ = answer(folder / f"{EXPERTS}.now")
    assert_close(tensors["logits"], expected(folder / EXPERTS.name, folder), 0.01)


@pytest.mark.parametrize("one", ASYMMETRIC, ids=str)
def test_transformers_dequantizes_zero_points(one: Case, folder: Path) -> None:
    """compressed-tensors 0.18 to 0.20 cannot set up packed zero points; asked to dequantize, transformers reads them,
    and rounds the weights to the dtype of the scales."""
    tensors, _ = answer(folder / f"{one}.now")
    assert_close(tensors["logits"], expected(folder / one.name, folder, exact=False), 1e-4)


@pytest.mark.parametrize("one", BOTH, ids=str)
def test_an_older_library_computes_it_too(one: Case, older: Path) -> None:
    tensors, _ = answer(older / f"{one}.older")
    assert_close(tensors["logits"], expected(older / one.name, older), 1e-4)
