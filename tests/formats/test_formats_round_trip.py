"""Every format gives back what it was given, in exactly the tensors that it announced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import formats
from qtool.errors import NumericalError
from qtool.recipe import Scheme
from tests.formats.cases import NAME, dense, random_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Scheme, tuple[int, int], torch.dtype, int]:
    name = draw(st.sampled_from(["compressed-tensors", "gptq", "awq"]))
    group = draw(st.sampled_from([-1, 16, 32, 64] + ([8, 24] if name == "compressed-tensors" else [])))
    unit = 1 if name == "compressed-tensors" else 32
    rows = unit * draw(st.integers(1, 3 if unit > 1 else 70))
    columns = draw(st.integers(1, 4)) * (unit if group in (-1, 16, 32) and unit > 1 else max(group, unit))
    bits = 4 if name == "awq" else draw(st.sampled_from([2, 3, 4, 8]))
    scheme = Scheme(bits=bits, group_size=group, symmetric=draw(st.booleans()))
    return name, scheme, (rows, columns), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_unpack_is_the_inverse_of_pack(case: tuple[str, Scheme, tuple[int, int], torch.dtype, int]) -> None:
    name, scheme, shape, model_dtype, seed = case
    module = formats.load(name)
    assert module.check(scheme, NAME, shape) is None
    tensor = random_tensor(*shape, scheme, module.scale_dtype(model_dtype), seed)
    packed = module.pack(NAME, tensor)

    announced = {spec.name: (spec.dtype, spec.shape) for spec in module.layout(NAME, shape, scheme, model_dtype)}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in packed.items()} == announced
    assert all(value.is_contiguous() for value in packed.values())

    again = module.unpack(NAME, packed.__getitem__, scheme, shape)
    for field in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(again, field), getattr(tensor, field)), field
    assert (again.bits, again.group_size, again.scale.dtype) == (tensor.bits, tensor.group_size, tensor.scale.dtype)
    assert torch.equal(module.dequantize(NAME, packed.__getitem__, scheme, shape), dense(tensor))


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_the_written_config_describes_the_written_tensors(name: str) -> None:
    module = formats.load(name)
    schemes = {f"model.layers.{layer}.{kind}": Scheme(bits=8 if layer == 1 and kind == "mlp.down_proj" else 4,
                                                      group_size=-1 if kind == "self_attn.o_proj" else 32)
               for layer in range(12) for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    skipped = ["model.layers.11.mlp.up_proj", "lm_head"]
    config = {"model_type": "llama", "quantization_config": module.config(schemes, skipped, ["rtn"])}
    specs = {spec.name: spec for linear, scheme in schemes.items()
             for spec in module.layout(linear, (64, 96), scheme, torch.bfloat16)}
    assert formats.recognise(config) is module
    assert module.schemes(config, specs) == {linear: (scheme, (64, 96)) for linear, scheme in schemes.items()}


def test_hf_writes_the_values_of_the_codes() -> None:
    scheme = Scheme(bits=4, group_size=16, symmetric=False)
    tensor = random_tensor(8, 32, scheme, torch.bfloat16)
    module = formats.load("hf")
    packed = module.pack(NAME, tensor)
    assert [spec.name for spec in module.layout(NAME, (8, 32), scheme, torch.bfloat16)] == list(packed)
    assert torch.equal(packed[f"{NAME}.weight"], dense(tensor).bfloat16())
    assert not module.recognises({"model_type": "llama"})


@pytest.mark.parametrize(("name", "value"), [("gptq", 70000.0), ("gptq", 1 / 3), ("compressed-tensors", float("inf")),
                                             ("compressed-tensors", float("nan"))])
def test_a_scale_that_cannot_be_kept_is_an_error_that_names_the_linear(name: str, value: float) -> None:
    tensor = random_tensor(32, 32, Scheme(group_size=32), torch.float32)
    tensor.scale[3, 0] = value
    if name == "gptq":
        tensor.scale[:3] = tensor.scale[4:] = 1.0
    with pytest.raises(NumericalError, match=NAME.replace(".", r"\.")):
        formats.load(name).pack(NAME, tensor)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_pack_refuses_what_contradicts_itself(name: str) -> None:
    module = formats.load(name)
    tensor = random_tensor(32, 64, Scheme(bits=4, group_size=32), torch.float16)
    tensor.codes[0, 0] = 16
    with pytest.raises(ValueError, match="larger than 15"):
        module.pack(NAME, tensor)
    tensor.codes[0, 0], tensor.zero_point[0, 0] = 1, 3
    with pytest.raises(ValueError, match="not 8"):
        module.pack(NAME, tensor)
