"""Our bytes against other people's: the compressed-tensors library, and decoders written from the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool import formats
from qtool.recipe import Scheme
from tests.formats.cases import NAME, dense, random_tensor

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(48, 96), (37, 160)])
def test_the_library_packs_and_reads_the_same_words(shape: tuple[int, int], bits: int, group: int,
                                                    symmetric: bool) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    module, scheme = formats.load("compressed-tensors"), Scheme(bits=bits, group_size=group, symmetric=symmetric)
    tensor = random_tensor(*shape, scheme, torch.bfloat16)
    packed = module.pack(NAME, tensor)

    half = 1 << (bits - 1)
    signed = (tensor.codes.int() - half).to(torch.int8)
    assert torch.equal(packed[f"{NAME}.weight_packed"], helpers.pack_to_int32(signed, bits))
    if not symmetric:
        zeros = helpers.pack_to_int32((tensor.zero_point.int() - half).to(torch.int8), bits, packed_dim=0)
        assert torch.equal(packed[f"{NAME}.weight_zero_point"], zeros)

    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    config = module.config({NAME: scheme}, [])
    group_config = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    state = {name.removeprefix(f"{NAME}."): value for name, value in packed.items()}
    decoded = base.PackedQuantizationCompressor.decompress(state, group_config)["weight"]
    assert torch.equal(decoded, dense(tensor).bfloat16())


@pytest.mark.parametrize("schemes", [1, 2])
def test_the_library_accepts_the_config(schemes: int) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    names = {f"model.layers.{i}.mlp.up_proj": Scheme(bits=8 if i and schemes == 2 else 4) for i in range(3)}
    config = formats.load("compressed-tensors").config(names, ["model.layers.1.mlp.gate_proj", "lm_head"])
    parsed = quantization.QuantizationConfig.model_validate(config)
    assert len(parsed.config_groups) == schemes
    assert parsed.ignore == ["model.layers.1.mlp.gate_proj", "lm_head"]


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Fields of a little-endian bit stream that runs down axis 0, in whole Python integers: slow and plain."""
    result = np.empty((count, words.shape[1]), dtype=np.int64)
    for column in range(words.shape[1]):
        number = sum(int(word) << (32 * row) for row, word in enumerate(words[:, column].view(np.uint32)))
        result[:, column] = [(number >> (bits * place)) & ((1 << bits) - 1) for place in range(count)]
    return result


def decode_gptq(tensors: dict[str, torch.Tensor], bits: int, added: int) -> np.ndarray:
    """W[n, k] = scales[g(k), n] * (q[k, n] - zero[g(k), n]), stored zeros lack 1 in the first version."""
    qweight, qzeros, scales, g_idx = (tensors[f"{NAME}.{suffix}"].numpy()
                                      for suffix in ("qweight", "qzeros", "scales", "g_idx"))
    codes = stream(qweight, bits, len(g_idx))
    zeros = stream(np.ascontiguousarray(qzeros.T), bits, scales.shape[1]).T + added
    return (scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx]).astype(np.float32)).T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", BITS)
def test_a_decoder_from_the_specification_reads_gptq(bits: int, group: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)
    tensor = random_tensor(64, 96, scheme, torch.float16)
    packed = formats.load("gptq").pack(NAME, tensor)
    assert np.array_equal(decode_gptq(packed, bits, added=int(symmetric)), dense(tensor).numpy())


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_gptq_has_the_zero_words_that_readers_expect(bits: int, word: int) -> None:
    packed = formats.load("gptq").pack(NAME, random_tensor(32, 64, Scheme(bits=bits, group_size=32), torch.float16))
    assert (packed[f"{NAME}.qzeros"] == word).all()


def test_gptq_config_is_complete() -> None:
    gptq = formats.load("gptq")
    schemes = {f"model.layers.{i}.self_attn.{part}_proj": Scheme(bits=8 if i == 1 else 4)
               for i in range(3) for part in "qkv"}
    config = gptq.config(schemes, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"], ["gptq"])
    assert (config["bits"], config["sym"], config["desc_act"], config["checkpoint_format"]) == (4, True, False, "gptq")
    skip, *rules = config["dynamic"]
    assert skip == r"-:^model\.layers\.\d+\.mlp\.up_proj$"
    assert r"+:^model\.layers\.1\.self_attn\.qkv_proj$" in rules, "vLLM asks for the fused name"
    assert config["modules_in_block_to_quantize"] == [[f"self_attn.{part}_proj"] for part in "qkv"]
    assert config["meta"]["quantizer"][0].startswith("qtool:")
    assert gptq.extra_files(config) == {"quantize_config.json": config}
    plain = gptq.config({name: Scheme() for name in schemes}, ["lm_head"])
    assert "dynamic" not in plain and "modules_in_block_to_quantize" not in plain
