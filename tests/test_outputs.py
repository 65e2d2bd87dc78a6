"""Several outputs from one calibration: each is whole, the first is what it is alone, and a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool import decode, inspect, manifest, pipeline, prepare, recipe
from qtool.checkpoint import open_checkpoint
from qtool.console import Silent
from qtool.errors import PlanError, RecipeError
from qtool.models import statistics
from qtool.outputs import make_plan
from qtool.recipe import Recipe
from tests import tiny

ROOT = Path(__file__).parent.parent
COMMON = """
scheme: {bits: 4, group_size: 32}
calibration: {samples: 12, sequence_length: 32}
"""
STEPS = "steps: [{asymmetric: {share: 0.5}}, {gptq: {}}, {refine: {}}]\n"
SEVERAL = """
outputs:
  - {name: int4}
  - {name: int8, scheme: {bits: 8, group_size: 64}, steps: [gptq], format: gptq}
  - {name: nf4, scheme: {grid: nf4, group_size: 64}, format: bitsandbytes, steps: [gptq, refine],
     rules: [{match: '*.layers.0.*', skip: true}, {match: '*.down_proj', group_size: 64}]}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("outputs") / "tiny", "llama")


def made(text: str) -> Recipe:
    return recipe.parse(text, "r.yaml")


def quantize(model: Path, out: Path, asked: Recipe, progress: Any = None) -> dict[str, Any]:
    checkpoint = open_checkpoint(str(model))
    return pipeline.run(checkpoint, make_plan(checkpoint, asked, out, "cpu"), progress or Silent())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_tensors(left: Path, right: Path) -> bool:
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_output_is_whole_and_the_first_is_what_it_is_alone(model: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    collect = statistics.collect
    monkeypatch.setattr(statistics, "collect", lambda *given: passes.append(1) or collect(*given))
    alone = quantize(model, tmp_path / "alone", made(STEPS + COMMON))
    once = len(passes)
    result = quantize(model, tmp_path / "out", made(STEPS + COMMON + SEVERAL))
    assert len(passes) == 2 * once  # three outputs, as many passes as for one
    assert same_tensors(tmp_path / "out" / "int4", tmp_path / "alone")
    first = manifest.load(tmp_path / "out" / "int4")
    assert first["layers"] == alone["layers"] and first["totals"] == alone["totals"]
    for name, label in (("int4", "int4-g32"), ("int8", "int8-g64"), ("nf4", "nf4-g64")):
        source = decode.open_model(str(tmp_path / "out" / name))
        record = manifest.load(tmp_path / "out" / name)
        assert not inspect.verify(source, inspect.layers(source, record))
        assert {scheme.label for scheme in source.schemes.values()} == {label}
        assert record["solved_with"] == {"output": name, "outputs": ["int4", "int8", "nf4"], "propagated": "int4"}
        assert record["recipe"]["outputs"] == [] and (tmp_path / "out" / name / "tokenizer.json").is_file()
    assert len(decode.open_model(str(tmp_path / "out" / "nf4")).schemes) == 14
    assert result["several"] == ["int4", "int8", "nf4"] and len(result["layers"]) == 21 + 21 + 14
    assert result["outputs"]["int8/model.safetensors"] == manifest.file_hash(
        tmp_path / "out" / "int8" / "model.safetensors")
    errors = {name: manifest.errors([one for one in result["layers"] if one["name"].startswith(name)])["median"]
              for name in ("int4", "int8")}
    assert errors["int8"] < errors["int4"] / 50


def test_through_the_unquantized_model_the_order_does_not_matter(model: Path, tmp_path: Path) -> None:
    """Every output is then solved on the inputs of the model itself, whatever stands beside it."""
    text = ("steps: [gptq]\npropagate: original\n" + COMMON + "outputs: [{name: a, scheme: {bits: 2, group_size: 32}}, "
            "{name: b, scheme: {bits: 4, group_size: 32}}]\n")
    asked = made(text)
    quantize(model, tmp_path / "ab", asked)
    quantize(model, tmp_path / "ba", asked.model_copy(update={"outputs": asked.outputs[::-1]}))
    assert same_tensors(tmp_path / "ab" / "a", tmp_path / "ba" / "a")
    assert same_tensors(tmp_path / "ab" / "b", tmp_path / "ba" / "b")
    quantize(model, tmp_path / "through", asked.model_copy(update={"propagate": None}))
    assert not same_tensors(tmp_path / "ab" / "b", tmp_path / "through" / "b")  # of 2 bits, so it does matter there


def test_without_data(model: Path, tmp_path: Path) -> None:
    asked = made("steps: [rtn]\nscheme: {bits: 4, group_size: 32}\n"
                 "outputs: [{name: a}, {name: b, scheme: {bits: 8, group_size: 64}}]\n")
    quantize(model, tmp_path / "out", asked)
    for name, alone in asked.each().items():
        quantize(model, tmp_path / name, alone)
        assert same_tensors(tmp_path / name, tmp_path / "out" / name)


def test_scaled_channels_are_shared(model: Path, tmp_path: Path) -> None:
    """awq's scales are folded once; all outputs have the same norms, and each undoes the same scales."""
    quantize(model, tmp_path / "out", made("steps: [{awq: {samples: 2}}, {gptq: {}}]\n" + COMMON
                                           + "outputs: [{name: a}, {name: b, scheme: {bits: 8, group_size: 32}}]\n"))
    quantize(model, tmp_path / "alone", made("steps: [{awq: {samples: 2}}, {gptq: {}}]\n" + COMMON))
    assert same_tensors(tmp_path / "out" / "a", tmp_path / "alone")
    one, other = (load_file(tmp_path / "out" / name / "model.safetensors") for name in "ab")
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(one[norm], other[norm])
    assert not torch.equal(one[norm], load_file(model / "model.safetensors")[norm])


class KilledAt(Silent):
    def linear(self, name: str, error: float | None) -> None:
        if ".1.mlp.down" in name:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_and_is_known_when_finished(model: Path, tmp_path: Path) -> None:
    asked = made(STEPS + COMMON + SEVERAL)
    child = subprocess.run([
        sys.executable, "-c", "from pathlib import Path; from tests.test_outputs import *\ntorch.set_num_threads(1)\n"
        f"quantize(Path({str(model)!r}), Path({str(tmp_path / 'out')!r}), made(STEPS + COMMON + SEVERAL), KilledAt())"],
        cwd=ROOT)
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    quantize(model, tmp_path / "out", asked)
    quantize(model, tmp_path / "whole", asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    checkpoint = open_checkpoint(str(model))
    told = prepare.dry_run(checkpoint, make_plan(checkpoint, asked, tmp_path / "out", "cpu"))
    assert told["output"] == {"state": "finished", "differs": []}
    assert [one["name"] for one in told["outputs"]] == ["int4", "int8", "nf4"]
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["weight_bytes"] == record["totals"]["weight_bytes"]
    alone = make_plan(checkpoint, asked.each()["int4"], tmp_path / "x", "cpu")
    assert told["disk_bytes"] > alone.disk_bytes
    assert told["memory"]["peak"] - told["memory"]["runtime"] > alone.peak_memory - alone.memory["runtime"]


@pytest.mark.parametrize(("text", "message"), [
    ("steps: [gptq]\noutputs: [{name: a}, {name: b, steps: [awq, gptq]}]",
     "a and b: steps that change the weights .* must be the same"),
    ("steps: [gptq]\noutputs: [{name: a}, {name: b, steps: [rtn]}]",
     "a and b: one is solved on statistics and the other is not"),
    ("steps: [asymmetric, gptq]\noutputs: [{name: a}, {name: b}]",
     "asymmetric would make b make up for the errors of a"),
    ("steps: [gptq]\noutputs: [{name: a, rules: [{match: '*.down_proj', skip: true}]}, {name: b}]",
     r"model.layers.0.mlp.down_proj is quantized in b only; put the output that leaves out less first"),
    ("steps: [gptq]\noutputs: [{name: a}, {name: b, scheme: {bits: 8, group_size: -1, activations: token}}]",
     "the inputs of .* are rounded differently, so their statistics differ"),
    ("steps: [asymmetric, gptq]\npropagate: original\noutputs: [{name: a}, {name: b, steps: [gptq]}]",
     "nothing for the step asymmetric"),
    ("steps: [gptq]\noutputs: [{name: a}, {name: b, scheme: {bits: 5, group_size: 32}}]", "output b: .*not the 5"),
])
def test_what_one_stream_cannot_serve(text: str, message: str, model: Path) -> None:
    asked = recipe.override(made(text), {"calibration.samples": 4, "calibration.sequence_length": 32})
    asked = recipe.override(asked, {"scheme.group_size": 32})
    with pytest.raises(PlanError, match=message):
        make_plan(open_checkpoint(str(model)), asked, None, "cpu")


@pytest.mark.parametrize(("text", "message"), [
    ("outputs: [{name: a}, {name: a}]", "two of the outputs have one name: a, a"),
    ("outputs: [{name: ../a}]", "outputs.0.name.*: .*pattern"),
    ("propagate: original", "propagate is for a recipe with outputs"),
    ("outputs: [{name: a, scheem: {}}]", "unknown key 'outputs.0.scheem'.* did you mean 'scheme'"),
    ("outputs: [{name: a}]\nbudget: 3.5", "a budget and kv_cache are for runs with one output"),
])
def test_bad_outputs(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made(text)
