"""FP8, FP4, NF4 and W8A8 checkpoints in transformers, with compressed-tensors and bitsandbytes, in our own venv."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool import decode
from qtool.recipe import Rule, Scheme
from tests.loaders.checkpoints import Case, answer, assert_close, build, expected, read
from tests.test_pipeline import quantize

pytestmark = pytest.mark.loaders
CT, BNB = "compressed-tensors", "bitsandbytes"
FP8 = Scheme(grid="fp8", bits=8, group_size=-1)
BLOCKS = Scheme(grid="fp8", bits=8, group_size=128, strategy="block", activations="group")
ODD = (Rule(match="*.[kv]_proj", skip=True),)  # no multiples of 128
COMPRESSED = [
    Case("fp8", CT, FP8), Case("fp8-dynamic", CT, FP8.model_copy(update={"activations": "token"})),
    Case("w8a8", CT, Scheme(bits=8, group_size=-1, activations="token")),
    Case("fp8-static", CT, FP8.model_copy(update={"strategy": "tensor", "activations": "tensor"})),
    Case("fp8-block", CT, BLOCKS, ODD),
    Case("w8a8-static", CT, Scheme(bits=8, group_size=-1, activations="tensor")),
    Case("nvfp4", CT, Scheme(grid="nvfp4", group_size=16)), Case("mxfp4", CT, Scheme(grid="mxfp4", group_size=32)),
    Case("mixed", CT, Scheme(grid="mxfp4", group_size=32),
         (Rule(match="*.down_proj", grid="fp8", bits=8, group_size=-1), Rule(match="*.layers.1.*.up_proj", skip=True))),
]
DEEPSEEK = Case("deepseek", "fp8", BLOCKS, ODD)
INT8 = Case("llm-int8", BNB, Scheme(grid="vectorwise-int8", bits=8, group_size=-1, activations="outliers"),
            (Rule(match="*.layers.0.self_attn.o_proj", skip=True),))
FOUR_BIT = [
    Case("nf4", BNB, Scheme(grid="nf4", group_size=64)),
    Case("nf4-dq", BNB, Scheme(grid="nf4", group_size=64, double_quant=True)),
    Case("fp4", BNB, Scheme(grid="fp4", group_size=32), (Rule(match="*.layers.0.mlp.down_proj", skip=True),)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    cases = (*COMPRESSED, *FOUR_BIT, INT8, DEEPSEEK)
    for one in cases:
        build(one, folder)
    jobs = [{"model": str(folder / one.name), "out": str(folder / f"{one}.now"),
             "dtype": str(dtype_of(one)).removeprefix("torch.")} for one in cases]
    read("", "read_with_transformers.py", jobs, folder)
    return folder


def dtype_of(one: Case) -> torch.dtype:
    """4-bit weights and blocks of FP8 are decoded to bfloat16 there, and LLM.int8() models loaded in it, whatever is
    asked for."""
    return torch.bfloat16 if one.scheme.bits == 4 or one in (INT8, DEEPSEEK) else torch.float32


@pytest.mark.parametrize("one", COMPRESSED, ids=str)
def test_compressed_tensors_computes_what_we_decode(one: Case, folder: Path) -> None:
    tensors, _ = answer(folder / f"{one}.now")
    assert_close(tensors["logits"], expected(folder / one.name, folder, dtype=dtype_of(one)), 1e-4)


def test_transformers_reads_blocks_of_fp8(folder: Path) -> None:
    """On a CPU it decodes the weights when it loads them, and rounds no inputs."""
    tensors, _ = answer(folder / f"{DEEPSEEK}.now")
    assert_close(tensors["logits"], expected(folder / DEEPSEEK.name, folder, dtype=torch.bfloat16, rounded=False), 1e-4)


def test_transformers_keeps_keys_and_values_in_fp8_with_our_scales(folder: Path) -> None:
    quantize(folder / "source-llama", folder / "kv", "w8a8", kv_cache="fp8", scheme__group_size=-1)
    read("", "read_with_transformers.py", [{"model": str(folder / "kv"), "out": str(folder / "kv.now")}], folder)
    tensors, _ = answer(folder / "kv.now")
    assert_close(tensors["logits"], expected(folder / "kv", folder), 1e-5)


@pytest.mark.parametrize("one", FOUR_BIT, ids=str)
def test_bitsandbytes_has_our_weights_and_our_logits(one: Case, folder: Path) -> None:
    """Its weights are ours bit for bit; its products are summed in another order, in bfloat16."""
    tensors, remarks = answer(folder / f"{one}.now")
    assert "Linear4bit" in remarks["modules"]
    source = decode.open_model(str(folder / one.name))
    weights = {name for name in tensors if name.endswith(".weight")}
    assert weights == {f"{name}.weight" for name in source.schemes}
    for name in weights:
        assert torch.equal(tensors[name].bfloat16(), source.read(name))
    ours = expected(folder / one.name, folder, dtype=torch.bfloat16)
    assert_close(tensors["logits"], ours, 0.01)
    if "packed.logits" in tensors:
        assert_close(tensors["packed.logits"], ours, 0.1)


def test_bitsandbytes_multiplies_as_our_evaluation_does(folder: Path) -> None:
    """LLM.int8(), outliers apart. A linear agrees to the last digit of bfloat16 (tests/formats has it in float32); from
    one to the next these digits move inputs to other codes."""
    tensors, remarks = answer(folder / f"{INT8}.now")
    assert "Linear8bitLt" in remarks["modules"]
    assert_close(tensors["logits"], expected(folder / INT8.name, folder, dtype=torch.bfloat16), 0.15)
