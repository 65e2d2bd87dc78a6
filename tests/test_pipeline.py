"""A whole run over tiny models: what is written, that it is the same twice, and that a killed run goes on."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, evaluate, inspect, manifest, pipeline, recipe
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointError, OutputError, PlanError
from qtool.moments import HeldOut
from qtool.plan import make_plan
from tests import tiny

SMALL = {"scheme.group_size": 32, "calibration.samples": 12, "calibration.sequence_length": 32,
         "calibration.batch_tokens": 128}


class Silent:
    def start(self, blocks: int, done: int) -> None:
        self.done = done

    def message(self, text: str) -> None: ...
    def linear(self, name: str, error: float | None) -> None: ...
    def block(self, *details: Any) -> None: ...
    def finish(self) -> None: ...


def quantize(model: Path, out: Path, method: str = "gptq", restart: bool = False, progress: Any = None,
             **settings: Any) -> dict[str, Any]:
    changes = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    made = recipe.override(recipe.preset(method), changes)
    checkpoint = open_checkpoint(str(model))
    plan = make_plan(checkpoint, made, out, "cpu")
    return pipeline.run(checkpoint, plan, progress or Silent(), restart)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_goes_through(family: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", family)
    result = quantize(model, tmp_path / "out", scheme__group_size=16)
    assert result["layers"] and all(0 <= layer["relative_error"] < 0.2 for layer in result["layers"])
    source, decoded = decode.open_model(str(model)), decode.open_model(str(tmp_path / "out"))
    assert set(decoded.specs) == set(source.specs)
    for layer in result["layers"]:
        name = layer["stored"] + ".weight"
        difference = source.read(name).float() - decoded.read(name).float()
        assert difference.norm() / source.read(name).float().norm() < 0.35
    kept = set(source.specs) - {layer["stored"] + ".weight" for layer in result["layers"]}
    assert all(torch.equal(source.read(name), decoded.read(name)) for name in kept)


def test_two_runs_are_equal_byte_for_byte(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    for out in ("a", "b"):
        quantize(model, tmp_path / out)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_manifest_tells_what_was_made(method: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "qwen2")
    result = quantize(model, tmp_path / "out", method)
    assert manifest.load(tmp_path / "out") == json.loads(json.dumps(result))
    for name, digest in result["outputs"].items():
        assert manifest.file_hash(tmp_path / "out" / name) == digest
    assert (result["calibration"] is None) == (method == "rtn")
    assert result["totals"]["bits_per_weight"] == pytest.approx(4.5, abs=0.3)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "manifest.json", "README.md", "tokenizer.json"} <= names
    assert not [name for name in names if "stream" in name or "journal" in name or name.endswith(".part")]


def test_gptq_with_an_asymmetric_target(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    result = quantize(model, tmp_path / "out", steps=[{"asymmetric": {}}, {"gptq": {}}, {"refine": {}}])
    factors = [layer["asymmetric"] for layer in result["layers"]]
    assert all(0 <= factor <= 1 for factor in factors)
    assert any(factor > 0 for factor in factors[7:])
    assert all(factor == 0 for factor in factors[:3])  # the first block's inputs are not quantized yet
    followed = [layer for layer in result["layers"] if "residual" in layer]
    assert {layer["name"].rpartition(".")[2] for layer in followed} == {"down_proj", "o_proj"}
    assert all(0 <= layer["residual"] <= 1 for layer in followed)
    plain = quantize(model, tmp_path / "plain", steps=[{"asymmetric": {"residual": False}}, {"gptq": {}}])
    assert not any("residual" in layer for layer in plain["layers"])


LEVELS = ["llm-int8", "nf4", "fp4", "nf4-gptq", "fp8", "fp8-static", "w8a8", "mxfp4", "nvfp4", "lloyd4"]


@pytest.mark.parametrize("method", LEVELS)
def test_every_preset_goes_through_and_comes_back(method: str, tmp_path: Path) -> None:
    """Another group size than SMALL's is the preset's own; the decoded weights are close, and the model evaluates."""
    model = tiny.make(tmp_path / "model", "llama")
    made = recipe.override(recipe.preset(method), {key: value for key, value in SMALL.items() if "scheme" not in key})
    checkpoint = open_checkpoint(str(model))
    plan = make_plan(checkpoint, made, tmp_path / "out", "cpu")
    result = pipeline.run(checkpoint, plan, Silent())
    source, decoded = decode.open_model(str(model)), decode.open_model(str(tmp_path / "out"))
    limit = 0.05 if plan.recipe.scheme.bits == 8 else 0.3
    for layer in result["layers"]:
        name = layer["stored"] + ".weight"
        difference = source.read(name).float() - decoded.read(name).float()
        assert difference.norm() / source.read(name).float().norm() < limit
    assert {scheme.label for scheme in decoded.schemes.values()} == {plan.recipe.scheme.label}
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    figures = evaluate.evaluate([decoded], source, str(text), windows=2, context=16)["models"][0]
    assert 0 < figures["kl"]["mean"] < 0.1


@pytest.mark.parametrize("method", ["gptq", "equalize+gptq"])
def test_statistics_are_gone_when_their_linears_are_solved(method: str, tmp_path: Path) -> None:
    """At once: Python's collector may come when the statistics of several blocks are in memory."""
    alive: list[int] = []

    class Counting(Silent):
        def linear(self, name: str, error: float | None) -> None:
            alive.append(sum(type(one) is HeldOut for one in gc.get_objects()))

    model = tiny.make(tmp_path / "model", "llama")
    gc.collect()
    gc.disable()
    try:
        quantize(model, tmp_path / "out", method, progress=Counting())
    finally:
        gc.enable()
    assert max(alive) == 1


@pytest.mark.parametrize("computing", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["awq", "awq+gptq", "smoothquant", "equalize"])
def test_scaled_channels_leave_the_model_as_it_was(method: str, computing: torch.dtype, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are other ones, the function is nearly the same; and scaling helps where channels differ much."""
    monkeypatch.setattr("qtool.plan.choose_compute_dtype", lambda *_: computing)
    model = tiny.make(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    spread = torch.exp(1.5 * torch.randn(tensors["model.layers.0.input_layernorm.weight"].shape,
                                         generator=torch.Generator().manual_seed(0)))
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name] = (tensors[name].float() * spread).to(tensors[name].dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 80)
    group = {} if method == "smoothquant" else {"scheme__group_size": 32}
    errors = []
    preset, own = ("gptq", ["equalize", "gptq"]) if method == "equalize" else (method, None)
    plain = ["gptq"] if method == "equalize" else [{"rtn": {"search": True}}]
    for name, steps in ((method, own), ("plain", plain)):
        made = {key: value for key, value in SMALL.items() if "scheme" not in key}
        changes = {**made, **{key.replace("__", "."): value for key, value in group.items()}}
        if steps is not None:
            changes["steps"] = steps
        checkpoint = open_checkpoint(str(model))
        plan = make_plan(checkpoint, recipe.override(recipe.preset(preset), changes), tmp_path / name, "cpu")
        result = pipeline.run(checkpoint, plan, Silent())
        figures = evaluate.evaluate([decode.open_model(str(tmp_path / name))], decode.open_model(str(model)), str(text),
                                    windows=4, context=16)["models"][0]
        errors.append(figures["kl"]["mean"])
        rescaled = {layer["name"].rpartition(".")[2] for layer in result["layers"] if layer.get("rescaled")}
        assert (rescaled >= {"q_proj", "gate_proj", "down_proj"}) == (name == method)
    assert errors[0] < 0.8 * errors[1]


def test_scaled_channels_and_inspect(tmp_path: Path) -> None:
    """Weights whose channels were scaled are not held against the original's; everything else still is."""
    model = tiny.make(tmp_path / "model", "llama")
    quantize(model, tmp_path / "out", "awq")
    source, base = decode.open_model(str(tmp_path / "out")), decode.open_model(str(model))
    rows = inspect.layers(source, manifest.load(tmp_path / "out"))
    told = inspect.compare(source, base, rows)
    assert not inspect.verify(source, rows)
    assert all("layernorm" in name for name in told["changed_tensors"])


def test_nf4_is_what_bitsandbytes_makes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model = tiny.make(tmp_path / "model", "llama")
    quantize(model, tmp_path / "out", "nf4", scheme__group_size=64, scheme__double_quant=True)
    dense, stored = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in (name for name in dense if name.endswith("_proj.weight")):
        codes, state = functional.quantize_4bit(dense[name], blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(stored[name], codes) and torch.equal(stored[f"{name}.absmax"], state.absmax)
        assert torch.equal(stored[f"{name}.nested_absmax"], state.state2.absmax)


def test_the_solver_sees_rounded_inputs(tmp_path: Path) -> None:
    """Beside 8-bit inputs the codes are chosen for these; they differ from those for exact inputs."""
    model = tiny.make(tmp_path / "model", "llama")
    codes = []
    for activations in ("token", None):
        quantize(model, tmp_path / str(activations), "w8a8", scheme__bits=8, scheme__group_size=-1,
                 scheme__activations=activations, scheme__symmetric=True)
        source = decode.open_model(str(tmp_path / str(activations)))
        codes.append(torch.cat([source.read_quantized(name).codes.flatten() for name in source.schemes]))
    assert 0 < (codes[0] != codes[1]).float().mean() < 0.5


def test_every_scheme_of_a_shared_input_gets_the_asymmetric_target(tmp_path: Path) -> None:
    """A step takes the statistics apart when it has done with them; linears with other bits need them as well."""
    model = tiny.make(tmp_path / "model", "llama")
    result = quantize(model, tmp_path / "out", steps=[{"asymmetric": {"factor": 0.5}}, {"gptq": {}}],
                      rules=[{"match": "*.q_proj", "bits": 8}, {"match": "*.v_proj", "bits": 2}])
    assert {layer["asymmetric"] for layer in result["layers"]} == {0.5}


def test_spilled_activations_give_the_same_bytes(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    quantize(model, tmp_path / "ram")
    quantize(model, tmp_path / "file", memory_budget_gb=1e-9)
    same = [load_file(tmp_path / out / "model.safetensors") for out in ("ram", "file")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_several_shards(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    quantize(model, tmp_path / "one")
    quantize(model, tmp_path / "many", shard_gb=5e-5)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])


class KilledAt(Silent):
    """Stops the process at one block, as a power cut would."""

    def __init__(self, block: int) -> None:
        self.at = block

    def linear(self, name: str, error: float | None) -> None:
        if f".{self.at}.mlp" in name:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method, settings", [("gptq", {}), ("rtn", {}), (
    "gptq", {"steps": [{"asymmetric": {}}, {"gptq": {}}], "memory_budget_gb": 1e-9})])
def test_a_killed_run_goes_on_and_ends_the_same(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=4)
    quantize(model, tmp_path / "whole", method, **settings)
    for block in (0, 2, 3):
        child = subprocess.Popen([
            sys.executable, "-c",
            "import sys, json; from pathlib import Path; from tests.test_pipeline import *\n"
            f"torch.set_num_threads({torch.get_num_threads()})\n"  # the order of sums in matrix products depends on it
            f"quantize(Path({str(model)!r}), Path({str(tmp_path / 'killed')!r}), {method!r}, "
            f"progress=KilledAt({block}), **json.loads({json.dumps(json.dumps(settings))}))"],
            cwd=Path(__file__).parent.parent)
        assert child.wait(120) == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    progress = Silent()
    quantize(model, tmp_path / "killed", method, progress=progress, **settings)
    assert progress.done == 3  # only the block under way was lost
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_another_recipe_is_refused_and_restart_discards(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")

    class Interrupted(Silent):
        def block(self, *details: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", progress=Interrupted())
    with pytest.raises(OutputError, match=r"recipe.scheme.bits: 4 -> 3(.|\n)*--restart"):
        quantize(model, tmp_path / "out", scheme__bits=3)
    quantize(model, tmp_path / "out", scheme__bits=3, restart=True)
    quantize(model, tmp_path / "plain", scheme__bits=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    before, progress = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}, Interrupted()
    assert quantize(model, tmp_path / "out", scheme__bits=3, progress=progress) == manifest.load(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(OutputError, match=r"not empty(.|\n)*recipe.scheme.bits: 3 -> 2(.|\n)*another --out"):
        quantize(model, tmp_path / "out", scheme__bits=2)


def test_two_processes_on_one_output(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    refused = []

    class Second(Silent):
        def block(self, *details: Any) -> None:
            with pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
                quantize(model, tmp_path / "out")
            refused.append(time.monotonic())

    quantize(model, tmp_path / "out", progress=Second())
    assert len(refused) == 3


def test_nan_in_a_weight_is_named(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for method in ("gptq", "rtn"):
        with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight: 1 of 8192 values"):
            quantize(model, tmp_path / f"out-{method}", method)
        assert not (tmp_path / f"out-{method}").exists()


@pytest.mark.parametrize("settings, words", [
    ({"scheme__group_size": 128}, r"64 input columns of model.layers.0.self_attn.q_proj.*64, 32.*--group-size auto"),
    ({"rules": [{"match": "*.nothing", "bits": 8}]}, r"'\*.nothing' decides nothing"),
    ({"rules": [{"match": "*", "skip": True}]}, "no linear is left"),
    ({"rules": [{"match": "lm_head", "bits": 8}]}, "output head lm_head"),
])
def test_plans_that_cannot_be(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match=words):
        quantize(model, tmp_path / "out", **settings)
    assert not (tmp_path / "out.partial").exists()


def test_rules_and_group_auto(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    result = quantize(model, tmp_path / "out", scheme__group_size="auto", rules=[
        {"match": "*.layers.0.*", "skip": True}, {"match": "*.down_proj", "bits": 8}])
    schemes = {layer["name"]: layer["scheme"] for layer in result["layers"]}
    assert not any(".layers.0." in name for name in schemes)
    assert {scheme["group_size"] for scheme in schemes.values()} == {64}
    assert {scheme["bits"] for name, scheme in schemes.items() if name.endswith("down_proj")} == {8}
    decoded = decode.open_model(str(tmp_path / "out"))
    assert decoded.schemes["model.layers.2.mlp.down_proj"].bits == 8
