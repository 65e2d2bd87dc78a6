"""MLX's layout: read back by a decoder written from its description, and files of other programs with any biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import decode, formats
from qtool.errors import CheckpointError, NumericalError
from qtool.models import families
from qtool.recipe import Scheme
from qtool.tensors import TensorSpec
from tests.formats.cases import NAME, InMemory, dense, random_tensor

MLX = formats.load("mlx")
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def codes_of(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """uint32 [N, any] -> codes [N, columns], bit by bit."""
    lines = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return lines.reshape(len(words), columns, bits) @ (1 << np.arange(bits))


def words_of(codes: np.ndarray, bits: int) -> torch.Tensor:
    lines = (codes[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(lines.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.uint32))


def of_others(bits: int, group: int, dtype: torch.dtype) -> tuple[InMemory, np.ndarray]:
    """A linear and an embedding as mlx makes them: scales of both signs, biases that are no multiples of them."""
    random, tensors = np.random.default_rng(bits * group), {}
    for linear, rows in ((NAME, 6), ("model.embed_tokens", 10)):
        codes = random.integers(0, 1 << bits, (rows, 256))
        scale, bias = (torch.from_numpy(random.standard_normal((rows, 256 // group))).to(dtype) for _ in range(2))
        tensors |= {f"{linear}.weight": words_of(codes, bits), f"{linear}.scales": scale, f"{linear}.biases": bias}
        if linear == NAME:
            each = [one.float().numpy().repeat(group, 1) for one in (scale, bias)]
            weight = codes.astype(np.float32) * each[0] + each[1]
    said = {"group_size": group, "bits": bits, "mode": "affine"}
    return InMemory(tensors, {"dtype": "bfloat16", "quantization": said, "quantization_config": said}), weight


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(BITS), st.sampled_from(GROUPS), st.booleans(), st.sampled_from(DTYPES), st.integers(1, 40),
       st.integers(1, 3), st.integers(0, 99))
def test_what_is_written_means_the_same_in_mlx(bits: int, group: int, symmetric: bool, dtype: torch.dtype, rows: int,
                                               groups: int, seed: int) -> None:
    scheme, shape = Scheme(bits=bits, group_size=group, symmetric=symmetric), (rows, groups * group)
    assert MLX.check(scheme, NAME, shape) is None
    tensor = random_tensor(*shape, scheme, MLX.scale_dtype(dtype), seed)
    packed = MLX.pack(NAME, tensor, dtype)
    announced = {spec.name: (spec.dtype, spec.shape) for spec in MLX.layout(NAME, shape, scheme, dtype)}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in packed.items()} == announced
    assert packed[f"{NAME}.scales"].dtype is (dtype if symmetric else torch.float32)

    again = MLX.unpack(NAME, packed.__getitem__, scheme, shape)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.zero_point, tensor.zero_point)
    assert torch.equal(dense(again), dense(tensor)) and MLX.obstacle(NAME, packed.__getitem__, scheme, shape) is None
    words, scale, bias = (packed[f"{NAME}.{suffix}"] for suffix in MLX.SUFFIXES)
    codes = codes_of(words.numpy(), bits, shape[1]).astype(np.float32)
    each = [one.float().numpy().repeat(group, 1) for one in (scale, bias)]
    assert np.array_equal(codes * each[0] + each[1], dense(tensor).numpy())
    assert torch.equal(MLX.dequantize(NAME, packed.__getitem__, scheme, shape), dense(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_any_scales_and_biases_are_read(bits: int, group: int, dtype: torch.dtype) -> None:
    stored, weight = of_others(bits, group, dtype)
    source = decode.Source(stored)
    assert source.schemes[NAME] == Scheme(bits=bits, group_size=group, symmetric=False)
    assert np.array_equal(source.decoded(NAME).numpy(), weight)
    assert torch.equal(source.read(f"{NAME}.weight"), torch.from_numpy(weight).bfloat16())
    assert source.specs["model.embed_tokens.weight"].shape == (10, 256) and "quantization" not in source.config
    assert "no multiples" in str(source.obstacle(NAME))
    with pytest.raises(CheckpointError, match="cannot be kept"):
        source.read_quantized(NAME)


def test_linears_may_differ_and_the_config_names_what_is_left_out() -> None:
    names = {f"model.layers.{index}.mlp.up_proj": Scheme(bits=8 if index == 1 else 4, group_size=64)
             for index in range(3)}
    said = MLX.config(names, ["model.layers.0.mlp.gate_proj", "lm_head"])
    assert said == {"group_size": 64, "bits": 4, "mode": "affine", "symmetric": True,
                    "model.layers.1.mlp.up_proj": {"group_size": 64, "bits": 8, "mode": "affine"},
                    "model.embed_tokens": False, "model.layers.0.mlp.gate_proj": False, "lm_head": False}
    whole = formats.with_quantization({"model_type": "llama"}, MLX, said)
    assert whole["quantization"] == whole["quantization_config"] == said and formats.recognise(whole) is MLX
    specs = {spec.name: spec for name, scheme in names.items()
             for spec in MLX.layout(name, (32, 128), scheme, torch.bfloat16)}
    assert MLX.schemes(whole, specs) == {name: (scheme, (32, 128)) for name, scheme in names.items()}
    whole.pop("quantization_config")  # as older versions wrote it
    assert formats.recognise(whole) is MLX


def test_positions_are_told_under_the_names_that_mlx_lm_knows() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e5}
    assert MLX.adapted({"rope_parameters": plain}) == {"rope_parameters": plain, "rope_theta": 1e5}
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    assert MLX.adapted({"rope_parameters": scaled})["rope_scaling"] == scaled
    for config in ({"rope_theta": 1.0, "rope_parameters": plain}, {"rope_parameters": {"full_attention": plain}}, {}):
        assert MLX.adapted(config) == config
    assert MLX.adapted({"num_local_experts": 8}) == {"num_local_experts": 8, "num_experts": 8}


@pytest.mark.parametrize(("scheme", "message"), [
    (Scheme(group_size=-1), "32, 64 or 128.*nearest: --group-size 128"), (Scheme(group_size=16), "--group-size 32"),
    (Scheme(bits=7), "nearest: 6 or 8"), (Scheme(grid="nf4", group_size=64), "weight-only integers"),
    (Scheme(bits=8, group_size=-1, activations="token"), "weight-only"),
])
def test_what_mlx_does_not_have_is_refused(scheme: Scheme, message: str) -> None:
    import re

    assert re.search(message, str(MLX.check(scheme, NAME, (64, 256))))


@pytest.mark.parametrize(("block", "kinds"), [("mlp", ("gate_proj", "up_proj", "down_proj")),
                                              ("block_sparse_moe", ("w1", "w3", "w2"))])
def test_experts_lie_in_one_tensor_as_mlx_lm_calls_it(block: str, kinds: tuple[str, ...]) -> None:
    there, scheme = f"model.layers.7.{block}", Scheme(group_size=32)
    for ours, theirs in zip(kinds, ("gate_proj", "up_proj", "down_proj"), strict=True):
        experts = [f"{there}.experts.{number}.{ours}" for number in range(11)]
        assert all(MLX.check(scheme, one, (16, 64)) is None for one in experts)
        laid = [MLX.layout(one, (16, 64), scheme, torch.bfloat16) for one in experts]
        for place, suffix in enumerate(MLX.SUFFIXES):
            stack = f"{there}.switch_mlp.{theirs}.{suffix}"
            assert [one[place].stack for one in laid] == [(stack, number) for number in range(11)]
            whole = TensorSpec(stack, laid[0][place].dtype, (11, *laid[0][place].shape))
            assert MLX.members(whole) == [f"{one}.{suffix}" for one in experts]
        dense = TensorSpec(f"{experts[3]}.weight", torch.bfloat16, (16, 64))
        assert MLX.stacked(dense).stack == (f"{there}.switch_mlp.{theirs}.weight", 3)
        said = MLX.config({NAME: Scheme(bits=8, group_size=64), **dict.fromkeys(experts, scheme)}, [])
        assert said["bits"] == 4 and said[NAME]["bits"] == 8
        said = MLX.config({NAME: scheme}, experts)
        assert said[f"{there}.switch_mlp.{theirs}"] is False and not [name for name in said if ".experts." in name]


def test_what_is_no_expert_of_mlx_lm_stays_alone_or_is_refused() -> None:
    for shape in ((3, 4), (3, 4, 5, 6), (1 << 40, 2, 4)):
        assert MLX.members(TensorSpec("model.layers.0.mlp.switch_mlp.up_proj.weight", torch.uint8, shape)) == []
    assert MLX.members(TensorSpec("model.layers.0.mlp.up_proj.weight", torch.uint8, (3, 4, 5))) == []
    alone = TensorSpec("model.layers.0.mlp.gate.weight", torch.bfloat16, (3, 4))
    assert MLX.stacked(alone) is alone
    for name in ("mlp.experts.0.wide", "feed_forward.experts.0.w1", "mlp.experts.0.w1"):
        assert "a rule that skips experts" in str(MLX.check(Scheme(group_size=32), f"layers.0.{name}", (16, 64)))
    expert = "model.layers.0.mlp.experts.0.up_proj"
    assert "experts of dots1" in str(MLX.check_model("dots1", [NAME, expert]))
    assert MLX.check_model("dots1", [NAME]) is None and MLX.check_model("qwen3_moe", [expert]) is None


@pytest.mark.parametrize("family", [*families.EXPERT_LINEARS, "qwen3_moe", "dots1"])
def test_what_is_stacked_is_found_again_under_its_name(family: str) -> None:
    """Or it is refused before anything is written."""
    for kind in families.expert_linears(family):
        block = "feed_forward" if family == "lfm2_moe" else "mlp"
        name = families.checkpoint_name(family, f"model.layers.3.{block}.experts.5.{kind}.weight")
        spec = MLX.stacked(TensorSpec(name, torch.bfloat16, (4, 32)))
        refused = MLX.check(Scheme(group_size=32), name.removesuffix(".weight"), (4, 32)) is not None
        assert refused == (spec.stack is None)
        if not refused:
            assert MLX.members(TensorSpec(spec.stored, spec.dtype, (8, *spec.shape)))[5] == name


def test_experts_of_a_kind_have_one_scheme() -> None:
    names, scheme = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(4)], Scheme(group_size=32)
    other = dict.fromkeys(names[:2], scheme)
    assert MLX.check_together(dict.fromkeys(names, scheme)) is None
    assert MLX.check_together({NAME: Scheme(bits=8), **dict.fromkeys(names, scheme)}, ["lm_head"]) is None
    assert "experts.0.up_proj is int4-g32, but" in str(MLX.check_together(
        {**other, **dict.fromkeys(names[2:], Scheme(bits=8, group_size=32))}))
    assert f"{names[2]} unquantized; use a rule" in str(MLX.check_together(other, names[2:]))


@pytest.mark.parametrize("value", [1 / 3, float("inf"), 1e-39])
def test_a_scale_that_mlx_would_round_is_refused(value: float) -> None:
    tensor = random_tensor(4, 64, Scheme(group_size=32), torch.float32)
    tensor.scale[:] = 1.0
    tensor.scale[3, 1] = value
    with pytest.raises(NumericalError, match="up_proj|q_proj"):
        MLX.pack(NAME, tensor)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c, t: c.update(bits=8), "no matrix of 8 bits"), (lambda c, t: c.update(mode="mxfp4"), "mxfp4"),
    (lambda c, t: t.pop(f"{NAME}.biases"), "without biases"), (lambda c, t: c.update(group_size=48), "in groups of 48"),
    (lambda c, t: t.pop(f"{NAME}.weight"), "is missing"), (lambda c, t: c.update({NAME: {"bits": "x"}}), "bits='x'"),
    (lambda c, t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].view(torch.int32)}), "expected uint32"),
])
def test_damaged_checkpoints_are_refused_by_name(change: Any, message: str) -> None:
    stored, _ = of_others(4, 64, torch.float16)
    change(stored.config["quantization_config"], stored.tensors)
    with pytest.raises(CheckpointError, match=message):
        decode.Source(stored).read(f"{NAME}.weight")
