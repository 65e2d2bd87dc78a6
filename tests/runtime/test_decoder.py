"""The native step gives the logits of the transformers module, in a prompt and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qtool
from qtool import decode, ops
from qtool.ops import reference_packed
from qtool.runtime.decoder import Decoder, open_decoder
from tests.runtime.conftest import Make, ids

INT4 = ("--method", "rtn", "--group-size", "32")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {},
    "llama-3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
}


def opened(path: Any, capacity: int = 64, rounded: bool = False) -> Decoder:
    decoder, reason = open_decoder(decode.open_model(str(path)), capacity, rounded)
    assert decoder is not None, reason
    return decoder


@pytest.mark.parametrize("arguments", [INT4, ()], ids=["int4", "dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str, arguments: tuple[str, ...], quantized: Make) -> None:
    path = quantized(name.partition("-")[0], *arguments, **FAMILIES[name])
    model, decoder, text = qtool.load(str(path), device="cpu"), opened(path), ids(40)
    with torch.inference_mode():
        expected = model(text[None]).logits[0]
        for start, stop in ((0, 21), (21, 22), (22, 25), *((at, at + 1) for at in range(25, 40))):
            logits = decoder.step(text[start:stop])
            torch.testing.assert_close(logits, expected[stop - 1], rtol=1e-4, atol=1e-4)


def test_generation(quantized: Make) -> None:
    path = quantized("llama", *INT4)
    model, text = qtool.load(str(path), device="cpu"), ids(1, 9)
    expected = model.generate(text, max_new_tokens=8, do_sample=False, eos_token_id=None,
                              attention_mask=torch.ones_like(text))[0, 9:]
    decoder = opened(path)
    made = decoder.generate(text[0], 8)
    assert torch.equal(made, expected) and torch.equal(decoder.generate(text[0], 8), expected)
    stop = int(expected[3])
    assert torch.equal(decoder.generate(text[0], 8, (stop,)), expected[:expected.tolist().index(stop) + 1])


def test_rounded_inputs_are_near(quantized: Make) -> None:
    path = quantized("llama", *INT4)
    exact, rounded, text = opened(path), opened(path, rounded=True), ids(12)
    with torch.inference_mode():
        for start, stop in ((0, 11), (11, 12)):
            expected, logits = exact.step(text[start:stop]), rounded.step(text[start:stop])
            assert not torch.equal(logits, expected)
            assert float((logits - expected).norm() / expected.norm()) < 0.05


@pytest.mark.skipif(not ops.native_available(), reason="no compiled extension")
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_the_op_against_its_reference(family: str, rounded: bool, quantized: Make) -> None:
    decoder = opened(quantized(family, *INT4), rounded=rounded)
    block, hidden = decoder.blocks[1], torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for position in range(12):
        cos, sin = decoder.cos[position:position + 1], decoder.sin[position:position + 1]
        caches = block.keys.clone(), block.values.clone()
        expected = reference_packed.decode_block(hidden, block.weights, block.layout, cos, sin, *caches, position,
                                                 block.window, block.epsilon, block.scaling, rounded)
        actual = block(hidden, cos, sin, position)
        if not rounded:  # a sum that differs in its last bit may be rounded to another code
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert float((actual - expected).norm() / expected.norm()) < 0.01
        torch.testing.assert_close(block.keys, caches[0], rtol=1e-3, atol=1e-2)
        hidden = actual


@pytest.mark.skipif(not ops.native_available(), reason="no compiled extension")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa: str, quantized: Make) -> None:
    path, text = quantized("qwen3", *INT4), ids(6)
    exact, rounded = opened(path), opened(path, rounded=True)
    try:
        expected = [_token_by_token(decoder, text) for decoder in (exact, rounded)]
        if not ops.force_instruction_set(isa):
            pytest.skip(f"this processor has no {isa}")
        assert all(map(torch.equal, expected, [_token_by_token(decoder, text) for decoder in (exact, rounded)]))
    finally:
        ops.force_instruction_set("")


def _token_by_token(decoder: Decoder, text: torch.Tensor) -> torch.Tensor:
    decoder.length = 0
    with torch.inference_mode():
        return torch.stack([decoder.step(token[None]) for token in text])


@pytest.mark.parametrize("family, arguments, words", [
    ("gemma2", INT4, "norms around both parts"), ("phi3", INT4, "model type 'phi3'"),
    ("llama", ("--method", "fp8"), "round their inputs"),
])
def test_what_has_no_native_step(family: str, arguments: tuple[str, ...], words: str, quantized: Make) -> None:
    decoder, reason = open_decoder(decode.open_model(str(quantized(family, *arguments))), 16)
    assert decoder is None and words in reason


def test_a_full_cache(quantized: Make) -> None:
    decoder = opened(quantized("llama"), capacity=8)
    with torch.inference_mode():
        decoder.step(ids(8))
        with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 8"):
            decoder.step(ids(1))
