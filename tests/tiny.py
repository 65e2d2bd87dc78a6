"""Tiny random checkpoints of real architectures, made on the spot: config, bf16 safetensors, a small real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 512
TEXT = (
    "A model reads text and guesses the next word; a smaller model guesses almost as well.",
    "def add(left, right):\n    return left + right\n",
    "The quick brown fox jumps over the lazy dog, 0123456789 times, on Monday and on Tuesday.",
    "for index in range(10):\n    print(index, index * index)\n",
)
COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    "initializer_range": 0.08,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3": {"model_type": "gemma3_text", "tie_word_embeddings": True, "sliding_window": 8,
               "query_pre_attn_scalar": 16,
               "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "qwen3_moe": {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make(path: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    """Write a checkpoint of `family` (a key of FAMILIES) into the folder `path`; the same seed gives the same bytes.

    `overrides` are config values, e.g. num_hidden_layers=2, tie_word_embeddings=True. Weights and norms are random, so
    that a mix-up of any two tensors shows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**COMMON, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(values.pop("model_type", family), **values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    tokenizer(bos=family.startswith("gemma")).save_pretrained(path)
    return path


def sentencepiece(space: bool = True) -> Any:
    """A SentencePiece tokenizer as transformers stores it: merges over whole texts with ▁ for spaces, bytes for what no
    piece covers. space: one is put before the text (Llama 2), or not (Gemma)."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = ["".join(merge) for merge in learned["merges"]]
    pieces += [*dict.fromkeys(merged), *(piece for piece in learned["vocab"] if piece not in merged)]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)},
                                   [tuple(merge) for merge in learned["merges"]], unk_token="<unk>",
                                   byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space else replace
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "<|turn|>")])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizer(bos: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on TEXT; with `bos` it starts every text with <s>, as Gemma's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 32, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(TEXT, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def in_float16(path: Path) -> Path:
    """Store the checkpoint in the folder `path`, of one file, in float16."""
    stored = path / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(stored).items()}, stored, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    return path
