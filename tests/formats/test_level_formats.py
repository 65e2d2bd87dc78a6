"""FP8, FP4, NF4 and W8A8 on disk: what is announced is written, comes back, and is what other people's code reads."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import formats, found
from qtool.activations import mixed_product
from qtool.errors import CheckpointError
from qtool.recipe import Scheme
from tests.formats.cases import NAME, InMemory

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CT, BNB = "compressed-tensors", "bitsandbytes"
SCHEMES = {
    "fp8": (CT, Scheme(grid="fp8", bits=8, group_size=-1)),
    "fp8-dynamic": (CT, Scheme(grid="fp8", bits=8, group_size=-1, activations="token")),
    "fp8-tensor": (CT, Scheme(grid="fp8", bits=8, group_size=-1, strategy="tensor", activations="token")),
    "fp8-block": (CT, Scheme(grid="fp8", bits=8, group_size=128, strategy="block", activations="group")),
    "deepseek": ("fp8", Scheme(grid="fp8", bits=8, group_size=128, strategy="block", activations="group")),
    "w8a8": (CT, Scheme(bits=8, group_size=-1, activations="token")),
    "mxfp4": (CT, Scheme(grid="mxfp4", group_size=32)), "nvfp4": (CT, Scheme(grid="nvfp4", group_size=16)),
    "nf4": (BNB, Scheme(grid="nf4", group_size=64)), "fp4": (BNB, Scheme(grid="fp4", group_size=32)),
    "llm-int8": (BNB, Scheme(grid="vectorwise-int8", bits=8, group_size=-1, activations="outliers")),
    "nf4-dq": (BNB, Scheme(grid="nf4", group_size=64, double_quant=True)),
}


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def answer(scheme: Scheme, weight: torch.Tensor, format_name: str) -> Any:
    grid = found.load("grids", scheme.grid)
    dtype = formats.load(format_name).scale_dtype(weight.dtype)
    return grid.encode(weight.float(), grid.fit(weight.float(), scheme, dtype))


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 40), st.integers(1, 4), st.sampled_from(DTYPES),
       st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(name: str, rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    format_name, scheme = SCHEMES[name]
    module, shape = formats.load(format_name), (rows, groups * 64)
    if scheme.strategy == "block":
        shape = (128 * (1 + rows % 3), groups * 128)
    assert module.check(scheme, NAME, shape) is None
    tensor = answer(scheme, weights(*shape, dtype, seed), format_name)
    packed = module.pack(NAME, tensor, dtype)
    announced = {spec.name: (spec.dtype, spec.shape) for spec in module.layout(NAME, shape, scheme, dtype)}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in packed.items()} == announced
    again = module.unpack(NAME, packed.__getitem__, scheme, shape)
    assert torch.equal(again.codes, tensor.codes)
    grid = found.load("grids", scheme.grid)
    assert torch.equal(grid.decode(again), grid.decode(tensor))
    assert torch.equal(module.dequantize(NAME, packed.__getitem__, scheme, shape), grid.decode(tensor))

    config = {"quantization_config": module.config({NAME: scheme}, ["lm_head"], ["rtn"])}
    specs = {spec.name: spec for spec in module.layout(NAME, shape, scheme, dtype)}
    assert formats.recognise(config) is module
    assert module.schemes(config, specs, packed.__getitem__) == {NAME: (scheme, shape)}


LIBRARY = {"fp8": ("naive_quantized.base", "NaiveQuantizationCompressor"),
           "fp8-tensor": ("naive_quantized.base", "NaiveQuantizationCompressor"),
           "fp8-block": ("naive_quantized.base", "NaiveQuantizationCompressor"),
           "w8a8": ("naive_quantized.base", "NaiveQuantizationCompressor"),
           "nvfp4": ("nvfp4.base", "NVFP4PackedCompressor"), "mxfp4": ("mxfp4.base", "MXFP4PackedCompressor")}


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_compressed_tensors_decompresses_the_same_values(name: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    file, cls = LIBRARY[name]
    compressor = getattr(importlib.import_module(f"compressed_tensors.compressors.{file}"), cls)
    _, scheme = SCHEMES[name]
    weight = weights(256, 384, torch.bfloat16)
    tensor = answer(scheme, weight, CT)
    module = formats.load(CT)
    state = {key.removeprefix(f"{NAME}."): value for key, value in module.pack(NAME, tensor).items()}
    group = quantization.QuantizationScheme(**module.config({NAME: scheme}, [])["config_groups"]["group_0"])
    decoded = compressor.decompress(state, group)["weight"]
    ours = found.load("grids", scheme.grid).decode(tensor)
    torch.testing.assert_close(decoded.float(), ours.to(decoded.dtype).float(), rtol=8e-3, atol=0)
    assert (ours - weight.float()).norm() / weight.float().norm() < 0.2


def test_the_library_accepts_a_config_of_several_forms() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    schemes = {f"model.layers.0.{name}_proj": scheme for name, (form, scheme) in SCHEMES.items() if form == CT}
    config = formats.load(CT).config({**schemes, "model.layers.0.up_proj": Scheme()}, ["lm_head"])
    assert config["format"] == "mixed-precision"
    assert len(quantization.QuantizationConfig.model_validate(config).config_groups) == len(schemes) + 1


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-dq"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_makes_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    _, scheme = SCHEMES[name]
    weight = weights(96, 512, dtype)
    weight[5, :128] = 0
    codes, state = functional.quantize_4bit(weight, blocksize=scheme.group_size, quant_type=scheme.grid,
                                            compress_statistics=scheme.double_quant)
    theirs = {f"{NAME}.weight": codes, **{f"{NAME}.weight.{key}": value
                                          for key, value in state.as_dict(packed=True).items()}}
    ours = formats.load(BNB).pack(NAME, answer(scheme, weight, BNB), dtype)
    assert sorted(theirs) == sorted(ours)
    for key, value in theirs.items():
        mine = ours[key]
        if ".quant_state." in key and scheme.double_quant:  # filled up with blanks
            assert bytes(mine.tolist()).decode().rstrip() == bytes(value.tolist()).decode()
            continue
        assert mine.dtype == value.dtype and torch.equal(mine, value), key
    back = functional.dequantize_4bit(codes, state)
    decoded = formats.load(BNB).dequantize(NAME, ours.__getitem__, scheme, (96, 512))
    torch.testing.assert_close(decoded.to(dtype).float(), back.float(), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize(("change", "words"), [
    (lambda tensors, key: tensors.__setitem__(key, torch.full((9,), 255, dtype=torch.uint8)), "no valid description"),
    (lambda tensors, key: tensors.__setitem__(key, torch.zeros(5000, dtype=torch.uint8)), "5000 bytes"),
    (lambda tensors, key: tensors.pop(key), "no linear has a quant_state"),
])
def test_damaged_bitsandbytes_files(change: Any, words: str) -> None:
    module, (_, scheme) = formats.load(BNB), SCHEMES["nf4"]
    tensors = module.pack(NAME, answer(scheme, weights(4, 64, torch.bfloat16), BNB), torch.bfloat16)
    change(tensors, next(key for key in tensors if "quant_state" in key))
    config = {"quantization_config": module.config({NAME: scheme}, [], ["rtn"])}
    with pytest.raises(CheckpointError, match=words):
        module.schemes(config, InMemory(tensors).specs, tensors.__getitem__)


def test_a_nan_in_fp8_is_named() -> None:
    _, scheme = SCHEMES["fp8"]
    module = formats.load(CT)
    tensors = module.pack(NAME, answer(scheme, weights(4, 64, torch.bfloat16), CT))
    tensors[f"{NAME}.weight"].view(torch.uint8)[1, 1] = 0x7F
    with pytest.raises(CheckpointError, match="NaN"):
        module.unpack(NAME, tensors.__getitem__, scheme, (4, 64))


@pytest.mark.parametrize(("name", "scheme", "words"), [
    (CT, Scheme(grid="nf4", group_size=64), "bitsandbytes"), (BNB, Scheme(), "--method nf4"),
    (CT, Scheme(bits=8, group_size=-1, activations="outliers"), "--method llm-int8"),
    (BNB, Scheme(grid="vectorwise-int8", bits=8, group_size=-1), "activations: outliers"),
    (CT, Scheme(bits=4, group_size=64, activations="token"), "--bits 8 --group-size -1"),
    (CT, Scheme(grid="mxfp4", group_size=32, activations="token"), "leave it out"),
    (BNB, Scheme(grid="nf4", group_size=128), "does not divide the 96"),
    (CT, Scheme(grid="fp8", bits=8, group_size=32), "nearest: --group-size -1"),
    (CT, Scheme(grid="fp8", bits=8, group_size=-1, activations="group"), "nearest: activations: token"),
    (CT, Scheme(bits=8, group_size=-1, activations="group"), "nearest: activations: token"),
    (CT, Scheme(grid="fp8", bits=8, group_size=128, strategy="block"), "multiples of 128"),
    ("fp8", Scheme(grid="fp8", bits=8, group_size=128, strategy="block", activations="group"), "multiples of 128"),
    ("fp8", Scheme(grid="fp8", bits=8, group_size=-1), "--method fp8-block"),
    ("gptq", Scheme(grid="fp8", bits=8, group_size=-1), "not the fp8 grid"),
])
def test_refusals(name: str, scheme: Scheme, words: str) -> None:
    assert words in str(formats.load(name).check(scheme, NAME, (64, 96)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_is_what_bitsandbytes_makes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    scheme = SCHEMES["llm-int8"][1]
    weight = weights(64, 320, dtype)
    weight[7] = 0
    ours = formats.load(BNB).pack(NAME, answer(scheme, weight, BNB), dtype)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    kept = torch.arange(64) != 7  # a row of zeros divides by zero there
    assert torch.equal(ours[f"{NAME}.weight"][kept], codes[kept]) and torch.equal(ours[f"{NAME}.SCB"], absmax)
    assert not ours[f"{NAME}.weight"][7].any()


def test_the_mixed_product() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(9, 320)
    x[2, 5], x[4, 5], x[7, 100] = 9.0, -7.0, 6.0
    codes, absmax, _ = functional.int8_vectorwise_quant(weights(64, 320, torch.float16) * 20)
    rounded, rows, columns = functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    assert columns.tolist() == [5, 100]
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, rounded, codes, rows, absmax, columns, None)
    ours = mixed_product(x, codes, absmax, 6.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))
    rounded, rows, columns = functional.int8_vectorwise_quant(x.half(), threshold=0.0)
    assert columns is None  # nothing is set apart
    theirs = torch.ops.bitsandbytes.int8_scaled_mm(rounded, codes, rows, absmax, dtype=torch.float32)
    torch.testing.assert_close(mixed_product(x, codes, absmax, 0.0), theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))
    exact = x @ (codes.float() * absmax[:, None] / 127).T
    assert (ours - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("said", "threshold"), [({"llm_int8_threshold": 4.5}, 4.5), ({"llm_int8_threshold": 0}, 0.0),
                                                 ({}, 6.0)])
def test_the_threshold_of_a_checkpoint(said: dict[str, Any], threshold: float) -> None:
    """As another program wrote it, 6.0 where it said nothing; and back again."""
    module, scheme = formats.load(BNB), SCHEMES["llm-int8"][1]
    specs = InMemory(module.pack(NAME, answer(scheme, weights(4, 64, torch.bfloat16), BNB))).specs
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, **said}}
    [(found_scheme, shape)] = module.schemes(config, specs).values()
    assert found_scheme == scheme.model_copy(update={"outlier_threshold": threshold}) and shape == (4, 64)
    assert module.config({NAME: found_scheme}, [])["llm_int8_threshold"] == threshold


@pytest.mark.parametrize("threshold", ["6.0", None, True, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_none(threshold: Any) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True,
                                      "llm_int8_threshold": threshold}}
    with pytest.raises(CheckpointError, match="llm_int8_threshold in the quantization_config is"):
        formats.load(BNB).schemes(config, {})
