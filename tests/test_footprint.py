"""Memory at inference: the cache against the one that transformers keeps, the rest against figures made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool import decode, footprint
from qtool.cli import main
from qtool.errors import InputError
from tests import tiny

LATENT: dict[str, Any] = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
                          "v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                          "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
                          "first_k_dense_replace": 1, "head_dim": 8}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "deepseek_v3", LATENT)
    monkeypatch.setitem(tiny.FAMILIES, "gpt_neox", {"num_key_value_heads": 4})
    monkeypatch.setitem(tiny.FAMILIES, "falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16})


def cached_bytes(path: Path, context: int, batch: int) -> int:
    """What the cache that transformers allocates for this many tokens holds after a prompt."""
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    cache = StaticCache(config=model.config, max_cache_len=context)
    with torch.inference_mode():
        model(torch.zeros((batch, 4), dtype=torch.int64), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(("family", "overrides"), [
    ("llama", {}), ("llama", {"num_key_value_heads": 1, "head_dim": 32}), ("qwen3_moe", {}), ("mistral", {}),
    ("gemma2", {}), ("gemma3", {}), ("phi3", {}), ("mixtral", {}), ("deepseek_v3", {}), ("gpt_neox", {}),
])
@pytest.mark.parametrize("context", [6, 40])  # below and above the window of 8
def test_the_cache_is_transformers_own(family: str, overrides: dict[str, Any], context: int, tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "model", family, **overrides)
    found = footprint.inference(decode.open_model(str(path)), context, 2)
    assert found["kv_dtype"] == "bf16" and found["kv_cache"] == cached_bytes(path, context, 2)
    assert found["total"] == sum(found[key] for key in ("weights", "kv_cache", "activations", "overhead"))
    assert found["notes"] == []


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("footprint") / "llama", "llama")


def test_weights_and_activations_of_a_llama(llama: Path) -> None:
    found = footprint.inference(decode.open_model(str(llama)), 100, 3)
    assert found["weights"] == sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    mlp = 128 + 128 + 128 + 64  # gate, up, their product, down
    assert found["activations"] == 300 * (2 * 64 + mlp) * 2 + 3 * 512 * (2 + 4)
    assert footprint.inference(decode.open_model(str(llama)), 1 << 15, 3)["activations"] == \
        2048 * (2 * 64 + mlp) * 2 + 3 * 512 * (2 + 4)


@pytest.mark.parametrize(("kind", "bytes_per_32"), [
    ("fp32", 128), ("bf16", 64), ("fp8", 32), ("q8_0", 34), ("q4_0", 18)])
def test_types_of_cached_values(kind: str, bytes_per_32: int, llama: Path) -> None:
    found = footprint.inference(decode.open_model(str(llama)), 10, 2, kind)
    assert found["kv_cache"] == 3 * 2 * 10 * 2 * bytes_per_32  # layers, keys and values, tokens, batch; 2 heads of 16


def test_scales_for_the_cache_make_it_fp8(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "scaled"
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(llama), "--method", "rtn", "--kv-cache", "fp8", "--group-size", "32", "--samples", "2",
              "--sequence-length", "16", "--quiet", "--out", str(out)])
    assert not stopped.value.code
    assert footprint.inference(decode.open_model(str(out)), 10, 2)["kv_dtype"] == "fp8"


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "hybrid", "falcon_h1")
    found = footprint.inference(decode.open_model(str(path)), 10, 2)
    assert found["kv_cache"] is None and found["total"] is None and found["weights"] > 0
    assert "layer 0 keeps a state" in found["notes"][0] or "not known" in found["notes"][0]


def test_more_than_the_model_was_made_for_is_noted(llama: Path) -> None:
    assert "256 positions" in footprint.inference(decode.open_model(str(llama)), 257, 1)["notes"][0]


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 1), "at least 1"), ((1, 0), "at least 1"), ((1, 1, "int3"), "a cache in 'int3' is not known; use one of fp32"),
])
def test_bad_questions(arguments: tuple[Any, ...], message: str, llama: Path) -> None:
    with pytest.raises(InputError, match=message):
        footprint.inference(decode.open_model(str(llama)), *arguments)
