"""What inspect says about files, against figures computed here."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, manifest, ops
from tests import tiny
from tests.cli.conftest import Run

ROOT = Path(__file__).parent.parent.parent


def test_summary_of_a_quantized_checkpoint(run: Run, rtn: Path) -> None:
    status, out, _ = run("inspect", rtn, "--json")
    result = json.loads(out)
    stored = load_file(rtn / "model.safetensors")
    packed = sum(tensor.nbytes for name, tensor in stored.items() if ".layers.1." in name and "q_proj" in name)
    assert status == 0 and result["format"] == "compressed-tensors" and result["architecture"] == "LlamaForCausalLM"
    assert result["weight_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert {one["scheme"]: one["linears"] for one in result["schemes"]} == {"uint4-g32": 12, "uint8-g32": 3}
    original = load_file(rtn.parent / "tiny/model.safetensors")
    assert result["parameters"] == sum(tensor.numel() for tensor in original.values())
    rows = json.loads(run("inspect", rtn, "--layers", "--json")[1])["layers"]
    row = next(one for one in rows if one["name"] == "model.layers.1.self_attn.q_proj")
    assert row["bytes"] == packed and row["bits_per_weight"] == pytest.approx(8 * packed / (64 * 64), abs=1e-4)
    kept = {one["name"]: one["reason"] for one in result["not_quantized"]}
    assert "embedding" in kept["model.embed_tokens"] and "rule *.layers.0.*" in kept["model.layers.*.mlp.up_proj"]
    assert "output head" in kept["lm_head"] and "norms" in kept


def test_layers_keep_the_manifest_figures_in_order(run: Run, gptq: Path) -> None:
    rows = json.loads(run("inspect", gptq, "--layers", "--json")[1])["layers"]
    recorded = manifest.load(gptq)["layers"]
    assert [row["name"] for row in rows] == [layer["name"] for layer in recorded]
    for row, layer in zip(rows, recorded, strict=True):
        assert row["relative_error"] == layer["relative_error"] and row["tokens"] == layer["tokens"]
        assert row["sqnr_db"] == pytest.approx(-10 * math.log10(layer["relative_error"]), abs=1e-3)
        assert row["bits_per_weight"] == pytest.approx(8 * layer["bytes"] / math.prod(layer["shape"]), abs=1e-4)


def test_against_measures_the_files(run: Run, model: Path, rtn: Path) -> None:
    status, out, _ = run("inspect", rtn, "--against", model, "--layers", "--verify", "--json")
    result = json.loads(out)
    source, original = decode.open_model(str(rtn)), load_file(model / "model.safetensors")
    assert status == 0 and result["problems"] == [] and result["comparison"]["changed_tensors"] == []
    assert result["comparison"]["equal_tensors"] == len(original) - len(result["layers"])
    for row in result["layers"]:
        weight = original[row["stored"] + ".weight"].double()
        error = (weight - source.decoded(row["stored"]).double()).square().sum() / weight.square().sum()
        assert row["weight_error"] == pytest.approx(float(error), rel=1e-4)
        assert row["weight_error"] == pytest.approx(row["recorded_weight_error"], rel=1e-4)
        assert row["sqnr_db"] == pytest.approx(-10 * math.log10(float(error)), abs=1e-2)


def test_csv_has_a_line_per_linear(run: Run, gptq: Path) -> None:
    status, out, _ = run("inspect", gptq, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and len(rows) == 21 and rows[0]["name"] == "model.layers.0.self_attn.q_proj"
    assert float(rows[0]["sqnr_db"]) > 5 and rows[0]["bits"] == "4"


def test_tables_for_people(run: Run, gptq: Path, model: Path) -> None:
    _, out, _ = run("inspect", gptq, "--layers", "--verify", "--against", model)
    worst = max(manifest.load(gptq)["layers"], key=lambda layer: layer["relative_error"])["name"]
    for words in ("LlamaForCausalLM", "int4-g32", f"in {worst}", "2.mlp.down_proj", "64 × 128", "hashes, names",
                  "unquantized tensors are equal", "output error", "gptq + refine"):
        assert words in out, words


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_unquantized_checkpoint(family: str, run: Run, tmp_path: Path) -> None:
    path = tiny.make(tmp_path / family, family)
    status, out, _ = run("inspect", path, "--layers", "--verify", "--json")
    result = json.loads(out)
    assert status == 0 and result["format"] is None and result["schemes"] == [] and result["problems"] == []
    assert result["bits_per_parameter"] == 16 and all(row["scheme"] is None for row in result["layers"])
    assert run("inspect", path)[0] == 0


def test_of_a_foreign_quantized_checkpoint_only_errors_are_unknown(run: Run, gptq: Path, model: Path,
                                                                  tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "foreign")
    (tmp_path / "foreign" / manifest.NAME).unlink()
    result = json.loads(run("inspect", tmp_path / "foreign", "--layers", "--verify", "--json")[1])
    assert result["made_by"] is None and result["problems"] == [] and result["error"] is None
    assert {row["sqnr_db"] for row in result["layers"]} == {None}
    rows = json.loads(run("inspect", tmp_path / "foreign", "--layers", "--against", model, "--json")[1])["layers"]
    assert all(row["sqnr_db"] > 10 for row in rows)


def test_system(run: Run) -> None:
    status, out, _ = run("inspect", "--system", "--json")
    assert status == 0 and json.loads(out)["system"]["torch"] == torch.__version__
    assert "kernels" in run("inspect", "--system")[1]


def spoil(folder: Path, name: str, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(("name", "change", "message"), [
    (f"{Q}.weight_packed", lambda tensor: tensor ^ 1, "its sha256 differs"),
    (f"{Q}.weight_packed", lambda tensor: tensor ^ 0x11111111, f"{Q}: its weight error is"),
    (f"{Q}.weight_scale", lambda tensor: tensor * float("nan"), f"{Q}.weight: .* values are NaN"),
    (f"{Q}.weight_scale", lambda tensor: tensor.half(), f"{Q}.weight_scale: missing, or not BF16"),
    ("model.norm.weight", lambda tensor: tensor[:10].clone(), r"model.norm.weight has shape \[10\]"),
])
def test_verify_finds_what_was_changed(name: str, change: object, message: str, run: Run, gptq: Path, model: Path,
                                       tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt", name, change)
    against = [] if "norm" in name else ["--against", model]
    status, out, err = run("inspect", tmp_path / "spoilt", "--verify", *against, "--json")
    problems = json.loads(out)["problems"]
    assert status == 3 and "problems in " in err
    assert any(re.search(message, problem) for problem in problems), problems
    assert any("model.safetensors: is not as it was written" in problem for problem in problems)


def test_a_reader_that_stops_reading_hears_nothing(gptq: Path) -> None:
    with subprocess.Popen([sys.executable, "-m", "qtool", "inspect", str(gptq), "--layers", "--json"], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_manifest_that_is_none(run: Run, gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "bad")
    (tmp_path / "bad" / manifest.NAME).write_text("{")
    status, _, err = run("inspect", tmp_path / "bad")
    assert status == 2 and "manifest.json cannot be read" in err


def test_columns_in_activation_order_have_an_error_too(gptq: Path, tmp_path: Path, run: Run) -> None:
    """Where columns are shuffled together with their g_idx there is no QuantizedTensor, but the weights are known."""
    assert run("export", gptq, "--to", "gptq", "--out", tmp_path / "g", "--quiet")[0] == 0
    tensors = load_file(tmp_path / "g" / "model.safetensors")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    source = decode.open_model(str(tmp_path / "g"))
    codes, weight = source.read_quantized(Q).codes, source.decoded(Q)
    tensors[f"{Q}.qweight"] = ops.pack_bits(codes[:, order].T.contiguous(), 4, transposed=True)
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"][order].contiguous()
    save_file(tensors, tmp_path / "g" / "model.safetensors", {"format": "pt"})
    assert torch.equal(decode.open_model(str(tmp_path / "g")).decoded(Q), weight[:, order])
