"""Redoing some linears of a finished output: what changes, what stays byte for byte, and what a kill leaves."""

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

from qtool import decode, flags, inspect, manifest, redo, redoing
from qtool.checkpoint import open_checkpoint
from qtool.errors import InputError, OutputError, PlanError, RecipeError
from tests import tiny
from tests.test_pipeline import Silent, contents, quantize

SHARDS = {"shard_gb": 5e-5}


def given(method: str | None = None, **settings: Any) -> flags.Given:
    return flags.Given(method, None, {}, [f"{key.replace('__', '.')}={json.dumps(value)}"
                                          for key, value in settings.items()])


def again(model: Path, out: Path, *patterns: str, how: flags.Given | None = None,
          progress: Any = None) -> dict[str, Any]:
    redoing.recover(out)
    asked = redo.prepare(open_checkpoint(str(model)), out, how or given(), patterns, "cpu")
    return redoing.run(asked, progress or Silent())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("redo") / "model", "llama", num_hidden_layers=4)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def verified(out: Path, against: Path) -> decode.Source:
    source, base = decode.open_model(str(out)), decode.open_model(str(against))
    rows = inspect.layers(source, manifest.load(out))
    inspect.compare(source, base, rows)
    assert inspect.verify(source, rows) == []
    return source


@pytest.mark.parametrize("method, settings", [
    ("rtn", {}), ("gptq", {}), ("gptq-fast", {"memory_budget_gb": 1e-9}), ("awq", {}),
    ("w8a8", {"scheme__bits": 8, "scheme__group_size": -1}), ("nf4", {"scheme__group_size": 64}),
    ("aqlm", {"scheme__group_size": 8, "steps__aqlm__rounds": 1}),
    ("fp8-static", {"scheme__group_size": -1})])
def test_equal_settings_give_equal_bytes(method: str, settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """The stream is run through the finished blocks exactly as it ran when they were solved."""
    quantize(model, tmp_path / "out", method, **settings, **SHARDS)
    before = weights(tmp_path / "out")
    result = again(model, tmp_path / "out", "model.layers.2.*")
    assert weights(tmp_path / "out") == before
    assert len(result["redone"]) == 1 and len(result["redone"][0]["linears"]) == 7
    verified(tmp_path / "out", model)


def test_more_bits_for_one_block(model: Path, tmp_path: Path) -> None:
    first = quantize(model, tmp_path / "out", **SHARDS)
    before = contents(tmp_path / "out")
    result = again(model, tmp_path / "out", "model.layers.1.*", how=given(scheme__bits=8))
    after = contents(tmp_path / "out")
    index = json.loads(after["model.safetensors.index.json"])["weight_map"]
    touched = {file for name, file in index.items() if name.startswith("model.layers.1.") and "_proj" in name}
    assert touched and {name for name in weights(tmp_path / "out") if before[name] != after[name]} == touched
    assert set(before) == set(after)
    errors = [{layer["name"]: layer["relative_error"] for layer in one["layers"]} for one in (first, result)]
    for name, error in errors[0].items():
        assert errors[1][name] < error / 20 if ".layers.1." in name else errors[1][name] == error
    source = verified(tmp_path / "out", model)
    assert {name: scheme.bits for name, scheme in source.schemes.items()} \
        == {name: 8 if ".layers.1." in name else 4 for name in source.schemes}
    assert result["totals"]["weight_bytes"] == source.weight_bytes()
    told = result["redone"][0]
    assert told["patterns"] == ["model.layers.1.*"] and told["calibration"]["samples"] == 12
    assert b"Redone" in after["README.md"]


def test_transformers_loads_the_mixed_schemes(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    quantize(model, tmp_path / "out", "rtn")
    again(model, tmp_path / "out", "*.1.self_attn.*", how=given(scheme__bits=8))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(1, 33)[None]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    source = decode.open_model(str(tmp_path / "out"))
    dense.load_state_dict({name: source.read(name).float() for name in source.specs}, strict=False)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, dense(ids).logits, atol=0.05)


def test_one_linear_sees_the_others_quantized(model: Path, tmp_path: Path) -> None:
    """A finished neighbour is run with its codes; another method and damping are taken up; it can be done twice."""
    quantize(model, tmp_path / "out", **SHARDS)
    source = decode.open_model(str(tmp_path / "out"))
    before = {name: source.decoded(name) for name in source.schemes}
    result = again(model, tmp_path / "out", "model.layers.1.mlp.down_proj", how=given("rtn", scheme__group_size=32))
    assert [one["tokens"] for one in result["layers"] if one["name"] == "model.layers.1.mlp.down_proj"] == [0]
    result = again(model, tmp_path / "out", "*.1.mlp.down_proj", "*.3.mlp.down_proj",
                   how=given(steps__gptq__damping=0.1, calibration__samples=16))
    assert [len(one["linears"]) for one in result["redone"]] == [1, 2]
    assert {one["damping"] for one in result["layers"] if one["name"] in result["redone"][1]["linears"]} == {0.1}
    after = verified(tmp_path / "out", model)
    for name, dense in before.items():
        assert torch.equal(dense, after.decoded(name)) == (name not in result["redone"][1]["linears"])


class KilledIn(Silent):
    def __init__(self, name: str) -> None:
        self.name = name

    def linear(self, name: str, error: float | None) -> None:
        if name.startswith(self.name):
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_redo_goes_on(model: Path, tmp_path: Path) -> None:
    wanted = ("*.1.mlp.*", "*.2.*")
    for out in ("whole", "killed"):
        quantize(model, tmp_path / out, **SHARDS)
    old = contents(tmp_path / "killed")
    again(model, tmp_path / "whole", *wanted, how=given(scheme__bits=8))
    code = ("from pathlib import Path; from tests.test_redo import *\n"
            f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"  # on which the last bits of sums depend
            f"again(Path({str(model)!r}), Path({str(tmp_path / 'killed')!r}), *{wanted!r}, "
            "how=given(scheme__bits=8), progress=KilledIn('model.layers.2.mlp.down'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert contents(tmp_path / "killed") == old
    journal = (tmp_path / "killed.redo.partial" / "journal.jsonl").read_text().splitlines()
    assert json.loads(journal[-1])["stage"] == "block 1"
    with pytest.raises(OutputError, match="unfinished run of something else"):
        again(model, tmp_path / "killed", "*.3.*")
    again(model, tmp_path / "killed", *wanted, how=given(scheme__bits=8))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.parametrize("steps", range(3))
def test_a_kill_while_the_outputs_change_places(steps: int, model: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of renames: the old output, none, or the new one, and the same command ends it."""
    out = tmp_path / "out"
    quantize(model, out, "rtn")
    old, real, done = contents(out), Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if self in (out, tmp_path / "out.redo"):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(self)
        return real(self, target)

    def remove(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename)
        patch.setattr(redoing.shutil, "rmtree", remove)
        again(model, out, "*.1.*", how=given(scheme__bits=8))
    if steps == 0:
        assert contents(out) == old
    assert out.exists() == (steps != 1)
    again(model, out, "*.1.*", how=given(scheme__bits=8))
    verified(out, model)
    assert len(manifest.load(out)["redone"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("patterns, how, error, words", [
    (["*.nothing"], {}, InputError, r"'\*.nothing' matches no quantized linear of .*near: "),
    (["model.layers.1"], {}, InputError, r"near: model.layers.1.\*"),
    (["lm_head"], {}, InputError, "lm_head is not quantized there"),
    (["*.1.*"], {"format": "gptq"}, RecipeError, "keeps the format of the output"),
    (["*.1.*"], {"budget": 3.5}, RecipeError, "keeps the budget"),
    (["*.1.*"], {"scheme__group_size": 48}, PlanError, "group size 48 does not divide"),
    (["*.1.*"], {"method": "nf4"}, PlanError, "nf4"),
    (["*.1.*"], {"steps__awq__steps": 3}, RecipeError, "no step 'awq'"),
])
def test_what_cannot_be_redone(patterns: list[str], how: dict[str, Any], error: type[Exception], words: str,
                               model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", "rtn")
    before = contents(tmp_path / "out")
    with pytest.raises(error, match=words):
        again(model, tmp_path / "out", *patterns, how=given(how.pop("method", None), **how))
    assert contents(tmp_path / "out") == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_model_version_or_damage_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(model, out, "rtn")
    other = tiny.make(tmp_path / "other", "llama", seed=1, num_hidden_layers=4)
    with pytest.raises(OutputError, match="source.files.model.safetensors"):
        again(other, out, "*.1.*")
    with pytest.raises(OutputError, match="there is none"):
        again(model, tmp_path / "absent", "*.1.*")
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"qtool": "', '"qtool": "9.'))
    with pytest.raises(OutputError, match=r"qtool: 9\."):
        again(model, out, "*.1.*")
    (out / "manifest.json").write_text(text)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(OutputError, match="model.safetensors is not as it was written"):
        again(model, out, "*.1.*")


def test_scaled_channels_need_whole_blocks(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", "awq", **SHARDS)
    with pytest.raises(PlanError, match=r"--redo 'model.layers.1.\*'"):
        again(model, tmp_path / "out", "*.1.mlp.*")
    again(model, tmp_path / "out", "*.1.*", how=given("rtn", scheme__group_size=32, scheme__bits=8))
    verified(tmp_path / "out", model)


def test_a_budget_keeps_its_other_schemes(model: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "out", "gptq-fast", budget={"bits": 5.0, "samples": 8})
    schemes = {one["name"]: one["scheme"] for one in result["layers"]}
    after = again(model, tmp_path / "out", "*.0.mlp.*", how=given(scheme__bits=8, scheme__group_size=32))
    for one in after["layers"]:
        assert one["scheme"]["bits"] == 8 if ".0.mlp." in one["name"] else one["scheme"] == schemes[one["name"]]
    assert not [one for one in after["allocation"]["linears"] if ".0.mlp." in one["name"]]
    verified(tmp_path / "out", model)


def test_a_plan_and_notes(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", **SHARDS)
    asked = redo.prepare(open_checkpoint(str(model)), tmp_path / "out", given(scheme__bits=8), ["*.1.*.q_proj"], "cpu")
    told = redo.described(asked)
    assert [(one["before"]["bits"], one["scheme"]["bits"]) for one in told["linears"]] == [(4, 8)]
    assert told["blocks"] == 2 and len(told["files"]) >= 1 and told["kept_files"]
    assert any("vLLM runs these as one matrix" in text for text in told["warnings"])
    assert any("2 blocks after block 1 stay" in text for text in told["warnings"])
