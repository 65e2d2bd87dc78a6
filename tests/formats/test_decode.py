"""Quantized checkpoints read as dense ones, including those that other programs wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool import formats, ops
from qtool.errors import CheckpointError, InputError
from qtool.recipe import Scheme
from tests.formats.cases import NAME, InMemory, dense, random_tensor

decode = pytest.importorskip("qtool.decode")


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def checkpoint(format_name: str, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> tuple[InMemory, torch.Tensor]:
    """One quantized linear with a bias, one embedding; and the dense weight."""
    module = formats.load(format_name)
    tensor = random_tensor(32, 128, scheme, module.scale_dtype(dtype))
    tensors = module.pack(NAME, tensor)
    tensors |= {f"{NAME}.bias": torch.ones(32, dtype=dtype), "model.embed_tokens.weight": torch.ones(8, 4, dtype=dtype)}
    config = {"model_type": "llama", "dtype": str(dtype).removeprefix("torch."),
              "quantization_config": module.config({NAME: scheme}, ["lm_head"])}
    return InMemory(tensors, config), dense(tensor)


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("scheme", [Scheme(bits=4, group_size=32), Scheme(bits=3, group_size=-1, symmetric=False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_source_looks_dense(format_name: str, scheme: Scheme, dtype: torch.dtype) -> None:
    stored, weight = checkpoint(format_name, scheme, dtype)
    source = decode.Source(stored)
    assert list(source.specs) == sorted(["model.embed_tokens.weight", f"{NAME}.bias", f"{NAME}.weight"])
    assert (source.specs[f"{NAME}.weight"].dtype, source.specs[f"{NAME}.weight"].shape) == (dtype, (32, 128))
    assert torch.equal(source.read(f"{NAME}.weight"), weight.to(dtype))
    assert torch.equal(source.read_rows(f"{NAME}.weight", 3, 7), weight.to(dtype)[3:7])
    assert torch.equal(source.read(f"{NAME}.bias"), stored.tensors[f"{NAME}.bias"])
    assert source.schemes == {NAME: scheme} and "quantization_config" not in source.config
    assert torch.equal(dense(source.read_quantized(NAME)), weight)
    assert source.weight_bytes() == sum(tensor.nbytes for tensor in stored.tensors.values())


def test_an_unquantized_checkpoint_passes_through() -> None:
    tensors = {"model.embed_tokens.weight": torch.rand(4, 8), f"{NAME}.weight": torch.rand(8, 8)}
    source = decode.Source(InMemory(tensors, {"model_type": "llama"}))
    assert source.format is None and source.schemes == {}
    assert source.specs == source.checkpoint.specs
    assert torch.equal(source.read(f"{NAME}.weight"), tensors[f"{NAME}.weight"])
    with pytest.raises(InputError, match="is not quantized"):
        source.read_quantized(NAME)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(CheckpointError, match="'quip'.*unquantized model"):
        decode.Source(InMemory({}, {"quantization_config": {"quant_method": "quip"}}))


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_columns_in_activation_order_decode_but_have_no_quantized_tensor(form: str) -> None:
    stored, weight = checkpoint("gptq", Scheme(bits=4, group_size=32, symmetric=form == "gptq"))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    stored.config["quantization_config"]["desc_act"] = True
    scheme = Scheme(group_size=32, symmetric=form == "gptq")
    codes = formats.load("gptq").unpack(NAME, stored.read, scheme, (32, 128)).codes
    stored.tensors[f"{NAME}.qweight"] = ops.pack_bits(codes[:, order].T, 4, transposed=True)
    stored.tensors[f"{NAME}.g_idx"] = stored.tensors[f"{NAME}.g_idx"][order]
    source = decode.Source(stored)
    assert torch.equal(source.read(f"{NAME}.weight"), weight[:, order].bfloat16())
    with pytest.raises(CheckpointError, match="activation order"):
        source.read_quantized(NAME)
    stored.tensors[f"{NAME}.g_idx"][5] = 4
    with pytest.raises(CheckpointError, match="outside the 4 groups"):
        source.read(f"{NAME}.weight")


def test_gptq_of_the_first_version_with_zero_points() -> None:
    stored, weight = checkpoint("gptq", Scheme(bits=4, group_size=32, symmetric=False))
    stored.config["quantization_config"]["checkpoint_format"] = "gptq"
    words = stored.tensors[f"{NAME}.qzeros"].numpy().view(np.uint32)
    fields = ((words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) - 1) & 15
    stored.tensors[f"{NAME}.qzeros"] = torch.from_numpy(
        (fields << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32).view(np.int32))
    assert torch.equal(decode.Source(stored).read(f"{NAME}.weight"), weight.bfloat16())


def test_gptq_settings_beside_the_config(tmp_path: Path) -> None:
    stored, weight = checkpoint("gptq", Scheme(bits=8, group_size=-1))
    settings = stored.config.pop("quantization_config")
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    stored.directory = tmp_path
    assert torch.equal(decode.Source(stored).read(f"{NAME}.weight"), weight.bfloat16())
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="quantize_config.json"):
        decode.Source(stored)


def test_gptq_rules_of_another_writer_are_followed() -> None:
    stored, weight = checkpoint("gptq", Scheme(bits=8, group_size=64))
    stored.config["quantization_config"] |= {"bits": 4, "group_size": 128, "dynamic": {
        r"-:.*down_proj": {}, r".*\.layers\.0\..*q_proj": {"bits": 8, "group_size": 64}, r"+:.*": {"bits": 2}}}
    source = decode.Source(stored)
    assert source.schemes[NAME] == Scheme(bits=8, group_size=64)
    assert torch.equal(source.read(f"{NAME}.weight"), weight.bfloat16())


@pytest.mark.parametrize("actorder", ["weight", "static"])
def test_columns_solved_in_another_order_are_stored_in_their_own(actorder: str) -> None:
    stored, weight = checkpoint("compressed-tensors", Scheme(bits=4, group_size=32, symmetric=False))
    stored.config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = actorder
    assert torch.equal(decode.Source(stored).read(f"{NAME}.weight"), weight.bfloat16())


def test_compressed_tensors_with_g_idx_decodes() -> None:
    stored, _ = checkpoint("compressed-tensors", Scheme(bits=4, group_size=32, symmetric=False))
    index = torch.arange(128, dtype=torch.int32) % 4
    stored.tensors[f"{NAME}.weight_g_idx"] = index
    source = decode.Source(stored)
    tensor = formats.load("compressed-tensors").unpack(NAME, stored.read, source.schemes[NAME], (32, 128))
    expected = (tensor.codes.float() - tensor.zero_point[:, index].float()) * tensor.scale[:, index].float()
    assert torch.equal(source.read(f"{NAME}.weight"), expected.bfloat16())
    assert f"{NAME}.weight_g_idx" not in source.specs
    with pytest.raises(CheckpointError, match="activation order"):
        source.read_quantized(NAME)


def test_three_bits_of_older_compressed_tensors() -> None:
    stored, weight = checkpoint("compressed-tensors", Scheme(bits=3, group_size=32))
    codes = formats.load("compressed-tensors").unpack(NAME, stored.read, Scheme(bits=3, group_size=32), (32, 128)).codes
    padded = torch.nn.functional.pad(codes, (0, 130 - 128)).view(32, 13, 10).long()
    stored.tensors[f"{NAME}.weight_packed"] = (padded << (3 * torch.arange(10))).sum(-1).int()
    assert torch.equal(decode.Source(stored).read(f"{NAME}.weight"), weight.bfloat16())


def test_one_scale_for_the_whole_tensor() -> None:
    stored, _ = checkpoint("compressed-tensors", Scheme(bits=8, group_size=-1))
    stored.config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    stored.tensors[f"{NAME}.weight_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)
    weight = decode.Source(stored).read(f"{NAME}.weight")
    assert weight.shape == (32, 128) and weight.abs().max() <= 64


@pytest.mark.parametrize(("change", "message"), [
    (lambda c, t: t.update({f"{NAME}.weight_shape": torch.tensor([32, 1 << 60])}), "cannot hold"),
    (lambda c, t: t.update({f"{NAME}.weight_shape": torch.tensor([31, 128])}), "has 32 rows"),
    (lambda c, t: t.pop(f"{NAME}.weight_scale"), "no weight_scale"),
    (lambda c, t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"][:, :2]}), r"weight_scale.*\[32, 4\]"),
    (lambda c, t: t.update({f"{NAME}.weight_packed": t[f"{NAME}.weight_packed"].long()}), "int64"),
    (lambda c, t: c["config_groups"]["group_0"]["weights"].update(num_bits=6), "6-bit"),
    (lambda c, t: c["config_groups"]["group_0"]["weights"].update(group_size="auto"), "not a number"),
    (lambda c, t: c["config_groups"]["group_0"]["weights"].update(type="float"), "pack-quantized"),
    (lambda c, t: c["config_groups"].clear(), "no config_groups"),
    (lambda c, t: c["config_groups"]["group_0"].update(targets=["re:("]), "regular expression"),
    (lambda c, t: c.update(format="int-quantized"), "int-quantized"),
])
def test_damaged_or_foreign_checkpoints_are_refused_by_name(change: Change, message: str) -> None:
    stored, _ = checkpoint("compressed-tensors", Scheme(bits=4, group_size=32))
    change(stored.config["quantization_config"], stored.tensors)
    with pytest.raises(CheckpointError, match=message):
        decode.Source(stored).read(f"{NAME}.weight")


@pytest.mark.parametrize(("change", "message"), [
    (lambda c, t: c.update(checkpoint_format="marlin"), "marlin"),
    (lambda c, t: c.update(bits=5), "5-bit"),
    (lambda c, t: c.update(bits=8), "qweight|qzeros|scales"),
    (lambda c, t: c.update(dynamic={"+:(": {"bits": 8}}), "regular expression"),
    (lambda c, t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:2]}), "qzeros"),
    (lambda c, t: t.pop(f"{NAME}.scales"), "scales"),
    (lambda c, t: t.pop(f"{NAME}.qweight"), "no tensor is called"),
])
def test_damaged_gptq_checkpoints_are_refused_by_name(change: Change, message: str) -> None:
    stored, _ = checkpoint("gptq", Scheme(bits=4, group_size=32))
    change(stored.config["quantization_config"], stored.tensors)
    with pytest.raises(CheckpointError, match=message):
        decode.Source(stored).read(f"{NAME}.weight")
