"""Our formats in vLLM on the CPU; read_with_vllm.py says whose kernel multiplies.

W8A8 is loaded with codes of half their range: on a CPU with AVX2 but without VNNI the int8 product of oneDNN that vLLM
calls adds pairs in 16 bits and cuts their sums off, so that codes above 63 give wrong products there (the same call,
exact to the last digit with codes up to 63, is off by 0.65 of the deviation with codes up to 127).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool import activations
from qtool.recipe import Rule, Scheme
from tests.loaders.checkpoints import Case, answer, assert_close, build, case, expected, read

pytestmark = pytest.mark.loaders
CT, GPTQ, VENV = "compressed-tensors", "gptq", ".venv-loaders-vllm"
MIXED = (Rule(match="*.layers.1.mlp.down_proj", group_size=-1), Rule(match="*.layers.0.self_attn.o_proj", skip=True),
         Rule(match="*.layers.1.self_attn.[qkv]_proj", group_size=32))
SINGLE = [case(CT, 4, 32), case(CT, 4, 64, False), case(CT, 4, 128, True, *MIXED, name="ct-mixed")]
HALF = [case(GPTQ, 4, 128), case(GPTQ, 4, 64, True, *MIXED, name="gptq-mixed"),  # vLLM has no float32 for GPTQ files
        case(CT, 4, 32, False, name="ct-half"), case("awq", 4, 64, False, name="awq")]
# inputs rounded, computed in bfloat16, which moves many of them to the next code; int8 by vLLM's kernel for AMX, if any
BFLOAT = [Case("fp8-dynamic", CT, Scheme(grid="fp8", bits=8, group_size=-1, activations="token")),
          Case("w8a8-half-bfloat", CT, Scheme(bits=8, group_size=-1, activations="token"), stretch=2.1)]
INT8 = [Case("w8a8-half", CT, Scheme(bits=8, group_size=-1, activations="token"), stretch=2.1),
        Case("w8a8-static-half", CT, Scheme(bits=8, group_size=-1, activations="tensor"), stretch=2.1)]
LIMITS = {**dict.fromkeys([*SINGLE, *INT8], 1e-4), **dict.fromkeys(HALF, 0.1), **dict.fromkeys(BFLOAT, 0.3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    for one in LIMITS:
        build(one, folder)
    read(VENV, "read_with_vllm.py",
         [{"model": str(folder / one.name), "out": str(folder / f"{one}.vllm"), "dtype": dtype_of(one)}
          for one in LIMITS], folder)
    return folder


def dtype_of(one: Case) -> str:
    return "float32" if one in (*SINGLE, *INT8) else "bfloat16" if one in BFLOAT else "float16"


@pytest.mark.parametrize("one", LIMITS, ids=str)
def test_vllm_computes_what_we_decode(one: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "INT8_STEPS", 127.0)  # of a token's absmax, where transformers has 127.5
    tensors, _ = answer(folder / f"{one}.vllm")
    assert_close(tensors["logits"], expected(folder / one.name, folder)[-1], LIMITS[one])
