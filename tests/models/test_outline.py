"""The skeleton without transformers: the same as with it, or none."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.gguf_metadata import describe
from qtool.models import outline, skeleton
from qtool.tensors import TensorSpec
from tests import tiny
from tests.models.loaded import open_tiny, specs_of

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("family", "overrides"), [
    ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {}), ("qwen2", {}), ("qwen2", {"tie_word_embeddings": False}), ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
])
def test_equal_to_the_one_by_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    loaded = open_tiny(tiny.make(tmp_path / "model", family, **overrides))
    found = outline.build(loaded.directory, loaded.config, specs_of(loaded.weights))
    assert found is not None
    assert replace(found, model=loaded.skeleton.model) == loaded.skeleton
    assert list(found.parameters) == list(loaded.skeleton.parameters)
    for index in range(len(found.blocks)):
        assert list(found.block_linears(index).items()) == list(loaded.skeleton.block_linears(index).items())
        assert found.block_parameters(index) == loaded.skeleton.block_parameters(index)


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - set(outline.FAMILIES)))
def test_other_families_are_left_to_transformers(checkpoint, family: str) -> None:
    loaded = checkpoint(family)
    assert outline.build(loaded.directory, loaded.config, specs_of(loaded.weights)) is None


def changed(specs: dict[str, TensorSpec], **shapes: tuple[int, ...] | None) -> dict[str, TensorSpec]:
    for name, shape in shapes.items():
        name = name.replace("__", ".")
        if shape is None:
            del specs[name]
        else:
            specs[name] = TensorSpec(name, torch.bfloat16, shape)
    return specs


def test_anything_unusual_is_left_to_transformers(checkpoint) -> None:
    loaded = checkpoint("llama")
    directory, config = loaded.directory, loaded.config
    fresh = specs_of(loaded.weights)
    assert outline.build(directory, config, fresh) is not None
    for specs in (changed(dict(fresh), model__norm__weight=None), changed(dict(fresh), model__norm__weight=(3,)),
                  changed(dict(fresh), model__layers__0__extra=(3, 3)), changed(dict(fresh), lm_head__weight=None)):
        assert outline.build(directory, config, specs) is None
    for change in ({"hidden_size": "64"}, {"num_hidden_layers": 10**9}, {"vocab_size": True}, {"auto_map": {}},
                   {"model_type": ["llama"]}, {"num_attention_heads": 0}, {"head_dim": 7},
                   {"head_dim": "7"}, {"num_key_value_heads": [1]}):
        assert outline.build(directory, {**config, **change}, fresh) is None


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    loaded = open_tiny(tiny.make(tmp_path / "model", "llama"))
    specs = specs_of(loaded.weights)
    path = loaded.directory / "tokenizer.json"
    for text in ("{", "[]", json.dumps({"model": {"type": "WordLevel", "vocab": {str(i): i for i in range(10**4)},
                                                  "unk_token": "0"}})):
        path.write_text(text)
        assert outline.build(loaded.directory, loaded.config, specs) is None


def test_rounding_does_not_import_transformers(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "qwen3")
    code = ("import sys; from qtool import cli; sys.argv = ['qtool', 'quantize', sys.argv[1], '--method', 'rtn', "
            "'--group-size', '32', '--out', sys.argv[2], '--quiet']\n"
            "try: cli.main()\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "assert 'transformers' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(model), str(tmp_path / "out")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_wrong_weights_still_have_their_message(tmp_path: Path) -> None:
    loaded = open_tiny(tiny.make(tmp_path / "model", "llama"))
    specs = changed(specs_of(loaded.weights), model__norm__weight=(3,))
    assert outline.build(loaded.directory, loaded.config, specs) is None
    with pytest.raises(skeleton.ModelError, match=r"model\.norm\.weight has shape \[3\]"):
        skeleton.build(loaded.directory, loaded.config, specs)


@pytest.mark.parametrize("family", outline.FAMILIES)
def test_stated_values_are_those_of_transformers(checkpoint, family: str) -> None:
    """Of what a GGUF file says: with the values of the config's class, and with those that config.json states."""
    loaded = checkpoint(family)
    found = outline.stated(loaded.config)
    assert found is not None
    full = skeleton.config_values(loaded.directory, loaded.config, specs_of(loaded.weights))
    for values in (found, outline.stated(as_before(loaded.config))):
        assert values is not None
        rows, name = loaded.config["vocab_size"], "model"
        ours, theirs = (describe(one, loaded.directory, rows, name) for one in (values, full))
        assert {key: value.value for key, value in ours.keys.items()} \
            == {key: value.value for key, value in theirs.keys.items()}
        assert ours.notes == theirs.notes and (ours.heads, ours.kv_heads) == (theirs.heads, theirs.kv_heads)


def as_before(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers wrote it before version 5."""
    rope = config["rope_parameters"]
    return {**{key: value for key, value in config.items() if key != "rope_parameters"},
            "rope_theta": rope["rope_theta"], "rope_scaling": None}


@pytest.mark.parametrize("change", [
    {"num_key_value_heads": None}, {"num_key_value_heads": "3"}, {"rms_norm_eps": None}, {"rms_norm_eps": "tiny"},
    {"rope_theta": 1e4}, {"rope_parameters": None}, {"hidden_act": None}, {"max_position_embeddings": True},
    {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, {"head_dim": -1},
    {"rope_parameters": ["rope_theta", "rope_type"]}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"model_type": "gemma"}, {"use_sliding_window": True}, {"sliding_window": 0},
], ids=str)
def test_values_that_are_not_stated_are_left_to_transformers(checkpoint, change: dict[str, Any]) -> None:
    config = checkpoint("llama").config
    assert outline.stated(config) is not None and outline.stated({**config, **change}) is None
