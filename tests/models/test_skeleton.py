"""The skeleton: blocks, linears, names, and refusals that name the tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from qtool.errors import ModelError
from qtool.models import experts, families, skeleton
from qtool.tensors import TensorSpec
from tests import tiny
from tests.models.loaded import open_tiny, specs_of

SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64),
          "gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_has_its_tensor(checkpoint, family):
    loaded = checkpoint(family)
    found = loaded.skeleton
    sources = {found.source(name): shape for name, shape in found.parameters.items()}
    assert sources == {name: tuple(tensor.shape) for name, tensor in loaded.weights.items()}
    assert all(parameter.is_meta for parameter in found.model.parameters())
    assert len(found.blocks) == loaded.config["num_hidden_layers"]
    assert (found.hidden, found.vocabulary, found.dtype) == (64, tiny.VOCABULARY, torch.bfloat16)
    assert found.embeddings == ("model.embed_tokens.weight",) and not found.ignored
    tied = tiny.FAMILIES[family].get("tie_word_embeddings", False)
    assert found.head == (None if tied else "lm_head")
    assert found.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


def test_block_linears_in_module_order(checkpoint):
    linears = checkpoint("llama").skeleton.block_linears(1)
    assert list(linears) == [f"model.layers.1.{part}" for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    assert all(shape == SHAPES[name.rpartition(".")[2]] for name, shape in linears.items())


def test_block_parameters_do_not_mix_1_and_10(tmp_path):
    tiny.make(tmp_path, "llama", num_hidden_layers=11, hidden_size=16, intermediate_size=16, head_dim=4)
    found = open_tiny(tmp_path).skeleton
    assert all(name.startswith("model.layers.1.") for name in found.block_parameters(1))
    assert len(found.block_parameters(1)) == len(found.block_parameters(10)) == 9


def test_experts_are_split_and_named_as_in_the_checkpoint(checkpoint):
    qwen, mixtral = checkpoint("qwen3_moe").skeleton, checkpoint("mixtral").skeleton
    assert qwen.block_linears(0)["model.layers.0.mlp.experts.3.gate_proj"] == (32, 64)
    assert qwen.block_linears(0)["model.layers.0.mlp.experts.7.down_proj"] == (64, 32)
    assert len(qwen.block_linears(0)) == 4 + 3 * 8
    assert mixtral.source("model.layers.1.mlp.experts.2.w1.weight") == \
        "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert mixtral.source("model.layers.1.mlp.gate.weight") == "model.layers.1.block_sparse_moe.gate.weight"
    assert mixtral.expert_layers == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_split_experts_compute_what_the_fused_module_computes(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**tiny.COMMON, **tiny.FAMILIES[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    fused = model.get_submodule("model.layers.0.mlp.experts")
    names = families.expert_linears(family)
    assert len(experts.split(model, names)) == 2
    split = model.get_submodule("model.layers.0.mlp.experts").to_empty(device="cpu")
    assert isinstance(split, experts.SplitExperts)
    with torch.no_grad():
        for index in range(split.count):
            gate, up = fused.gate_up_proj[index].chunk(2)
            for name, weight in zip(names, (gate, up, fused.down_proj[index]), strict=True):
                split.get_submodule(f"{index}.{name}").weight.copy_(weight)
        hidden = torch.randn(40, 64)
        weights, index = torch.rand(40, split.count).topk(2)
        torch.testing.assert_close(split(hidden, index, weights), fused(hidden, index, weights), rtol=1e-5, atol=1e-6)


def test_unusual_experts_are_refused():
    class OddExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 8))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))

    model = nn.ModuleDict({"experts": OddExperts()})
    with pytest.raises(ModelError, match=r"experts: .*OddExperts \(gate_up_proj \[2, 8, 4\], .*not supported"):
        experts.split(model, ("gate_proj", "up_proj", "down_proj"))


def test_linears_beside_experts_are_routers(tmp_path):
    tiny.FAMILIES["qwen2_moe"] = {**tiny.FAMILIES["qwen3_moe"], "shared_expert_intermediate_size": 32}
    try:
        found = open_tiny(tiny.make(tmp_path, "qwen2_moe")).skeleton
    finally:
        del tiny.FAMILIES["qwen2_moe"]
    assert found.routers == tuple(f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2))
    assert "model.layers.0.mlp.shared_expert.up_proj" in found.block_linears(0)
    assert not any("shared_expert_gate" in name for name in found.block_linears(0))


def rebuild(loaded, tmp_path: Path, changes: dict | None = None, weights: dict | None = None) -> skeleton.Skeleton:
    """Build from a copy of a checkpoint's config with some values changed (None: removed)."""
    for path in loaded.directory.glob("*.json"):
        shutil.copy(path, tmp_path)
    config = {**loaded.config, **(changes or {})}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return skeleton.build(tmp_path, config, specs_of(loaded.weights if weights is None else weights))


def test_missing_tensor(checkpoint, tmp_path):
    loaded = checkpoint("llama")
    weights = {name: tensor for name, tensor in loaded.weights.items() if "layers.2.mlp.up_proj" not in name}
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight; .*llama, 3 blocks"):
        rebuild(loaded, tmp_path, weights=weights)


def test_tensor_without_a_place(checkpoint, tmp_path):
    loaded = checkpoint("llama")
    weights = {**loaded.weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    with pytest.raises(ModelError, match=r"without a place in the model: model\.layers\.0\.self_attn\.q_proj\.bias"):
        rebuild(loaded, tmp_path, weights=weights)


def test_wrong_shape_names_both(checkpoint, tmp_path):
    loaded = checkpoint("llama")
    with pytest.raises(ModelError, match=r"gate_proj\.weight has shape \[128, 64\] .* asks for \[96, 64\]"):
        rebuild(loaded, tmp_path, {"intermediate_size": 96})


def test_harmless_extras_are_ignored(checkpoint, tmp_path):
    loaded = checkpoint("qwen2")
    weights = {**loaded.weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
               "lm_head.weight": loaded.weights["model.embed_tokens.weight"]}
    found = rebuild(loaded, tmp_path, weights=weights)
    assert set(found.ignored) == {"model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"}


def test_untied_config_of_a_tied_checkpoint(checkpoint, tmp_path):
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        rebuild(checkpoint("qwen2"), tmp_path, {"tie_word_embeddings": False})


def test_fused_expert_checkpoint(checkpoint, tmp_path):
    loaded = checkpoint("qwen3_moe")
    weights = {name: tensor for name, tensor in loaded.weights.items() if ".experts." not in name}
    for index in range(2):
        weights[f"model.layers.{index}.mlp.experts.gate_up_proj"] = torch.zeros(8, 64, 64)
        weights[f"model.layers.{index}.mlp.experts.down_proj"] = torch.zeros(8, 64, 32)
    with pytest.raises(ModelError, match=r"experts of a layer in one tensor \(model\.layers\.0\.mlp\.experts\.gate_up"):
        rebuild(loaded, tmp_path, weights=weights)


def test_code_in_the_checkpoint_is_never_run(checkpoint, tmp_path):
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="model type 'evil' is defined by code inside the checkpoint"):
        rebuild(checkpoint("llama"), tmp_path,
                {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.Config"}})


def test_own_code_is_passed_over_where_transformers_has_the_architecture(checkpoint, tmp_path):
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    found = rebuild(checkpoint("llama"), tmp_path, {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}})
    assert type(found.model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "no_such_model"}, "config.json: transformers cannot read it"),
    ({"model_type": None, "architectures": None}, "config.json: transformers cannot read it"),
    ({"model_type": "t5"}, "t5 is an encoder-decoder"),
    ({"model_type": "gemma3"}, "gemma3 has vision_config"),
    ({"model_type": "vit"}, "no causal language model"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint holds only 30 tensors"),
    ({"num_hidden_layers": 0}, "no decoder blocks"),
    ({"hidden_size": "wide"}, "config.json: transformers cannot"),
    ({"num_attention_heads": 0}, "config.json: transformers cannot"),
    ({"intermediate_size": -4}, "config.json: transformers cannot"),
    ({"hidden_act": "no_such_activation"}, "config.json: transformers cannot build llama"),
    ({"rope_parameters": {"rope_type": "no_such_rope"}}, "config.json: transformers cannot"),
    ({"vocab_size": 16}, r"embed_tokens\.weight has shape \[512, 64\]"),
])
def test_unusable_configs(checkpoint, tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        rebuild(checkpoint("llama"), tmp_path, changes)


def test_no_linear_blocks(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    config.save_pretrained(tmp_path)
    specs = {str(number): TensorSpec(str(number), torch.float32, (1,)) for number in range(50)}
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no decoder blocks with linear layers"):
        skeleton.build(tmp_path, json.loads((tmp_path / "config.json").read_text()), specs)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    directory = tiny.make(tmp_path, "llama", vocab_size=300)
    with pytest.raises(ModelError, match=r"tokenizer has \d+ tokens, but the embedding only 300 rows"):
        open_tiny(directory)
