"""What a format cannot hold is refused while planning, with the numbers and the nearest that works."""

from __future__ import annotations

import re

import pytest

from qtool import formats
from qtool.errors import PlanError, RecipeError
from qtool.formats._targets import fused_conflicts, kind, patterns, with_fused
from qtool.recipe import Scheme

NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(("name", "scheme", "shape", "words"), [
    ("compressed-tensors", Scheme(bits=5), (64, 128), ("5", "nearest: 4 bits")),
    ("compressed-tensors", Scheme(bits=7), (64, 128), ("7", "nearest: 8 bits")),
    ("compressed-tensors", Scheme(group_size=128), (64, 576), ("128", "576", "nearest that does: 64")),
    ("compressed-tensors", Scheme(group_size=64), (64, 100), ("64", "100", "-1")),
    ("compressed-tensors", Scheme(grid="nf4"), (64, 128), ("nf4", "nearest: --format bitsandbytes")),
    ("gptq", Scheme(group_size=64), (64, 96), ("64", "96", "32")),
    ("gptq", Scheme(group_size=-1), (50, 64), ("50 outputs", "64 inputs", "compressed-tensors")),
    ("gptq", Scheme(group_size=-1), (64, 48), ("64 outputs", "48 inputs", "compressed-tensors")),
    ("gptq", Scheme(group_size=96), (64, 192), ("96", "nearest: 64")),
    ("gptq", Scheme(group_size=8), (64, 192), ("group_size 8", "nearest: 16")),
    ("awq", Scheme(bits=8), (64, 128), ("4 bits", "8", "--bits 4")),
    ("awq", Scheme(group_size=64), (60, 128), ("60 outputs", "compressed-tensors")),
    ("awq", Scheme(group_size=8), (64, 128), ("group_size 8", "16, 32")),
    ("hf", Scheme(), (64, 128), ("dense", "compressed-tensors")),
])
def test_refusals_name_the_linear_the_numbers_and_the_nearest(name: str, scheme: Scheme, shape: tuple[int, int],
                                                              words: tuple[str, ...]) -> None:
    reason = formats.load(name).check(scheme, NAME, shape)
    assert reason and NAME in reason
    assert all(word in reason for word in words), reason


def test_formats_are_found_by_file_name() -> None:
    assert formats.names() == ["aqlm", "awq", "bitsandbytes", "compressed-tensors", "fp8", "gguf", "gptq", "hf", "mlx",
                               "modelopt"]
    assert formats.load("compressed-tensors").NAME == "compressed-tensors"
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        formats.load("gptqq")
    assert formats.recognise({"model_type": "llama"}) is None


def test_a_gptq_checkpoint_is_symmetric_or_not() -> None:
    gptq = formats.load("gptq")
    mixed = {"model.layers.0.a": Scheme(), "model.layers.0.b": Scheme(symmetric=False)}
    assert "model.layers.0.b is not" in gptq.check_together(mixed)
    with pytest.raises(PlanError, match="compressed-tensors"):
        gptq.config(mixed, [])
    assert formats.load("compressed-tensors").check_together(mixed) is None


def test_notes_say_who_cannot_load_it() -> None:
    three = {NAME: Scheme(bits=3)}
    assert "0.20" in formats.load("compressed-tensors").notes(three)[0]
    assert "dequantize=True" in formats.load("compressed-tensors").notes({NAME: Scheme(symmetric=False)})[0]
    assert "vLLM" in formats.load("gptq").notes(three)[0]
    assert "GPTQModel" in formats.load("gptq").notes({NAME: Scheme(symmetric=False)})[0]
    assert all(formats.load(name).notes({NAME: Scheme()}) == [] for name in ("compressed-tensors", "gptq", "hf"))


def test_linears_that_vllm_fuses_must_agree() -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert fused_conflicts(dict.fromkeys(names, Scheme())) == []
    [message] = fused_conflicts({**dict.fromkeys(names, Scheme()), names[2]: Scheme(bits=8)})
    assert "model.layers.0.self_attn: q_proj int4-g128, k_proj int4-g128, v_proj int8-g128" in message
    [message] = fused_conflicts({names[0]: Scheme(), names[1]: Scheme()}, skipped=[names[2]])
    assert "v_proj unquantized" in message


def test_patterns_match_what_is_wanted_and_nothing_else() -> None:
    layers = [f"model.layers.{i}.mlp.{part}" for i in range(12) for part in ("up_proj", "down_proj")]
    experts = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(3) for j in range(4)]
    for wanted in (layers, layers[:3], layers[::2], layers[1::4], experts, experts[:4], experts[2:7],
                   [*experts, "lm_head"]):
        others = [name for name in [*layers, *experts, "lm_head"] if name not in wanted]
        found = patterns(wanted, others)
        assert len(found) <= 4
        for name in wanted:
            assert any(re.match(pattern, name) for pattern in found), name
        for name in others:
            assert not any(re.match(pattern, name) for pattern in found), name


def test_names_inside_a_block() -> None:
    assert kind("model.layers.3.self_attn.q_proj") == "self_attn.q_proj"
    assert kind("model.layers.3.mlp.experts.7.up_proj") == "mlp.experts.7.up_proj"
    assert with_fused([f"a.{part}_proj" for part in "qkv"])[-1] == "a.qkv_proj"
    assert with_fused(["a.q_proj", "a.k_proj"]) == ["a.q_proj", "a.k_proj"]
