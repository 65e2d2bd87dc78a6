"""Our formats in vLLM on the CPU; read_with_vllm.py says whose kernel multiplies.

W8A8 is left out: on a CPU with AVX2 alone vLLM's logits differ by half of their deviation from those of transformers
and of our decode, which agree exactly; not looked into.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.recipe import Rule, Scheme
from tests.loaders.checkpoints import Case, answer, assert_close, build, case, expected, read

pytestmark = pytest.mark.loaders
CT, GPTQ, VENV = "compressed-tensors", "gptq", ".venv-loaders-vllm"
MIXED = (Rule(match="*.layers.1.mlp.down_proj", group_size=-1), Rule(match="*.layers.0.self_attn.o_proj", skip=True),
         Rule(match="*.layers.1.self_attn.[qkv]_proj", group_size=32))
SINGLE = [case(CT, 4, 32), case(CT, 4, 64, False), case(CT, 4, 128, True, *MIXED, name="ct-mixed")]
HALF = [case(GPTQ, 4, 128), case(GPTQ, 4, 64, True, *MIXED, name="gptq-mixed"),  # vLLM has no float32 for GPTQ files
        case(CT, 4, 32, False, name="ct-half"), case("awq", 4, 64, False, name="awq")]
# inputs rounded to FP8: computed in bfloat16 there, which moves many of them to the next code
FP8 = [Case("fp8-dynamic", CT, Scheme(grid="fp8", bits=8, group_size=-1, activations="token"))]
LIMITS = {**dict.fromkeys(SINGLE, 1e-4), **dict.fromkeys(HALF, 0.1), **dict.fromkeys(FP8, 0.3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    for one in LIMITS:
        build(one, folder)
    read(VENV, "read_with_vllm.py",
         [{"model": str(folder / one.name), "out": str(folder / f"{one}.vllm"),
           "dtype": "float32" if one in SINGLE else "bfloat16" if one in FP8 else "float16"} for one in LIMITS], folder)
    return folder


@pytest.mark.parametrize("one", LIMITS, ids=str)
def test_vllm_computes_what_we_decode(one: Case, folder: Path) -> None:
    tensors, _ = answer(folder / f"{one}.vllm")
    assert_close(tensors["logits"], expected(folder / one.name, folder)[-1], LIMITS[one])
