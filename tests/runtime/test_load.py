"""`qtool.load` gives a transformers module with the logits of the dequantized model, for every kind of storage."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

import qtool
from qtool import decode
from qtool.activations import round_inputs
from qtool.errors import CheckpointError, InputError
from qtool.tensors import INPUT_SCALE
from tests import tiny
from tests.cli.conftest import make
from tests.runtime.conftest import Make, decoded, decoded_source, ids

SCHEMES = {
    "int4-g32": ("--method", "rtn", "--group-size", "32"),
    "uint4-g32": ("--method", "rtn", "--group-size", "32", "--asymmetric"),
    "int3-channel": ("--method", "rtn", "--bits", "3", "--group-size", "-1"),
    "int8-g64": ("--method", "rtn", "--bits", "8", "--group-size", "64"),
    "int2-g16": ("--method", "rtn", "--bits", "2", "--group-size", "16"),
    "nf4-g64": ("--method", "nf4"),
    "fp8-channel-dynamic": ("--method", "fp8"),
    "int8-channel-dynamic": ("--method", "w8a8", "--samples", "4", "--sequence-length", "32"),
    "fp8-tensor-static": ("--method", "fp8-static", "--samples", "4", "--sequence-length", "32"),
    "vectorwise-int8-channel": ("--method", "llm-int8"),
    "gptq": ("--method", "rtn", "--group-size", "32", "--format", "gptq"),
    "awq": ("--method", "rtn", "--group-size", "32", "--asymmetric", "--format", "awq"),
    "mlx": ("--method", "rtn", "--group-size", "32", "--asymmetric", "--format", "mlx"),
}


def assert_same(path: Path, label: str | None) -> None:
    model, expected = qtool.load(str(path), device="cpu"), decoded(path)
    text = ids(2, 7)
    with torch.inference_mode():
        assert set(model.running.packed.values()) == ({label} if label else set())
        for part in (text, text[:, :1]):
            logits, wanted = model(part).logits, expected(part).logits
            if label is not None and label.endswith(("dynamic", "static")):  # a last bit may change an input's code
                assert float((logits - wanted).norm() / wanted.norm()) < 0.05
            else:
                torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8-channel-dynamic", "fp8-channel-dynamic", "fp8-tensor-static"])
def test_rounded_inputs(name: str, quantized: Make) -> None:
    """One linear on the same inputs, where no code can change: the product of rounded inputs and weights."""
    path = quantized("llama", *SCHEMES[name], hidden_size=128)
    linear = qtool.load(str(path), device="cpu").get_submodule("model.layers.1.mlp.up_proj")
    source, stored = decode.open_model(str(path)), "model.layers.1.mlp.up_proj"
    x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0))
    static = source.read_quantized(stored).extra.get(INPUT_SCALE)
    expected = round_inputs(x, source.schemes[stored], static) @ source.decoded(stored).T
    with torch.inference_mode():
        assert not torch.allclose(linear(x), x @ source.decoded(stored).T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_logits(name: str, quantized: Make) -> None:
    path = quantized("llama", *SCHEMES[name], hidden_size=128)
    label = {"gptq": "int4-g32", "awq": "uint4-g32", "mlx": "uint4-g32"}.get(name, name)
    assert_same(path, label)


def test_codebooks_are_dense(quantized: Make) -> None:
    path = quantized("llama", "--method", "aqlm", "--set", "steps.aqlm.rounds=1", "--samples", "4", "--sequence-length",
                     "32", hidden_size=128)
    model, source, x = qtool.load(str(path), device="cpu"), decode.open_model(str(path)), torch.randn(3, 128)
    name = "model.layers.0.mlp.up_proj"
    assert model.running.dense[name] == "additive codebooks" and not model.running.packed
    with torch.inference_mode():  # in the model's dtype, as all that no product knows
        expected = x @ source.read(f"{name}.weight").float().T
        torch.testing.assert_close(model.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gemma2"])
def test_families(family: str, quantized: Make) -> None:
    assert_same(quantized(family, *SCHEMES["int4-g32"]), "int4-g32")


@pytest.mark.parametrize("type_", ["q4_0", "q4_1", "q5_1", "q8_0", "iq4_nl", "q4_k_s", "q6_k", "q3_k_s"])
def test_gguf(type_: str, quantized: Make, tmp_path: Path) -> None:
    """Against the float32 values that the gguf package computes."""
    path = tmp_path / "m.gguf"
    make("export", quantized("llama", hidden_size=256, intermediate_size=256), "--to", "gguf", "--type", type_, "--out",
         path, "--quiet")
    model, source = qtool.load(str(path), device="cpu"), decode.open_model(str(path))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, theirs in (("gate_proj", "ffn_gate"), ("down_proj", "ffn_down")):
        linear, tensor = model.get_submodule(f"model.layers.1.mlp.{name}"), stored[f"blk.1.{theirs}.weight"]
        dense = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(linear(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    assert type_.removesuffix("_s") in str(model.running)
    text = ids(1, 6)
    with torch.inference_mode():  # reading dequantizes to bfloat16; the order of the rows of q and k shows here
        torch.testing.assert_close(model(text).logits, decoded_source(source)(text).logits, rtol=0.1, atol=0.1)


def test_dense_and_generate(quantized: Make) -> None:
    path = quantized("llama")
    assert_same(path, None)
    model, expected = qtool.load(str(path), device="cpu"), decoded(path)
    assert "15 dense (not quantized)" in str(model.running)
    text = ids(2, 9)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(text)}
    assert torch.equal(model.generate(text, **arguments), expected.generate(text, **arguments))


def test_codes_in_activation_order_are_dense(quantized: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = quantized("llama", *SCHEMES["gptq"], hidden_size=128)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].roll(3)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    model, expected = qtool.load(str(copy), device="cpu"), decoded(copy)
    assert "activation order" in model.running.dense["model.layers.1.mlp.down_proj"]
    with torch.inference_mode():  # that one's weights are rounded to bfloat16, the model's type
        torch.testing.assert_close(model(ids(1, 5)).logits, expected(ids(1, 5)).logits, rtol=0.05, atol=0.05)


def test_activations_in_another_type(quantized: Make) -> None:
    path = quantized("llama", *SCHEMES["int4-g32"], hidden_size=128)
    half = qtool.load(str(path), device="cpu", dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = half(ids(1, 5)).logits
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), decoded(path)(ids(1, 5)).logits, rtol=0.1, atol=0.1)


def test_what_cannot_be_loaded(quantized: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'tpu' is not known"):
        qtool.load(str(quantized("llama")), device="tpu")
    with pytest.raises(CheckpointError):
        qtool.load(str(tmp_path / "nothing"))
    broken = tiny.make(tmp_path / "broken", "llama", num_hidden_layers=2)
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(Exception, match="generation_config.json"):
        qtool.load(str(broken), device="cpu")
