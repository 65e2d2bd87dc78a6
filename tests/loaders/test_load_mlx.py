"""Our MLX checkpoints in mlx-lm on the CPU: every number of bits and every group size, and stacked experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool import formats
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
    *(Case(f"{family}-{bits}", MLX, Scheme(bits=bits, group_size=32), family=family)
      for family in ("mixtral", "qwen3_moe") for bits in (3, 4, 8)),
    case(MLX, 4, 32, False, family="qwen3_moe", name="experts-zeros"),
    case(MLX, 4, 32, True, Rule(match="*.0.*.experts.*.w2", skip=True), Rule(match="*.1.*.experts.*.w1", bits=8),
         family="mixtral", name="experts-mixed"),
    case(MLX, 4, 64, True, *MIXED, name="mixed"), case(MLX, 4, 64, family="qwen2", name="qwen2"),  # tied, with biases
]


FAMILIES = ("llama", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    for one in CASES:
        build(one, folder)
    jobs = [{"model": str(folder / one.name), "out": str(folder / f"{one}.mlx")} for one in CASES]
    for family in FAMILIES:
        as_on_the_hub(folder / f"source-{family}")
        jobs.append({"source": str(folder / f"source-{family}"), "model": str(folder / f"theirs-{family}"),
                     "out": str(folder / f"theirs-{family}.mlx")})
    read(VENV, "read_with_mlx.py", jobs, folder)
    return folder


def as_on_the_hub(source: Path) -> None:
    """With the names that mlx-lm's converter wants, as in config.json of older versions of transformers; in float32, so
    that no decoded weight is rounded."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**formats.load(MLX).adapted(config), "dtype": "float32"}))


@pytest.mark.parametrize("one", CASES, ids=str)
def test_mlx_computes_what_we_decode(one: Case, folder: Path) -> None:
    tensors, remarks = answer(folder / f"{one}.mlx")
    assert "QuantizedLinear" in remarks["modules"] and "QuantizedEmbedding" not in remarks["modules"]
    assert_close(tensors["logits"], expected(folder / one.name, folder), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_mlx_lm_quantized_is_read(family: str, folder: Path) -> None:
    """Embedding, head and router too, experts in one tensor, biases that are no zero points."""
    tensors, remarks = answer(folder / f"theirs-{family}.mlx")
    assert "QuantizedEmbedding" in remarks["modules"]
    assert ("QuantizedSwitchLinear" in remarks["modules"]) == (family != "llama")
    assert_close(tensors["logits"], expected(folder / f"theirs-{family}", folder, exact=False), 1e-4)
