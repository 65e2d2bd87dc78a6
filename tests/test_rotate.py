"""Rotated checkpoints: transformers computes the same logits, and every step, format and command works on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, evaluate, inspect, manifest, pipeline, recipe, rotate
from qtool.checkpoint import open_checkpoint
from qtool.errors import ModelError, PlanError, QtoolError, RecipeError
from qtool.plan import make_plan
from tests import tiny
from tests.test_pipeline import SMALL, Silent, contents

BIASED = {"mlp_bias": True, "attention_bias": True}


def made(folder: Path, family: str, **overrides: Any) -> Path:
    """A tiny checkpoint in float32, so that nothing but the rotation decides how close the logits are."""
    folder = tiny.make(folder, family, **overrides)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def run(model: Path, out: Path, method: str = "rotate", progress: Any = None, **settings: Any) -> dict[str, Any]:
    changes = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    checkpoint = open_checkpoint(str(model))
    plan = make_plan(checkpoint, recipe.override(recipe.preset(method), changes), out, "cpu")
    return pipeline.run(checkpoint, plan, progress or Silent())


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


@pytest.mark.parametrize("family, overrides", [
    ("llama", {}), ("llama", BIASED), ("llama", {"hidden_size": 72, "head_dim": 20}), ("qwen2", {}), ("qwen3", {}),
    ("mistral", {}), ("gemma", {}), ("mixtral", {}), ("qwen3_moe", {}),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_the_same_logits_from_other_weights(family: str, overrides: dict[str, Any], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "gemma", {"tie_word_embeddings": True})
    model = made(tmp_path / "model", family, **overrides)
    result = run(model, tmp_path / "out")
    expected = logits(model)
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-4 * expected.std()
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) - set(before) == set(result["rotation"]["untied"])
    matrices = [name for name, tensor in before.items() if tensor.dim() == 2]
    assert not any(torch.allclose(before[name], after[name], atol=1e-3) for name in matrices)


@pytest.mark.parametrize("options, changed", [
    ({"heads": False}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens",
                        "lm_head", "norm", "input_layernorm", "post_attention_layernorm"}),
    ({"residual": False}, {"v_proj", "o_proj"}),
])
def test_one_rotation_alone(options: dict[str, bool], changed: set[str], tmp_path: Path) -> None:
    model = made(tmp_path / "model", "llama")
    run(model, tmp_path / "out", steps=[{"rotate": options}])
    assert (logits(tmp_path / "out") - logits(model)).abs().max() < 1e-4 * logits(model).std()
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == changed


def test_a_rotation_is_what_the_papers_say(tmp_path: Path) -> None:
    """Against dense products: E R, W diag(g) R, R^T W, per-head R2 on both sides."""
    from qtool.hadamard import rotation

    model = made(tmp_path / "model", "llama")
    run(model, tmp_path / "out", seed=3)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    wide = rotation(64, 3).turn(torch.eye(64, dtype=torch.float64)).float()
    head = rotation(16, 3).turn(torch.eye(16, dtype=torch.float64)).float()
    layer = "model.layers.1."
    first, second = before[layer + "input_layernorm.weight"], before[layer + "post_attention_layernorm.weight"]
    expected = {
        "model.embed_tokens.weight": before["model.embed_tokens.weight"] @ wide,
        "lm_head.weight": (before["lm_head.weight"] * before["model.norm.weight"]) @ wide,
        "model.norm.weight": torch.ones(64),
        layer + "self_attn.q_proj.weight": before[layer + "self_attn.q_proj.weight"] * first @ wide,
        layer + "self_attn.v_proj.weight":
            torch.block_diag(head, head).T @ (before[layer + "self_attn.v_proj.weight"] * first) @ wide,
        layer + "self_attn.o_proj.weight":
            wide.T @ before[layer + "self_attn.o_proj.weight"] @ torch.block_diag(*[head] * 4),
        layer + "mlp.up_proj.weight": before[layer + "mlp.up_proj.weight"] * second @ wide,
        layer + "mlp.down_proj.weight": wide.T @ before[layer + "mlp.down_proj.weight"],
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_large_tensors_are_turned_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tmp_path / "model", "llama")
    run(model, tmp_path / "whole")
    monkeypatch.setattr("qtool.models.changes.PIECE", 1)
    run(model, tmp_path / "pieces")
    whole, pieces = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "pieces"))
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family, method, settings, words", [
    ("gemma3", "rotate", {}, r"gemma3_text.*model.layers.0, post_attention_layernorm.*post-norm.*residual=false"),
    ("stablelm", "rotate", {}, r"stablelm.*input_layernorm is no RMS norm .one that takes the mean off"),
    ("qwen2", "rotate+gptq", {}, r"shares the embedding's tensor.*untie=true.*0\.0 million"),
    ("phi3", "rotate", {}, r"phi3: no block has a v_proj.*heads=false"),
    ("llama", "rotate", {"steps": [{"rtn": {}}, {"rotate": {}}]}, "put it first"),
    ("llama", "rotate", {"steps": [{"rotate": {}}, {"rotate": {}}, {"rtn": {}}]}, "put it first, and once"),
    ("llama", "rotate", {"steps": [{"rotate": {"heads": False, "residual": False}}]}, "both false"),
    ("llama", "rotate", {"format": "compressed-tensors"}, "no step of rotate chooses codes.*--format hf"),
    ("llama", "rotate+gptq", {"format": "hf"}, "hf keeps dense weights"),
])
def test_what_cannot_be_says_why(family: str, method: str, settings: dict[str, Any], words: str, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "stablelm", {})
    model = tiny.make(tmp_path / "model", family)
    with pytest.raises((ModelError, RecipeError, PlanError), match=words) as caught:
        run(model, tmp_path / "out", method, **settings)
    assert isinstance(caught.value, QtoolError)
    assert not (tmp_path / "out").exists()


def test_gated_heads_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that multiplies its channels by something before o_proj cannot have its heads rotated."""
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def gated(*args: Any, **kwargs: Any) -> Any:
        output, weights = plain(*args, **kwargs)
        return output * torch.linspace(0.5, 2, output.shape[-1]), weights

    model = made(tmp_path / "model", "llama", attn_implementation="eager")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface",
                        lambda *_: gated)
    with pytest.raises(ModelError, match=r"between the heads of v_proj and o_proj.*heads=false"):
        run(model, tmp_path / "out")
    run(model, tmp_path / "out", steps=[{"rotate": {"heads": False}}])


def test_norms_after_a_part_leave_the_heads_free(tmp_path: Path) -> None:
    model = made(tmp_path / "model", "gemma3")
    run(model, tmp_path / "out", steps=[{"rotate": {"residual": False}}])
    assert (logits(tmp_path / "out") - logits(model)).abs().max() < 1e-4 * logits(model).std()


@pytest.mark.parametrize("method, settings", [
    ("rtn", {"steps": [{"rotate": {"untie": True}}, {"rtn": {}}]}),
    ("rotate+gptq", {"steps.rotate.untie": True}),
    ("awq", {"steps": [{"rotate": {"untie": True}}, {"awq": {}}, {"rtn": {}}]}),
])
def test_rotated_and_quantized(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The same bytes twice, close to the original, told by the manifest, and inspected like for like."""
    model = tiny.make(tmp_path / "model", "qwen2")
    results = [run(model, tmp_path / out, method, **settings) for out in ("a", "b")]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    source, base = decode.open_model(str(tmp_path / "a")), decode.open_model(str(model))
    assert all(layer["rescaled"] and layer["weight_error"] < 0.1 for layer in results[0]["layers"])
    assert results[0]["source"]["files"] == base.hashes()
    assert source.config["tie_word_embeddings"] is False
    rows = inspect.layers(source, manifest.load(tmp_path / "a"))
    told = inspect.compare(source, base, rows)
    assert not inspect.verify(source, rows) and told["equal_tensors"] > 0
    assert "model.embed_tokens.weight" in told["changed_tensors"]
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    figures = evaluate.evaluate([source], base, str(text), windows=2, context=16)["models"][0]
    assert 0 < figures["kl"]["mean"] < 0.1


def test_a_rotated_dense_checkpoint_is_not_held_against_the_original(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    run(model, tmp_path / "out")
    source, base = decode.open_model(str(tmp_path / "out")), decode.open_model(str(model))
    rows = inspect.layers(source, manifest.load(tmp_path / "out"))
    told = inspect.compare(source, base, rows)
    assert all(row["rescaled"] and row["weight_error"] is None for row in rows)
    assert all("norm" in name for name in told["changed_tensors"]) and not inspect.verify(source, rows)


def test_the_plan_counts_the_new_head(tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny.make(tmp_path / "model", "qwen2")))
    made_of = recipe.override(recipe.preset("rtn"), SMALL)
    plain = make_plan(model, made_of, tmp_path / "out", "cpu")
    rotated = make_plan(model, recipe.override(made_of, {"steps": [{"rotate": {"untie": True}}, {"rtn": {}}]}),
                        tmp_path / "out", "cpu")
    assert rotated.weight_bytes - plain.weight_bytes == tiny.VOCABULARY * 64 * 2
    assert rotated.source_bytes == plain.source_bytes
    assert rotated.to_json()["rotation"]["untied"] == ["lm_head.weight"]
    assert "lm_head" in dict(rotated.kept)


def test_rows_of_a_rotated_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny.make(tmp_path / "model", "llama")))
    plan = make_plan(checkpoint, recipe.preset("rotate"), tmp_path / "out", "cpu")
    seen = rotate.view(checkpoint, plan.rotated)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(seen.read_rows(name, 3, 9), seen.read(name)[3:9])


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    run(model, tmp_path / "whole", "rotate+gptq")

    class Interrupted(Silent):
        def block(self, *details: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", "rotate+gptq", Interrupted())
    progress = Silent()
    run(model, tmp_path / "cut", "rotate+gptq", progress)
    assert progress.done == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_rotation_spreads_channels_that_stand_out(tmp_path: Path) -> None:
    """Rounding to nearest with per-channel scales: one input channel of 30 times the weight spoils every row."""
    model = tiny.make(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, 5] *= 30
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    errors = []
    for out, steps in (("plain", [{"rtn": {}}]), ("rotated", [{"rotate": {}}, {"rtn": {}}])):
        result = run(model, tmp_path / out, "rtn", steps=steps, scheme__group_size=-1)
        errors.append({layer["name"]: layer["weight_error"] for layer in result["layers"]})
    hit = [name for name in errors[0] if name.endswith(("q_proj", "gate_proj", "up_proj"))]
    assert all(errors[1][name] < errors[0][name] for name in hit)
