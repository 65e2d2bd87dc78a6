"""Redoing linears on the statistics that a run has kept: the same bytes as with text where the inputs are the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from safetensors import safe_open

from qtool import inspect, keeping, manifest, moments, outputs, pipeline, prepare, push, recipe, redo, redoing
from qtool.checkpoint import open_checkpoint
from qtool.decode import open_model
from qtool.errors import OutputError, PlanError, RecipeError
from tests import tiny
from tests.test_pipeline import SMALL, Silent, quantize
from tests.test_redo import SHARDS, again, given, verified

KEEP: dict[str, Any] = {"keep_statistics": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("kept") / "model", "llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def gptq(model: Path) -> Path:
    """A finished output with its statistics, to be copied."""
    quantize(model, model.parent / "gptq", **SHARDS, **KEEP)
    return model.parent / "gptq"


@pytest.fixture(scope="module")
def awq(model: Path) -> Path:
    quantize(model, model.parent / "awq", "awq", **SHARDS, **KEEP)
    return model.parent / "awq"


@pytest.fixture
def out(gptq: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gptq, tmp_path / "out"))


@pytest.fixture
def scaled(awq: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(awq, tmp_path / "scaled"))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def asked(model: Path, out: Path, *patterns: str, **settings: Any) -> redo.Redo:
    how = given(settings.pop("method", None), **settings)
    return redo.prepare(open_checkpoint(str(model)), out, how, patterns, "cpu")


def without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("text was run")

    monkeypatch.setattr(prepare, "tokens_of", never)
    monkeypatch.setattr(pipeline.Stream, "open", never)


@settings(max_examples=25, deadline=None)
@drawn(st.integers(1, 1300))
def test_half_of_a_symmetric_matrix_is_all_of_it(columns: int) -> None:
    matrix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(columns))
    matrix = matrix + matrix.T
    bands = torch.cat([band.reshape(-1) for band in moments.lower(matrix)])
    assert len(bands) == moments.lower_size(columns) <= (columns + moments.BAND) * columns / 2 + columns
    assert torch.equal(moments.from_lower(bands, columns), matrix)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "gptq", {}), ("llama", "gptq", {"steps__asymmetric__share": 1.0}),
    ("llama", "gptq-fast", {"calibration__held_out": 0.0}), ("llama", "awq+gptq", {}),
    ("llama", "equalize+gptq", {}), ("llama", "rotate+gptq", {}), ("llama", "gptq", {"calibration__samples": 64}),
    ("llama", "smoothquant", {"scheme__bits": 8, "scheme__group_size": -1}),
    ("llama", "nf4-gptq", {"scheme__group_size": 64}),
    ("llama", "aqlm", {"scheme__group_size": 8, "steps__aqlm__rounds": 1}), ("qwen3_moe", "gptq", {})]


@pytest.mark.parametrize("family, method, settings", CASES)
def test_equal_settings_give_equal_bytes(family: str, method: str, settings: dict[str, Any], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear again, on what was kept: nothing changes."""
    model = tiny.make(tmp_path / "model", family, num_hidden_layers=2)
    quantize(model, tmp_path / "out", method, **settings, **SHARDS, **KEEP)
    before, layers = everything(tmp_path / "out"), manifest.load(tmp_path / "out")["layers"]
    without_text(monkeypatch)
    result = again(model, tmp_path / "out", "*")
    after = everything(tmp_path / "out")
    assert {name: data for name, data in after.items() if name not in ("manifest.json", "README.md")} \
        == {name: data for name, data in before.items() if name not in ("manifest.json", "README.md")}
    assert result["layers"] == layers
    assert [one["statistics"] for one in result["redone"]] == ["kept"]
    assert result["redone"][0]["calibration"] == result["calibration"]


@pytest.mark.parametrize("changed", [
    {"scheme__bits": 8}, {"steps__gptq__damping": 0.1, "scheme__group_size": 16},
    {"method": "gptq-fast", "scheme__group_size": 32}, {"steps__asymmetric__residual": False}])
def test_other_settings_give_what_the_text_gives(changed: dict[str, Any], model: Path, out: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """One linear of a block: its inputs are those of the first run."""
    shutil.copytree(out, tmp_path / "text", ignore=shutil.ignore_patterns("statistics"))
    fast = changed.get("method") == "gptq-fast"
    how = given(changed.pop("method", None), **changed)
    again(model, tmp_path / "text", "*.1.mlp.down_proj", how=how)
    with monkeypatch.context() as patch:
        without_text(patch)
        again(model, out, "*.1.mlp.down_proj", how=how)
    before, after = (manifest.load(folder)["layers"] for folder in (tmp_path / "text", out))
    if fast:  # H is a sum in another order where some samples are paired with those of the unquantized model
        sources = [open_model(str(folder)) for folder in (tmp_path / "text", out)]
        assert not [name for name in sources[0].schemes if (sources[0].decoded(name) - sources[1].decoded(name)).abs()
                    .gt(1e-6).float().mean() > 0.01]
    else:
        assert weights(out) == weights(tmp_path / "text") and before == after
    verified(out, model)


def test_what_outputs_are_added_to_was_not_measured(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", steps__asymmetric__residual=False, **KEEP)
    assert asked(model, tmp_path / "out", "*.1.*", scheme__bits=8).kept is not None
    found = asked(model, tmp_path / "out", "*.1.*", steps__asymmetric__residual=True)
    assert found.kept is None and "wants to know what outputs are added to" in found.why


def test_a_linear_after_a_redone_one_has_the_inputs_of_the_first_run(model: Path, out: Path, tmp_path: Path) -> None:
    """The text would show it what the new codes before it give: there, and only there, the two differ."""
    text = Path(shutil.copytree(out, tmp_path / "text", ignore=shutil.ignore_patterns("statistics")))
    for folder in (text, out):
        again(model, folder, "*.1.*", how=given(scheme__bits=8))
    sources = [open_model(str(folder)) for folder in (text, out)]
    different = {name.rpartition(".")[2] for name in sources[0].schemes
                 if not torch.equal(sources[0].decoded(name), sources[1].decoded(name))}
    assert different and not different & {"q_proj", "k_proj", "v_proj"}
    errors = [{one["name"]: one["relative_error"] for one in manifest.load(folder)["layers"]} for folder in (text, out)]
    for name, error in errors[0].items():
        assert errors[1][name] == pytest.approx(error, rel=0.3)
    verified(out, model)


def test_part_of_a_scaled_block(model: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The channels stay as they are scaled, so one linear can be redone; norms and the others keep their bytes."""
    before = open_model(str(scaled))
    old = {name: before.read(name) for name in before.specs}
    first = {one["name"]: one for one in manifest.load(scaled)["layers"]}
    without_text(monkeypatch)
    result = again(model, scaled, "*.1.mlp.up_proj", "*.1.self_attn.v_proj", how=given(scheme__bits=8))
    after = open_model(str(scaled))
    for name, tensor in old.items():
        redone = name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight")
        assert torch.equal(tensor, after.read(name)) != redone
    for one in result["layers"]:
        assert {key: one.get(key) for key in ("awq", "rescaled")} \
            == {key: first[one["name"]].get(key) for key in ("awq", "rescaled")}
        if one["name"].endswith(("1.mlp.up_proj", "1.self_attn.v_proj")):
            assert one["relative_error"] < first[one["name"]]["relative_error"] / 20
    verified(scaled, model)


def test_scaling_anew_forgets_the_block(model: Path, scaled: Path) -> None:
    """Statistics of channels that are scaled otherwise now would be wrong."""
    result = again(model, scaled, "*.1.*", how=given(calibration__samples=16))
    assert result["redone"][0]["statistics"] is None
    assert sorted(result["statistics"]["files"]) == ["block-00000.safetensors", "block-00002.safetensors", "index.json"]
    assert not (scaled / "statistics" / "block-00001.safetensors").exists()
    found = asked(model, scaled, "*.1.*", scheme__bits=8)
    assert found.kept is None and "block has been redone since" in found.why
    assert asked(model, scaled, "*.2.*", scheme__bits=8).kept is not None
    again(model, scaled, "*.0.*", how=given("rtn", scheme__group_size=32))
    assert sorted(manifest.load(scaled)["statistics"]["files"]) == ["block-00002.safetensors", "index.json"]
    verified(scaled, model)


@pytest.mark.parametrize("settings, reason", [
    ({"calibration__samples": 16}, r"of another text: calibration.samples: 12 -> 16"),
    ({"calibration__source": "builtin:evaluation"}, r"calibration.source"),
    ({"steps__asymmetric__share": 0.5}, "asymmetric wants a share of 0.5"),
    ({"method": "awq", "scheme__group_size": 32}, "steps that scale the channels"),
    ({"scheme__bits": 8, "scheme__activations": "token", "scheme__group_size": -1}, "how the inputs of .* are rounded"),
])
def test_what_needs_the_text_and_why(settings: dict[str, Any], reason: str, model: Path, out: Path) -> None:
    found = asked(model, out, "*.1.*", **settings)
    assert found.kept is None
    note, = [text for text in redo.notes(found) if "the text is run through 2 blocks, because" in text]
    assert re.search(reason, note)
    told = redo.described(found)
    assert told["statistics"] is None and told["reason"] in note and told["samples"]


def test_the_folder_may_be_removed(model: Path, out: Path) -> None:
    for path in (out / "statistics").iterdir():
        path.unlink()
    (out / "statistics").rmdir()
    assert inspect.damage(str(out)) == []
    assert "statistics has been removed" in asked(model, out, "*.1.*").why
    again(model, out, "*.1.*", how=given(scheme__bits=8))
    verified(out, model)


@pytest.mark.parametrize("name", ["block-00001.safetensors", "index.json"])
def test_a_flipped_bit_is_found(name: str, model: Path, out: Path) -> None:
    path = out / "statistics" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    problem, = inspect.damage(str(out))
    assert str(path) in problem
    before = everything(out)
    with pytest.raises(OutputError, match=f"{name} is not as it was written; remove .*statistics, and the text is run"):
        again(model, out, "*.1.*", how=given(scheme__bits=8))
    assert everything(out) == before
    if name != "index.json":
        again(model, out, "*.2.*", how=given(scheme__bits=8))


class Stopped(Silent):
    """Ends at a linear, by what no step on the way handles, as a kill does (tests/trust has real ones)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def linear(self, name: str, error: float | None) -> None:
        if name.startswith(self.name):
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_with_its_statistics(model: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "new", progress=Stopped("model.layers.1.mlp.down"), **SHARDS, **KEEP)
    left = [path.name for path in (tmp_path / "new.partial" / "statistics").iterdir()]
    assert sorted(left) == ["block-00000.safetensors", "block-00001.safetensors.part"]
    quantize(model, tmp_path / "new", **SHARDS, **KEEP)
    assert everything(tmp_path / "new") == everything(out)


def test_a_stopped_redo_on_statistics_goes_on(model: Path, out: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    again(model, whole, "*.1.*", "*.2.*", how=given(scheme__bits=8))
    old = everything(out)
    with pytest.raises(KeyboardInterrupt):
        again(model, out, "*.1.*", "*.2.*", how=given(scheme__bits=8), progress=Stopped("model.layers.2.mlp.down"))
    assert everything(out) == old
    again(model, out, "*.1.*", "*.2.*", how=given(scheme__bits=8))
    assert everything(out) == everything(whole) and not list(tmp_path.glob("*.partial"))
    again(model, out, "*.1.*", "*.2.*", how=given(scheme__bits=8))  # has been done
    assert everything(out) == everything(whole)


@pytest.mark.parametrize("family, method, settings", [CASES[0], CASES[1], CASES[3], CASES[5], CASES[8]])
def test_the_bytes_are_planned(family: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Exactly for linears that all share as usual; at most that where experts pool or channels are scaled. Keeping
    changes nothing else."""
    model = tiny.make(tmp_path / "model", family, num_hidden_layers=1)
    quantize(model, tmp_path / "plain", method, **settings)
    made = recipe.override(recipe.preset(method), {**SMALL, **KEEP, **{key.replace("__", "."): value
                                                                       for key, value in settings.items()}})
    checkpoint = open_checkpoint(str(model))
    plan = outputs.make_plan(checkpoint, made, tmp_path / "out", "cpu")
    pipeline.run(checkpoint, plan, Silent())
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    written = sum(path.stat().st_size for path in (tmp_path / "out" / "statistics").glob("block-*"))
    assert plan.disk_bytes == plan.weight_bytes + plan.statistics_bytes + plan.temporary["peak"]
    if family == "llama" and not plan.scaling_steps:
        assert written == plan.statistics_bytes
    else:
        assert 0.3 * plan.statistics_bytes < written <= plan.statistics_bytes
    assert manifest.load(tmp_path / "out")["statistics"]["bytes"] > written  # the index too


def test_the_files_are_plain_safetensors_and_stay_here(out: Path) -> None:
    with safe_open(out / "statistics" / "block-00000.safetensors", "pt") as file:
        bands = file.get_tensor("model.layers.0.self_attn.q_proj.hessian")
        assert "model.layers.0.self_attn.k_proj.hessian" not in file.keys()  # noqa: SIM118 - no mapping
    eigenvalues = torch.linalg.eigvalsh(moments.from_lower(bands, 64).double())
    assert eigenvalues.min() > -1e-6 * eigenvalues.max()
    assert not [name for name in push.verified(out) if "statistics" in name]
    assert not [name for name in manifest.load(out)["outputs"] if "statistics" in name]


@pytest.mark.parametrize("method, settings, error, words", [
    ("rtn", {}, PlanError, "chooses codes without text"), ("q4_k_m", {}, PlanError, "cannot change a GGUF file"),
    ("gptq", {"outputs": [{"name": "a"}, {"name": "b"}]}, RecipeError, "leave outputs or keep_statistics out")])
def test_where_nothing_can_be_kept(method: str, settings: dict[str, Any], error: type[Exception], words: str,
                                   tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, head_dim=64,
                      num_hidden_layers=1)
    with pytest.raises(error, match=words):
        outputs.make_plan(open_checkpoint(str(model)),
                          recipe.override(recipe.preset(method), {**KEEP, **settings}), tmp_path / "out", "cpu")


def test_a_redo_keeps_or_not_as_the_output_does(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", **SHARDS)
    with pytest.raises(RecipeError, match="keeps the keep_statistics of the output"):
        asked(model, tmp_path / "out", "*.1.*", keep_statistics=True)
    assert "no statistics were kept" in asked(model, tmp_path / "out", "*.1.*").why
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()).get("statistics") is None
    assert not (tmp_path / "out" / keeping.FOLDER).exists() and redoing.recover(tmp_path / "out") is None
