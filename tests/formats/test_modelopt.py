"""ModelOpt's layout against its description: keys, a decoder in plain numpy, and compressed-tensors' scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import decode, formats, found
from qtool.errors import CheckpointError, PlanError
from qtool.grids import nvfp4
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE, QuantizedTensor
from tests.formats.cases import NAME, InMemory

MO, CT = formats.load("modelopt"), formats.load("compressed-tensors")
FP8 = Scheme(grid="fp8", bits=8, group_size=-1, strategy="tensor", activations="tensor")
NVFP4 = Scheme(grid="nvfp4", group_size=16)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
SHAPE = (48, 160)


def e4m3(bits: np.ndarray) -> np.ndarray:
    """float32 of the bytes of E4M3, from its definition."""
    sign, exponent, mantissa = bits >> 7, (bits >> 3 & 15).astype(int), (bits & 7).astype(np.float32)
    value = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0), mantissa / 8 * 2.0**-6)
    return np.where(sign == 1, -value, value).astype(np.float32)


def answer(scheme: Scheme, seed: int = 0) -> QuantizedTensor:
    weight = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.05
    grid = found.load("grids", scheme.grid)
    tensor = grid.encode(weight, grid.fit(weight, scheme, torch.float32))
    return replace(tensor, extra={**tensor.extra, INPUT_SCALE: torch.tensor([0.0123])}) if scheme == FP8 else tensor


@pytest.mark.parametrize("scheme", [FP8, NVFP4], ids=["fp8", "nvfp4"])
def test_a_decoder_from_the_description_reads_the_same(scheme: Scheme) -> None:
    tensor = answer(scheme)
    packed = MO.pack(NAME, tensor, torch.bfloat16)
    announced = {spec.name: (spec.dtype, spec.shape) for spec in MO.layout(NAME, SHAPE, scheme, torch.bfloat16)}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in packed.items()} == announced
    weight, scale = (packed[f"{NAME}.{one}"].view(torch.uint8) if packed[f"{NAME}.{one}"].dtype != torch.float32
                     else packed[f"{NAME}.{one}"] for one in ("weight", "weight_scale"))
    if scheme == FP8:
        decoded = e4m3(weight.numpy()) * scale.numpy()
        assert packed[f"{NAME}.input_scale"].shape == () and packed[f"{NAME}.input_scale"] == torch.tensor(0.0123)
    else:
        nibbles = np.stack([weight.numpy() & 15, weight.numpy() >> 4], -1).reshape(SHAPE)
        values = np.where(nibbles & 8, -FP4[nibbles & 7], FP4[nibbles & 7])
        effective = e4m3(scale.numpy()) * packed[f"{NAME}.weight_scale_2"].numpy()
        decoded = values * effective.repeat(16, 1)
    ours = found.load("grids", scheme.grid).decode(tensor)
    assert np.array_equal(decoded, ours.numpy())
    assert torch.equal(MO.dequantize(NAME, packed.__getitem__, scheme, SHAPE), ours)
    again = MO.unpack(NAME, packed.__getitem__, scheme, SHAPE)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.scale, tensor.scale)


@pytest.mark.parametrize(("scheme", "algorithm"), [(FP8, "FP8"), (NVFP4, "W4A16_NVFP4")], ids=["fp8", "nvfp4"])
def test_the_documented_keys_are_there(scheme: Scheme, algorithm: str) -> None:
    """Those that vLLM's modelopt.py reads of each file, and of NVFP4 requires."""
    said = MO.with_kv_cache(MO.config({NAME: scheme}, ["model.layers.0.mlp.up_proj", "lm_head"]))
    ignored = ["model.layers.0.mlp.up_proj", "lm_head"]
    assert (said["quant_method"], said["quant_algo"], said["ignore"]) == ("modelopt", algorithm, ignored)
    assert said["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert said.keys() == {"quant_method", "quant_algo", "ignore", "kv_cache_scheme", "producer", "config_groups",
                           *(["group_size"] if scheme == NVFP4 else [])}
    group = said["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["weights"]["num_bits"] == scheme.bits
    assert (group["input_activations"] is None) == (scheme == NVFP4)
    beside = MO.extra_files(said)["hf_quant_config.json"]
    assert beside.keys() == {"producer", "quantization"} and beside["producer"].keys() == {"name", "version"}
    assert beside["quantization"] == {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ignored,
                                      "group_size": 16 if scheme == NVFP4 else None}
    assert MO.extra_files(MO.config({NAME: scheme}, []))["hf_quant_config.json"]["quantization"][
        "kv_cache_quant_algo"] is None
    with pytest.raises(PlanError, match="one quant_algo"):
        MO.config({NAME: FP8, "other": NVFP4}, [])


def test_settings_beside_the_config(tmp_path: Any) -> None:
    """Older exports have hf_quant_config.json only."""
    import json

    tensors = MO.pack(NAME, answer(NVFP4))
    beside = MO.extra_files(MO.config({NAME: NVFP4}, []))["hf_quant_config.json"]
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    source = decode.Source(InMemory(tensors, {"dtype": "bfloat16"}, tmp_path))
    assert source.format is MO and source.schemes == {NAME: NVFP4} and list(source.specs) == [f"{NAME}.weight"]


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_a_divisor_and_its_multiplier_mean_the_same_scales(value: float) -> None:
    """Over every local scale; what has a partner is its partner's partner; a fitted divisor always has one."""
    given_, local = torch.tensor([value]), nvfp4.LOCALS
    inverse = nvfp4.multiplier(given_)
    if inverse is not None:
        assert torch.equal(local * inverse, local / given_)
        back = nvfp4.divisor(inverse)
        assert back is not None and torch.equal(local / back, local / given_)
    near = nvfp4.invertible(given_)
    assert 0.99 < float(near / given_) <= 1 and nvfp4.multiplier(near) is not None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_compressed_tensors_and_modelopt_hold_the_same(seed: int) -> None:
    tensor = answer(NVFP4, seed)
    ours, theirs = CT.pack(NAME, tensor), MO.pack(NAME, tensor)
    assert torch.equal(ours[f"{NAME}.weight_packed"], theirs[f"{NAME}.weight"])
    assert torch.equal(ours[f"{NAME}.weight_scale"].float(), theirs[f"{NAME}.weight_scale"].float())
    assert torch.equal(CT.dequantize(NAME, ours.__getitem__, NVFP4, SHAPE, {}),
                       MO.dequantize(NAME, theirs.__getitem__, NVFP4, SHAPE))


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.update({f"{NAME}.weight_scale_2": torch.tensor(-1.0)}), "not a positive number"),
    (lambda t: t.update({f"{NAME}.weight_scale_2": torch.tensor(1.0).double()}), "expected float32"),
    (lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:, 1:]}), "weight-only NVFP4"),
    (lambda t: t.pop(f"{NAME}.weight_scale"), "no tensor is called"),
])
def test_damaged_checkpoints_are_refused_by_name(change: Any, message: str) -> None:
    tensors = MO.pack(NAME, answer(NVFP4))
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        decode.Source(InMemory(tensors, {"quantization_config": MO.config({NAME: NVFP4}, [])})).read(f"{NAME}.weight")
