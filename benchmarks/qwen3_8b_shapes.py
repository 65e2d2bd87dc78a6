"""Writes a checkpoint with the exact shapes of Qwen3-8B and random weights: 16.4 GB, or less with --blocks.

    python benchmarks/qwen3_8b_shapes.py OUT [--blocks 36] [--tokenizer DIR]

The weights are normal with the deviation of real ones (0.02; norms 1), so that a forward pass stays finite. Random
weights have no tokenizer: `--tokenizer` copies the files of another model. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from qtool.checkpoint.writer import ShardWriter, plan_shards
from qtool.tensors import TensorSpec

HIDDEN, MIDDLE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4096, 12288, 32, 8, 128, 151_936
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": MIDDLE,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCABULARY,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "max_position_embeddings": 40_960,
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN), "mlp.down_proj": (HIDDEN, MIDDLE),
}
NORMS = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN, "self_attn.q_norm": HEAD_DIM,
         "self_attn.k_norm": HEAD_DIM}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order of the blocks."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        result.update({f"{prefix}{name}.weight": (size,) for name, size in NORMS.items()})
        result.update({f"{prefix}{name}.weight": shape for name, shape in LINEARS.items()})
    return {**result, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--blocks", type=int, default=36)
    parser.add_argument("--tokenizer")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True)
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes(options.blocks).items()]
    writer = ShardWriter(out, plan_shards(specs, 4 << 30))
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        writer.write(spec.name, tensor.fill_(1.0) if len(spec.shape) == 1
                     else tensor.normal_(0.0, 0.02, generator=generator))
    writer.finish()
    (out / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": options.blocks}, indent=2) + "\n")
    for name in TOKENIZER_FILES if options.tokenizer else ():
        if (Path(options.tokenizer) / name).exists():
            shutil.copy(Path(options.tokenizer) / name, out / name)


if __name__ == "__main__":
    main()
