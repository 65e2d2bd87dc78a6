"""AWQ's gemm layout against a decoder written from its description, and files that are not what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtool import formats
from qtool.errors import CheckpointError
from qtool.recipe import Scheme
from tests.formats.cases import NAME, InMemory, dense, random_tensor

SCHEME = Scheme(bits=4, group_size=32, symmetric=False)
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of column 8 w + j


def test_words_are_those_of_autoawq() -> None:
    tensor = random_tensor(64, 96, SCHEME, torch.float16)
    packed = formats.load("awq").pack(NAME, tensor)
    words, zeros, scales = (packed[f"{NAME}.{suffix}"] for suffix in ("qweight", "qzeros", "scales"))
    decoded = torch.empty(64, 96)
    for n in range(64):
        shift = 4 * PLACE[n % 8]
        code, zero = (words[:, n // 8] >> shift) & 15, (zeros[:, n // 8] >> shift) & 15
        decoded[n] = (code - zero.repeat_interleave(32)).float() * scales[:, n].float().repeat_interleave(32)
    assert torch.equal(decoded, dense(tensor))


def test_the_written_config_is_read_again() -> None:
    module = formats.load("awq")
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(3)]
    config = {"quantization_config": module.config(dict.fromkeys(names, SCHEME), ["model.layers.0.mlp.gate_proj"])}
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.layers.0.mlp.gate_proj", "lm_head"]
    specs = {spec.name: spec for name in names for spec in module.layout(name, (64, 96), SCHEME, torch.bfloat16)}
    assert formats.recognise(config) is module
    assert module.schemes(config, specs) == dict.fromkeys(names, (SCHEME, (64, 96)))
    assert "group size" in str(module.check_together({"a": SCHEME, "b": Scheme(bits=4, group_size=64)}))


@pytest.mark.parametrize(("change", "words"), [
    (lambda c, t: c.update(version="marlin"), "marlin"), (lambda c, t: c.update(bits=8), "8 bits"),
    (lambda c, t: t.pop(f"{NAME}.scales"), "do not fit"), (lambda c, t: t.clear(), "no tensor is called"),
])
def test_what_is_not_read(change: Any, words: str) -> None:
    module = formats.load("awq")
    tensors = module.pack(NAME, random_tensor(32, 64, SCHEME, torch.float16))
    said = module.config({NAME: SCHEME}, [])
    change(said, tensors)
    with pytest.raises(CheckpointError, match=words):
        module.schemes({"quantization_config": said}, InMemory(tensors).specs)
