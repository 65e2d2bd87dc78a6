"""Every pair of formats: what both can hold goes over bit for bit and comes back; everything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, export, formats, manifest, requantize
from qtool.console import Silent
from qtool.errors import InputError, RecipeError
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE
from tests import tiny
from tests.loaders.checkpoints import Case, build

CT = "compressed-tensors"
INTEGERS = (CT, "gptq", "mlx")
FP8 = Scheme(grid="fp8", bits=8, group_size=-1)
BLOCK = {"group_size": 128, "strategy": "block", "activations": "group"}
# scheme: the formats that hold it
HELD = {
    "int2": (Scheme(bits=2, group_size=64), INTEGERS),
    "uint2": (Scheme(bits=2, group_size=32, symmetric=False), INTEGERS),
    "int3": (Scheme(bits=3, group_size=128), INTEGERS), "uint3": (Scheme(bits=3, symmetric=False), INTEGERS),
    "int4": (Scheme(bits=4, group_size=64), (*INTEGERS, "awq")),
    "uint4": (Scheme(bits=4, group_size=32, symmetric=False), (*INTEGERS, "awq")),
    "int4-g16": (Scheme(bits=4, group_size=16), (CT, "gptq", "awq")),
    "int4-channel": (Scheme(bits=4, group_size=-1), (CT, "gptq", "awq")),
    "int6": (Scheme(bits=6, group_size=64), ("mlx",)), "int8": (Scheme(bits=8, group_size=32), INTEGERS),
    "uint8": (Scheme(bits=8, group_size=128, symmetric=False), INTEGERS),
    "w8a8": (Scheme(bits=8, group_size=-1, activations="token"), (CT,)),
    "fp8": (FP8, (CT,)), "mxfp4": (Scheme(grid="mxfp4", group_size=32), (CT,)),
    "fp8-static": (FP8.model_copy(update={"strategy": "tensor", "activations": "tensor"}), (CT, "modelopt")),
    "fp8-block": (FP8.model_copy(update=BLOCK), (CT, "fp8")),
    "nvfp4": (Scheme(grid="nvfp4", group_size=16), (CT, "modelopt")),
    "nf4": (Scheme(grid="nf4", group_size=64), ("bitsandbytes",)),
    "nf4-dq": (Scheme(grid="nf4", group_size=64, double_quant=True), ("bitsandbytes",)),
    "llm-int8": (Scheme(grid="vectorwise-int8", bits=8, group_size=-1, activations="outliers"), ("bitsandbytes",)),
}
TARGETS = [name for name in formats.names() if name != "hf"]
PAIRS = [(name, source, target) for name, (_, held) in HELD.items() for source in held for target in TARGETS
         if source != target and (target in held or source == held[0])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model, whose scales all formats keep in types that hold each other's, or in float32."""
    folder = tmp_path_factory.mktemp("conversions")
    tiny.make(folder / "model", "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=64,
              num_attention_heads=2)
    tiny.in_float16(folder / "model")
    return folder


def source_of(folder: Path, name: str, format_name: str) -> decode.Source:
    path = folder / f"{name}-{format_name}"
    if not path.exists():
        build(Case(path.name, format_name, HELD[name][0]), folder, folder / "model")
    return decode.open_model(str(path))


@pytest.mark.parametrize(("name", "source_format", "target"), PAIRS)
def test_pair(name: str, source_format: str, target: str, folder: Path, tmp_path: Path) -> None:
    source, (scheme, held) = source_of(folder, name, source_format), HELD[name]
    if target not in held:
        with pytest.raises(InputError, match="--requantize"):
            export.make_export(source, target, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    result = export.run(export.make_export(source, target, tmp_path / "out"))
    assert result["lossless"] and result["format"] == target and "bit for bit" in result["checked"]
    exported = decode.open_model(str(tmp_path / "out"))
    assert exported.schemes == source.schemes == dict.fromkeys(source.schemes, scheme) and len(source.schemes) == 7
    for linear in source.schemes:
        assert torch.equal(exported.decoded(linear), source.decoded(linear))
        if scheme.activations == "tensor":
            ours, theirs = (one.read_quantized(linear).extra[INPUT_SCALE] for one in (source, exported))
            assert torch.equal(ours.float(), theirs.float())
    for other in source.specs.keys() - {f"{linear}.weight" for linear in source.schemes}:
        assert torch.equal(exported.read(other), source.read(other))

    export.run(export.make_export(exported, source_format, tmp_path / "back"))
    back = decode.open_model(str(tmp_path / "back"))
    assert all(torch.equal(back.decoded(linear), source.decoded(linear)) for linear in source.schemes)


def test_keys_and_values_keep_their_scales(folder: Path, tmp_path: Path) -> None:
    """Between formats that have a place for them, both ways."""
    source_of(folder, "nvfp4", CT)
    path, module = folder / f"nvfp4-{CT}", formats.load(CT)
    tensors = load_file(path / "model.safetensors")
    attention = "model.layers.0.self_attn"
    for spec, value in zip(module.kv_scales(attention), (0.013, 0.4), strict=True):
        tensors[spec.name] = torch.full(spec.shape, value)
    (tmp_path / "kv").mkdir()
    save_file(tensors, tmp_path / "kv" / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = module.with_kv_cache(config["quantization_config"])
    (tmp_path / "kv" / "config.json").write_text(json.dumps(config))
    source = decode.open_model(str(tmp_path / "kv"))
    job = export.make_export(source, "modelopt", tmp_path / "out")
    assert job.lost == ()
    export.run(job)
    exported = decode.open_model(str(tmp_path / "out"))
    assert exported.cache_scales() == source.cache_scales() and exported.specs.keys() == source.specs.keys()
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["kv_cache_quant_algo"] == "FP8"
    export.run(export.make_export(exported, CT, tmp_path / "back"))
    assert decode.open_model(str(tmp_path / "back")).cache_scales() == source.cache_scales()


def test_a_global_scale_without_inverse_is_refused_both_ways(folder: Path, tmp_path: Path) -> None:
    for form, target, suffix in ((CT, "modelopt", "weight_global_scale"), ("modelopt", CT, "weight_scale_2")):
        source_of(folder, "nvfp4", form)
        tensors = load_file(folder / f"nvfp4-{form}" / "model.safetensors")
        name = f"model.layers.0.mlp.up_proj.{suffix}"
        tensors[name] = torch.full_like(tensors[name], 1.999999)
        path = tmp_path / form
        path.mkdir()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_bytes((folder / f"nvfp4-{form}" / "config.json").read_bytes())
        source = decode.open_model(str(path))
        assert source.read("model.layers.0.mlp.up_proj.weight").isfinite().all()
        with pytest.raises(InputError, match=r"mlp.up_proj.*1\.99999"):
            export.make_export(source, target, tmp_path / "out")


@pytest.mark.parametrize(("how", "to", "label"), [
    ("rtn", "mlx", "int4-g128"), ("uint3-g32", "gptq", "uint3-g32"), ("int8-channel", CT, "int8-channel"),
    ("nf4", "bitsandbytes", "nf4-g64")])
def test_what_does_not_fit_is_rounded_again_when_asked(how: str, to: str, label: str, folder: Path,
                                                       tmp_path: Path) -> None:
    source = source_of(folder, "mxfp4", CT)
    job = requantize.make(source, to, how, tmp_path / "out")
    result = requantize.run(job, Silent())
    assert not result["lossless"] and result["requantized"] == how and "not lossless" in result["checked"]
    exported = decode.open_model(str(tmp_path / "out"))
    assert {scheme.label for scheme in exported.schemes.values()} == {label}
    for linear in exported.schemes:
        weight = source.read(f"{linear}.weight").float()
        error = (exported.decoded(linear) - weight).square().sum() / weight.square().sum()
        assert 0 < error < (0.1 if "3" in how else 0.02)
    assert manifest.load(tmp_path / "out")["source"]["name"] == source.name


def test_what_requantize_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder, "mxfp4", CT)
    for how, to, error, message in (
            ("gptq", "mlx", InputError, "needs calibration text"), ("rtn", "hf", InputError, "leave --requantize out"),
            ("int9-g64", "mlx", RecipeError, "unknown method"), ("nf4", "mlx", InputError, "weight-only integers")):
        with pytest.raises(error, match=message):
            requantize.make(source, to, how, tmp_path / "out")
    with pytest.raises(InputError, match="is not quantized"):
        requantize.make(decode.open_model(str(folder / "model")), "mlx", "rtn")
