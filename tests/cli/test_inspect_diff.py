"""inspect --diff A B."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run, make


def diff(run: Run, *words: object) -> dict[str, Any]:
    status, out, err = run("inspect", "--diff", *words, "--json")
    assert status == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def test_a_copy_is_identical(run: Run, gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "copy")
    result = diff(run, gptq, tmp_path / "copy")
    stored = load_file(gptq / "model.safetensors")
    assert result["identical"] and result["linears"] == [] and result["config"] == []
    assert result["tensors"] == {"equal": len(stored), "different": [], "only_a": [], "only_b": []}
    assert "identical" in run("inspect", "--diff", gptq, tmp_path / "copy")[1]


def test_one_changed_bit_is_found(run: Run, gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "copy")
    tensors = load_file(gptq / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight_packed"
    tensors[name][3, 1] ^= 1
    tensors["model.norm.weight"][0] = -tensors["model.norm.weight"][0].abs() * 0  # -0 is another byte than 0
    save_file(tensors, tmp_path / "copy/model.safetensors", {"format": "pt"})
    result = diff(run, gptq, tmp_path / "copy")
    assert not result["identical"] and result["tensors"]["different"] == [name, "model.norm.weight"]
    assert [(one["stored"], one["equal_tensors"]) for one in result["linears"]] == [
        ("model.layers.1.self_attn.q_proj", False)]


def test_schemes_bytes_and_config(run: Run, model: Path, rtn: Path, gptq: Path) -> None:
    result = diff(run, rtn, gptq)
    assert {one["stored"] for one in result["linears"]} == {
        f"model.layers.{index}.{part}" for index in range(3) for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj")}
    first = next(one for one in result["linears"] if one["stored"] == "model.layers.0.mlp.up_proj")
    assert first["scheme"] == [None, "int4-g32"] and first["bytes"][0] is None and first["error"] == [None, None]
    second = next(one for one in result["linears"] if one["stored"] == "model.layers.1.mlp.down_proj")
    assert second["scheme"] == ["uint8-g32", "int4-g32"] and second["error_of"] == "weights"
    assert "model.layers.0.mlp.up_proj.weight" in result["tensors"]["only_a"]
    changed = {one["key"] for one in result["config"]}
    assert any(key.startswith("quantization_config.") for key in changed)
    assert {"steps", "rules"} <= {one["key"] for one in result["recipe"]}
    _, out, _ = run("inspect", "--diff", rtn, gptq)
    assert "uint8-g32" in out and "only in a" in out and "quantization_config" in out
    rows = list(csv.DictReader(io.StringIO(run("inspect", "--diff", rtn, gptq, "--csv")[1])))
    assert len(rows) == 21 and rows[0]["scheme_b"] == "int4-g32"


def test_two_plain_models(run: Run, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "b")
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    result = diff(run, model, tmp_path / "b")
    assert [one["key"] for one in result["config"]] == ["rms_norm_eps"] and result["tensors"]["different"] == []
    assert result["linears"] == [] and not result["identical"]


def test_another_format_of_the_same_codes(run: Run, gptq: Path, tmp_path: Path) -> None:
    make("export", gptq, "--to", "gptq", "--out", tmp_path / "g", "--quiet")
    result = diff(run, gptq, tmp_path / "g")
    assert result["a"]["format"] == "compressed-tensors" and result["b"]["format"] == "gptq"
    assert all(one["scheme"][0] == one["scheme"][1] and not one["equal_tensors"] for one in result["linears"])


def test_what_goes_together(run: Run, gptq: Path, model: Path) -> None:
    for words, message in (([gptq, "--diff", gptq, model], "leave"), (["--diff", gptq, model, "--layers"], "--layers"),
                           (["--diff", gptq, gptq.parent / "nothing"], "nothing")):
        status, _, err = run("inspect", *words)
        assert status == 2 and message in err
