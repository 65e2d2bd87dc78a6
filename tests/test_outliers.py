"""The outlier features that the step `outliers` finds, against the unquantized model in transformers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool import decode, inspect, manifest, recipe
from qtool.methods import outliers
from qtool.models import calibration
from qtool.recipe import Recipe
from tests import tiny
from tests.cli.conftest import Run, make
from tests.cli.conftest import run as run  # a fixture

THRESHOLD = 2.0
SMALL = ["--set", "calibration.samples=6", "--set", "calibration.sequence_length=32", "--set",
         "calibration.held_out=0.0", "--dtype", "float32", "--quiet"]


def quantize(model: Path, out: Path, *more: object) -> dict[str, Any]:
    make("quantize", model, "--recipe", "llm-int8-outliers", "--set", f"scheme.outlier_threshold={THRESHOLD}", "--out",
         out, *SMALL, *more)
    return manifest.load(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two input channels of the attention in the first block are large, as those of large models are."""
    path = tiny.make(tmp_path_factory.mktemp("outliers") / "model", "llama")
    tensors = load_file(path / "model.safetensors")
    norm = tensors["model.layers.0.input_layernorm.weight"]
    norm.mul_(0.3)
    norm[7], norm[40] = 12.0, -3.0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def listed(model: Path) -> Path:
    quantize(model, model.with_name("listed"))
    return model.with_name("listed")


def inputs_of(model: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Inputs [T, K] of linears in the original, on the text that calibrated."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    spec = recipe.override(Recipe(), {"calibration.sequence_length": 32}).calibration
    ids = calibration.load_tokens(spec, model, 6, tiny.VOCABULARY).ids
    found: dict[str, torch.Tensor] = {}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: found.__setitem__(name, args[0].flatten(0, 1)))
    with torch.no_grad():
        network(ids)
    return found


def test_what_is_listed_is_there(model: Path, listed: Path) -> None:
    """In the first block, whose inputs are those of the original."""
    layers = {layer["name"]: layer for layer in manifest.load(listed)["layers"]}
    names = [f"model.layers.0.{path}" for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
    for name, x in inputs_of(model, names).items():
        reached = x.abs() >= THRESHOLD
        columns = reached.any(0).nonzero().flatten().tolist()
        assert layers[name]["outlier_features"] == len(columns) > 0
        told = layers[name]["outliers"]
        assert sorted(one["column"] for one in told) == columns
        assert [one["largest"] for one in told] == sorted((one["largest"] for one in told), reverse=True)
        for one in told:
            assert one["largest"] == pytest.approx(float(x[:, one["column"]].abs().max()), rel=1e-4)
            assert one["share"] == pytest.approx(float(reached[:, one["column"]].double().mean()), abs=1e-5)
    first = layers["model.layers.0.self_attn.q_proj"]["outliers"]
    assert first[0]["column"] == 7 and first[0]["share"] > 0.5


def test_the_weights_are_those_without_calibration(model: Path, listed: Path, tmp_path: Path) -> None:
    make("quantize", model, "--method", "llm-int8", "--dtype", "float32", "--out", tmp_path / "plain", "--quiet")
    assert (listed / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_options_and_order_of_steps(model: Path, listed: Path, tmp_path: Path) -> None:
    """`top` shortens the lists, not the counts; the place of the step among the others does not matter."""
    before = manifest.load(listed)["layers"]
    after = quantize(model, tmp_path / "short", "--set", "steps.outliers.top=1")["layers"]
    assert [layer["outlier_features"] for layer in after] == [layer["outlier_features"] for layer in before]
    assert [layer["outliers"] for layer in after] == [layer["outliers"][:1] for layer in before]
    none = quantize(model, tmp_path / "none", "--set", "scheme.outlier_threshold=0")["layers"]
    assert {layer["outlier_features"] for layer in none} == {0}
    turned = quantize(model, tmp_path / "turned", "--set", "steps=[rtn: {search: false}, outliers: {}]")["layers"]
    assert [layer["outliers"] for layer in turned] == [layer["outliers"] for layer in before]


def test_experts_and_other_grids(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "moe", "mixtral")
    layers = quantize(model, tmp_path / "out")["layers"]
    assert all("outlier_features" in layer for layer in layers if "experts" not in layer["name"])
    assert any("outlier_features" in layer for layer in layers if "experts" in layer["name"])
    make("quantize", model, "--set", "steps=[outliers, rtn]", "--group-size", "32", "--out", tmp_path / "int4", *SMALL)
    summary = inspect.summary(decode.open_model(str(tmp_path / "int4")))
    assert summary["outliers"]["threshold"] == 6.0 and summary["outliers"]["features"] >= 0


def test_inspect_shows_them(run: Run, listed: Path) -> None:
    status, out, _ = run("inspect", listed, "--outliers", "--json")
    result, layers = json.loads(out), manifest.load(listed)["layers"]
    assert status == 0 and result["outliers"] == {
        "threshold": THRESHOLD, "linears": sum(layer["outlier_features"] > 0 for layer in layers),
        "features": sum(layer["outlier_features"] for layer in layers)}
    assert [row["outliers"] for row in result["layers"]] == [layer["outliers"] for layer in layers]
    status, out, _ = run("inspect", listed, "--outliers", "--layers")
    assert status == 0 and f"{result['outliers']['features']} input columns of" in " ".join(out.split())
    largest = layers[0]["outliers"][0]
    assert any(line.split()[:4] == [layers[0]["name"], str(layers[0]["outlier_features"]), "7",
                                    f"{largest['largest']:.4g}"] for line in out.splitlines()), out
    rows = list(csv.DictReader(io.StringIO(run("inspect", listed, "--csv")[1])))
    assert [row["outlier_features"] for row in rows] == [str(layer["outlier_features"]) for layer in layers]


def test_inspect_says_how_to_get_them(run: Run, model: Path, tmp_path: Path) -> None:
    make("quantize", model, "--method", "llm-int8", "--out", tmp_path / "plain", "--quiet")
    status, out, _ = run("inspect", tmp_path / "plain")
    assert status == 0 and "--recipe llm-int8-outliers" in " ".join(out.split())
    assert json.loads(run("inspect", tmp_path / "plain", "--json")[1])["outliers"] == {
        "threshold": 6.0, "linears": None, "features": None}
    for path in (tmp_path / "plain", model):
        status, _, err = run("inspect", path, "--outliers")
        assert status == 2 and "--recipe llm-int8-outliers" in " ".join(err.split())
    assert json.loads(run("inspect", model, "--json")[1])["outliers"] is None
    status, _, err = run("inspect", "--system", "--outliers")
    assert status == 2 and "--outliers" in err


@given(st.lists(st.tuples(st.floats(0, 1000, width=32), st.integers(0, 5)), min_size=1, max_size=40),
       st.integers(0, 50))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_list(columns: list[tuple[float, int]], top: int) -> None:
    """All are counted, the largest are listed, ties in order of the columns; what reached nothing is not there."""
    largest = torch.tensor([size for size, _ in columns])
    share = torch.tensor([hits / 5 for _, hits in columns], dtype=torch.float64)
    told = outliers.features(largest, share, outliers.Options(top=top))
    wanted = sorted((-size, index) for index, (size, hits) in enumerate(columns) if hits)
    assert told["outlier_features"] == len(wanted)
    assert [one["column"] for one in told["outliers"]] == [index for _, index in wanted][:top]
    assert json.dumps(told, allow_nan=False)
