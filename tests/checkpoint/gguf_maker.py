"""Turns a tiny Hugging Face checkpoint into a GGUF file as llama.cpp's converter does, for the tests.

Names come from gguf's own table, so that they do not repeat the table under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointError

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
                 "gemma2": gguf.MODEL_ARCH.GEMMA2, "gemma3": gguf.MODEL_ARCH.GEMMA3, "phi3": gguf.MODEL_ARCH.PHI3,
                 "qwen2moe": gguf.MODEL_ARCH.QWEN2MOE, "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE}


def convert(folder: Path, out: Path, architecture: str, kind: GGMLQuantizationType = GGMLQuantizationType.F32,
            extra: dict[str, np.ndarray] | None = None, tokens: bool = True, **metadata: Any) -> Path:
    """Write `out`. kind: element type of all matrices; vectors are F32. metadata: more keys, __ for a dot."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, architecture)
    _add_config(writer, config, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]
        add(f"{architecture}.{key.replace('__', '.')}", value)
    if tokens:
        _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config["num_hidden_layers"])
    for name, tensor in _stacked(load_file(folder / "model.safetensors")).items():
        stem, suffix = name.rsplit(".", 1)
        if ".experts.w" in stem:  # as llama.cpp's converter renames them
            stem = stem.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
        target = names.get_name(stem)
        assert target is not None, name
        values = _as_stored(name, tensor.float(), config, architecture).numpy()
        use = kind if values.ndim > 1 and "ffn_gate_inp" not in target else GGMLQuantizationType.F32
        writer.add_tensor(f"{target}.{suffix}", gguf.quantize(np.ascontiguousarray(values), use), raw_dtype=use)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def refused(path: Path, text: str) -> None:
    """Opening `path` must fail with one line that names the file and matches `text`."""
    with pytest.raises(CheckpointError, match=text) as caught:
        open_checkpoint(str(path)).close()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer in one tensor [E, N, K]."""
    result: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: [int(part) if part.isdigit() else -1
                                                                   for part in item[0].split(".")]):
        head, found, tail = name.partition(".experts.")
        if found:
            result.setdefault(f"{head}.experts.{tail.split('.', 1)[1]}", []).append(tensor)
        else:
            result[name] = tensor
    return {name: torch.stack(value) if isinstance(value, list) else value for name, value in result.items()}


def _as_stored(name: str, tensor: torch.Tensor, config: dict[str, Any], architecture: str) -> torch.Tensor:
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor[0] if "shared_expert_gate" in name else tensor


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_type("model")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    if architecture.startswith("gemma") or architecture == "phi3":
        writer.add_sliding_window(config["sliding_window"] or 0)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    vocabulary = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = [added.get(i) or vocabulary.get(i) or f"[PAD{i}]" for i in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in added else 1 if i in vocabulary else 5 for i in range(len(tokens))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token("<s>" in json.dumps(tokenizer["post_processor"]))
    writer.add_chat_template("{{ messages[0]['content'] }}")
