"""Calibrated scales of activations: static inputs, cached keys and values; and scales over several linears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import activations, decode, evaluate, export, inspect
from qtool.errors import CheckpointError, PlanError
from qtool.models import kv
from qtool.recipe import Scheme
from tests import tiny
from tests.test_pipeline import contents, quantize

INT8 = Scheme(bits=8, group_size=-1, activations="tensor")
FP8 = Scheme(grid="fp8", bits=8, group_size=-1, activations="tensor")
STATIC: dict[str, Any] = {"scheme__activations": "tensor", "scheme__group_size": -1}


def loaded(model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def seen(model: torch.nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    """The input of one linear on some tokens."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    with torch.inference_mode():
        model(ids)
    handle.remove()
    return found[0]


def test_a_static_scale() -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert float(activations.static_scale(x.abs(), x, FP8, torch.float32)) == pytest.approx(float(x.abs().max()) / 448)
    scale = activations.static_scale(x.abs(), x, INT8, torch.float32)
    assert 0 < float(scale) <= float(x.abs().max()) / 127.5

    def error(one: torch.Tensor) -> float:
        codes = (x / one).round().clamp(-128, 127)
        return float((codes * one - x).square().sum())

    assert error(scale) <= error(x.abs().max() / 127.5)
    x[0, 0] = 1000  # one value that carries most of the energy is not cut off
    assert float(activations.static_scale(x.abs(), x, INT8, torch.float32)) == pytest.approx(1000 / 127.5, rel=0.06)
    assert torch.isfinite(activations.static_scale(torch.zeros(3), torch.zeros(2, 3), INT8, torch.float16)).all()


@pytest.mark.parametrize(("scheme", "group"), [
    (Scheme(grid="fp8", bits=8, group_size=128, strategy="block", activations="group"), 128),
    (Scheme(grid="fp8", bits=8, group_size=-1, activations="token"), 256),
    (Scheme(bits=8, group_size=-1, activations="token"), 256)])
def test_inputs_are_rounded_by_token_or_group(scheme: Scheme, group: int) -> None:
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1))
    x[..., :128] *= 50
    rounded = activations.round_inputs(x, scheme).reshape(-1, group)
    for row, source in zip(rounded, x.reshape(-1, group), strict=True):
        top = 127.5 if scheme.grid == "affine" else 448.0
        scaled = source / (source.abs().max() / top)
        codes = scaled.round().clamp(-128, 127) if scheme.grid == "affine" else scaled.to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(row, codes * (source.abs().max() / top))


@pytest.mark.parametrize(("method", "settings"), [
    ("fp8-static", {}), ("w8a8", STATIC), ("smoothquant", STATIC)])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_static_inputs(method: str, settings: dict[str, Any], family: str, tmp_path: Path) -> None:
    """Linears that share their input share its scale, which covers what the calibration text gives; eval uses it."""
    if family == "qwen3_moe" and method == "smoothquant":
        pytest.skip("its experts have no one source to scale")
    model = tiny.make(tmp_path / "model", family)
    if method == "fp8-static":
        settings = {"scheme__group_size": -1}
    quantize(model, tmp_path / "out", method, **settings)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = decode.open_model(str(tmp_path / "out"))
    assert {scheme.activations for scheme in source.schemes.values()} == {"tensor"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("tensor", False)
    q, k, v = (stored[f"model.layers.1.self_attn.{name}_proj.input_scale"] for name in "qkv")
    assert q.shape == (1,) and q.dtype == torch.bfloat16 and torch.equal(q, k) and torch.equal(k, v)
    if method == "fp8-static":
        weights = {float(stored[f"model.layers.1.self_attn.{name}_proj.weight_scale"]) for name in "qkv"}
        assert len(weights) == 1
        x = seen(loaded(model), "model.layers.0.self_attn.o_proj", torch.randint(0, 500, (4, 32)))
        scale = float(stored["model.layers.0.self_attn.o_proj.input_scale"])
        assert 0.3 < scale * 448 / float(x.abs().max()) < 3
    if family == "qwen3_moe":
        scales = {float(value) for key, value in stored.items() if key.endswith(".up_proj.input_scale")
                  and ".layers.0." in key}
        assert len(scales) == 1
    assert not inspect.verify(source, [])
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    figures = evaluate.evaluate([source], decode.open_model(str(model)), str(text), windows=2, context=16)["models"][0]
    assert 0 < figures["kl"]["mean"] < 0.1


@pytest.mark.parametrize(("method", "family"), [("gptq", "llama"), ("rtn", "qwen3"), ("rtn", "gemma3"),
                                                ("rtn", "phi3")])
def test_scales_of_cached_keys_and_values(method: str, family: str, tmp_path: Path) -> None:
    """They are those of what transformers really caches; the weights are as without them."""
    from transformers import DynamicCache

    model = tiny.make(tmp_path / "model", family)
    ids = torch.arange(24).reshape(1, 24) * 7 % 500 + 2
    out = quantize(model, tmp_path / "out", method, kv_cache="fp8", calibration__samples=40, scheme__group_size=16)
    plain = quantize(model, tmp_path / "plain", method, calibration__samples=40, scheme__group_size=16)
    assert [layer["weight_error"] for layer in out["layers"]] == [layer["weight_error"] for layer in plain["layers"]]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    network = loaded(model)
    cache = DynamicCache()
    with torch.inference_mode():
        network(ids, past_key_values=cache)
    for index in range(network.config.num_hidden_layers):
        for name, tensor in (("k", cache.layers[index].keys), ("v", cache.layers[index].values)):
            scale = stored[f"model.layers.{index}.self_attn.{name}_scale"]
            assert scale.shape == (1,) and scale.dtype == torch.float32
            assert 0.5 < float(scale) * 448 / float(tensor.abs().max()) < 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8 and config["kv_cache_scheme"]["type"] == "float"
    source = decode.open_model(str(tmp_path / "out"))
    assert set(source.specs) == set(decode.open_model(str(model)).specs)
    assert not inspect.verify(source, [])
    assert inspect.summary(source)["kv_cache"] == "fp8"
    assert inspect.summary(decode.open_model(str(tmp_path / "plain")))["kv_cache"] is None
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    with_cache, without = (evaluate.evaluate([decode.open_model(str(tmp_path / name))], None, str(text), windows=2,
                                             context=16)["models"][0]["nll"] for name in ("out", "plain"))
    assert 0 < abs(with_cache - without) < 0.05  # eval rounds keys and values too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cache_in_fp8_gives_back_the_type_that_it_got(dtype: torch.dtype) -> None:
    """Attention multiplies keys with queries, which stay in the model's dtype."""
    attention = torch.nn.Linear(4, 4)
    seen: list[torch.Tensor] = []

    def forward(past_key_values: Any) -> None:
        seen.extend(past_key_values.update(keys, -keys, 0))

    attention.forward = forward  # type: ignore[method-assign]
    keys = torch.linspace(-3, 3, 64).to(dtype)
    scale = torch.tensor([2.0 / 448])  # cuts off what is larger than 2
    kv.round_cache(torch.nn.ModuleDict({"attention": attention}), {"attention": (scale, scale)})
    attention(past_key_values=None)
    wanted = ((keys.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(dtype)
    assert seen[0].dtype == seen[1].dtype == dtype
    assert torch.equal(seen[0], wanted) and torch.equal(seen[1], -wanted)


def test_damaged_cache_scales_are_named(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    quantize(model, tmp_path / "out", "rtn", kv_cache="fp8")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"] = torch.tensor([float("nan")])
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn: k_scale and v_scale"):
        decode.open_model(str(tmp_path / "out")).cache_scales()


def test_ranges_are_the_same_twice(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    for out in ("a", "b"):
        quantize(model, tmp_path / out, "fp8-static", scheme__group_size=-1, kv_cache="fp8")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_blocks_of_fp8(tmp_path: Path) -> None:
    """DeepSeek's layout of a model whose sides are multiples of 128, GPTQ on it too; other sizes are refused."""
    model = tiny.make(tmp_path / "model", "llama", hidden_size=128, intermediate_size=256, num_attention_heads=4,
                      num_key_value_heads=4, head_dim=32)
    original = decode.open_model(str(model))
    for form in ("fp8", "compressed-tensors"):
        for steps in ([{"rtn": {}}], [{"gptq": {}}, {"refine": {}}]):
            out = tmp_path / f"{form}{len(steps)}"
            quantize(model, out, "fp8-block", scheme__group_size=128, format=form, steps=steps)
            source = decode.open_model(str(out))
            assert {scheme.label for scheme in source.schemes.values()} == {"fp8-block-dynamic"}
            for name in source.schemes:
                weight = original.read(name + ".weight").float()
                off = (source.read(name + ".weight").float() - weight).norm() / weight.norm()
                assert off < (0.03 if len(steps) == 1 else 0.1)
            assert not inspect.verify(source, [])
    stored = load_file(tmp_path / "fp81" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    wide = stored[f"{name}.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    dense = decode.open_model(str(tmp_path / "fp81")).read(f"{name}.weight")
    assert torch.equal((stored[f"{name}.weight"].float() * wide).bfloat16(), dense)
    with pytest.raises(PlanError, match="multiples of 128.*--method fp8"):
        quantize(tiny.make(tmp_path / "small", "llama", hidden_size=128, intermediate_size=256), tmp_path / "x",
                 "fp8-block", scheme__group_size=128)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nvfp4_shares_its_global_scale_within_fused_linears(method: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    quantize(model, tmp_path / "out", "nvfp4", scheme__group_size=16, steps=[{method: {}}])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: float(stored[f"model.layers.0.{name}.weight_global_scale"])
              for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj",
                           "mlp.down_proj")}
    values = list(scales.values())
    assert values[0] == values[1] == values[2] and values[3] == values[4] and len(set(values)) == 3


@pytest.mark.parametrize(("settings", "words"), [
    ({"kv_cache": "fp8", "format": "gptq"}, "format gptq has no place for kv_cache scales"),
    ({"scheme.activations": "token", "format": "gptq"}, "holds weights only"),
    ({"scheme.activations": "tensor"}, "--bits 8 --group-size -1"),
])
def test_plans_that_cannot_be(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match=words):
        quantize(model, tmp_path / "out", "gptq", **{key.replace(".", "__"): value for key, value in settings.items()})


def test_an_export_tells_that_it_loses_the_scales_of_a_cache(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    for name, kind in (("with", "fp8"), ("without", None)):
        quantize(model, tmp_path / name, "rtn", kv_cache=kind)
        job = export.make_export(decode.open_model(str(tmp_path / name)), "gptq", tmp_path / f"{name}-gptq")
        assert [("k_scale" in text) for text in job.lost] == ([True] if kind else [])
        export.run(job)
        assert not [key for key in load_file(tmp_path / f"{name}-gptq" / "model.safetensors") if key.endswith("_scale")]
