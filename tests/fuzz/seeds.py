"""Writes tests/fuzz/corpus: small files of every kind that a target reads. python -m tests.fuzz.seeds"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from qtool import recipe
from qtool.checkpoint.imatrix import write_imatrix
from qtool.journal import line
from tests import tiny
from tests.checkpoint.gguf_maker import convert
from tests.cli.test_card import made
from tests.fuzz.targets import NAMES, file

CORPUS = Path(__file__).parent / "corpus"
Seeds = Iterator[tuple[str, bytes]]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_theta": 10000.0}


def said(value: Any) -> bytes:
    return json.dumps(value).encode()


def header(entries: dict[str, Any], data: int) -> bytes:
    text = said(entries)
    return struct.pack("<Q", len(text)) + text + bytes(data)


def safetensors() -> Seeds:
    one = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
    yield "two", header({"__metadata__": {"format": "pt"}, "a.weight": one,
                         "b": {"dtype": "U8", "shape": [], "data_offsets": [12, 13]}}, 13)
    yield "empty-tensor", header({"a": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [0, 0]}}, 0)
    yield "overlap", header({"a": one, "b": one}, 12)
    yield "nested", struct.pack("<Q", 4000) + b'{"a":' * 800
    yield "types", header({dtype: {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]} for dtype in (
        "F8_E4M3", "BOOL", "I64")}, 8)


def index() -> Seeds:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    yield "right", said({"metadata": {"total_size": 8}, "weight_map": {NAMES[0]: first, NAMES[1]: second}})
    yield "outside", said({"weight_map": {NAMES[0]: "../../etc/passwd.safetensors"}})
    yield "absent", said({"weight_map": {"x": first, NAMES[1]: "model-00009-of-00002.safetensors"}})
    yield "kinds", said({"weight_map": {NAMES[0]: 3, "y": None}, "weight_maps": []})


def written(architecture: str, tensors: dict[str, tuple[np.ndarray, Any]], **keys: Any) -> bytes:
    path = file("seed.gguf", b"")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        item = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value), item)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_header() -> Seeds:
    yield "keys", written("llama", {}, a__b=3, c=[1, 2], d=["x", "yz"], e=1.5, f=True, general__alignment=64)
    yield "tensors", written("llama", {"t": (np.ones((2, 3), np.float32), None), "u": (np.ones(5, np.float16), None)})
    yield "truncated", written("llama", {"t": (np.ones((2, 32), np.float32), None)})[:-40]
    yield "many", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60)


def gguf_tensors() -> Seeds:
    random = np.random.default_rng(1)
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name[0] in "QITM" and kind.name not in ("I8", "I16", "I32", "I64"):
            blocks = random.integers(0, 256, (2, size), dtype=np.uint8)
            yield kind.name.lower(), written("llama", {"t": (blocks, kind)})


def gguf_model() -> Seeds:
    folder = tiny.make(file("seed-model/x", b"").parent, "llama", num_hidden_layers=1, hidden_size=32, head_dim=8,
                       intermediate_size=32, vocab_size=64)
    for name, kind, tokens in (("plain", gguf.GGMLQuantizationType.F16, False),
                               ("q8", gguf.GGMLQuantizationType.Q8_0, False)):
        yield name, convert(folder, file("seed2.gguf", b""), "llama", kind, tokens=tokens).read_bytes()
    yield "vocabulary", written(
        "llama", {"token_embd.weight": (np.ones((3, 8), np.float32), None)}, tokenizer__ggml__model="gpt2",
        tokenizer__ggml__tokens=["a", "b", "ab"], tokenizer__ggml__merges=["a b"], llama__block_count=1,
        tokenizer__ggml__token_type=[1, 1, 1], llama__attention__head_count=1, llama__embedding_length=8,
        llama__context_length=16, llama__feed_forward_length=8, llama__attention__layer_norm_rms_epsilon=1e-5)


def config() -> Seeds:
    yield "llama", said(LLAMA)
    yield "rope", said({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}})
    yield "moe", said({**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    yield "text", said({"model_type": "gemma3", "text_config": LLAMA, "vision_config": {}})
    yield "code", said({**LLAMA, "auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True})
    yield "wrong", said({**LLAMA, "num_hidden_layers": -1, "hidden_size": "64", "torch_dtype": ["x"]})


def quantization() -> Seeds:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32,
                                                "strategy": "group"}, "input_activations": None}
    for name, value in {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        "ct": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
               "ignore": ["re:.*lm_head"], "quantization_status": "compressed"},
        "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True},
        "mlx": {"group_size": 32, "bits": 4, "mode": "affine", "model.layers.0.mlp.up_proj": {"bits": 8}},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16,
                     "exclude_modules": ["lm_head"]},
        "aqlm": {"quant_method": "aqlm", "num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8,
                 "out_group_size": 1},
        "unknown": {"quant_method": "hqq", "bits": 2},
    }.items():
        yield name, b"\0" + said(value)
        yield f"{name}-less", b"\3" + said(value)


def recipes() -> Seeds:
    for name, path in recipe.available().items():
        if name in ("gptq-mixed", "several", "llm-int8-outliers", "gguf"):
            yield name, path.read_bytes()
    yield "hostile", b"a: &x [*x, !!python/object:os.system 'id']\n? [k]\n: 0x_\nseed: 1e999\nrules: [{match: '**'}]\n"
    yield "keys", b"steps: [{gptq: {damping: .nan}}]\nbudget: 999999999999999999GB\nscheme: {bits: 9, group_size: -7}\n"


def jobs_file() -> Seeds:
    yield "list", (b"out: made\nset: {seed: 3}\njobs:\n- {model: a/b, method: rtn, out: x, cpus: 2}\n"
                   b"- {model: c, recipe: r.yaml}\n")
    yield "matrix", (b"jobs:\n  models: [a/b, ./c]\n"
                     b"  recipes: [x.yaml, {method: gptq, name: n, set: {scheme.bits: 3}}]\n")
    yield "outside", b"jobs: [{model: a, method: rtn, out: ../../x}, {model: b, method: rtn, out: /etc/x}]\n"


def imatrix() -> Seeds:
    path = file("seed.imatrix", b"")
    write_imatrix(path, {"blk.0.ffn_up.weight": (torch.ones(1, 64), torch.tensor([3.0]))}, ["text"], 1, 512)
    yield "gguf", path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    yield "dat", struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 2, 64) + np.ones(64, np.float32).tobytes()


def tokenizer() -> Seeds:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<unk>": 3}, "merges": [["a", "b"]]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    base: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level,
                            "post_processor": None, "decoder": level, "model": model}
    added = {"id": 4, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
    yield "bytes", said({**base, "added_tokens": [added]})
    yield "pieces", said({**base, "pre_tokenizer": None, "normalizer": {"type": "Prepend", "prepend": "x"},
                          "model": {**model, "byte_fallback": True, "unk_token": "<unk>"}})
    yield "far", said({**base, "added_tokens": [{**added, "id": 1 << 40}]})
    yield "wrong", said({**base, "model": {**model, "vocab": {"a": -5, "b": 1 << 50}}})


def good() -> dict[str, Any]:
    """A manifest."""
    record = made(outputs={"model.safetensors": "ab"}, schema=1, rotation=None, versions={})
    record["totals"]["quantized_weights"] = 1536
    record["layers"] = [{**one, "stored": one["name"], "shape": [8, 64], "bytes": 300} for one in record["layers"]]
    return record


def manifests() -> Seeds:
    yield "run", said(good())
    yield "export", said({**good(), "recipe": None, "calibration": None, "layers": []})
    yield "outside", said({**good(), "outputs": {"../x": "ab"}})


def journal() -> Seeds:
    first = line({"identity": {"qtool": "1"}})
    yield "run", first + line({"stage": "block 0", "layers": []})
    yield "cut", first + b'{"stage": "bl'
    yield "other", line({"identity": {"qtool": "2", "x": [1]}})
    yield "unsealed", said({"identity": {"qtool": "1"}}) + b"\n"
    yield "forged", first + line({"stages": 3}) + line({"stage": []})
    yield "kinds", b'[]\n{"stage": 3}\n'


def directory() -> Seeds:
    return safetensors()


def main() -> None:
    targets = (safetensors, index, gguf_header, gguf_tensors, gguf_model, config, quantization, recipes, jobs_file,
               imatrix, tokenizer, manifests, journal, directory)
    for seeds in targets:
        folder = CORPUS / seeds.__name__
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in seeds():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
