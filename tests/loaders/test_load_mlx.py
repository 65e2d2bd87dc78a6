"""Our MLX checkpoints in mlx-lm on the CPU: Llama and Qwen3, every number of bits and every group size."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.recipe import Rule, Scheme
from tests.loaders.checkpoints import Case, answer, assert_close, build, case, expected, read

pytestmark = pytest.mark.loaders
MLX, VENV = "mlx", ".venv-loaders-mlx"
MIXED = (Rule(match="*.layers.1.mlp.down_proj", bits=8, group_size=32),
         Rule(match="*.layers.0.self_attn.o_proj", skip=True), Rule(match="*.layers.1.self_attn.[qkv]_proj", bits=2))
CASES = [
    *(case(MLX, bits, group, name=f"int{bits}-g{group}") for bits in (2, 3, 4, 6, 8) for group in (32, 64, 128)),
    *(case(MLX, bits, 64, False, name=f"uint{bits}") for bits in (2, 3, 4, 5, 6, 8)),
    *(Case(f"qwen3-{bits}", MLX, Scheme(bits=bits, group_size=64), family="qwen3") for bits in (2, 3, 4, 6, 8)),
    case(MLX, 4, 64, True, *MIXED, name="mixed"), case(MLX, 4, 64, family="qwen2", name="qwen2"),  # tied, with biases
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    for one in CASES:
        build(one, folder)
    read(VENV, "read_with_mlx.py", [{"model": str(folder / one.name), "out": str(folder / f"{one}.mlx")}
                                    for one in CASES], folder)
    return folder


@pytest.mark.parametrize("one", CASES, ids=str)
def test_mlx_computes_what_we_decode(one: Case, folder: Path) -> None:
    tensors, remarks = answer(folder / f"{one}.mlx")
    assert "QuantizedLinear" in remarks["modules"] and "QuantizedEmbedding" not in remarks["modules"]
    assert_close(tensors["logits"], expected(folder / one.name, folder), 1e-4)
