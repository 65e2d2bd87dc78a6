"""inspect of what `export --to onnx` writes: figures from its source, and damage of every kind found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file

from qtool import decode, manifest
from qtool.inspect import graph
from tests.cli.conftest import Run, make


@pytest.fixture(scope="module")
def exported(gptq: Path, rtn: Path) -> dict[str, Path]:
    """symmetric, and with zero points, two widths and linears that are not quantized."""
    made = {"gptq": gptq, "rtn": rtn}
    for name, source in made.items():
        make("export", source, "--to", "onnx", "--out", source.with_name(f"{name}-graph"), "--quiet")
    return {name: source.with_name(f"{name}-graph") for name, source in made.items()}


@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_every_product_decodes_to_the_source(name: str, exported: dict[str, Path], gptq: Path, rtn: Path) -> None:
    source, opened = decode.open_model(str({"gptq": gptq, "rtn": rtn}[name])), graph.open_graph(str(exported[name]))
    found = {node.input[1]: graph.decoded(opened, node, told) for node, told in opened.products()}
    assert len(found) == len(source.schemes)
    for stored, weight in found.items():
        linear = stored.removesuffix(".MatMulNBits.qweight").replace(".attn.", ".self_attn.")
        assert (weight == source.decoded(linear)).all(), stored


def test_summary_and_layers(run: Run, exported: dict[str, Path], gptq: Path) -> None:
    status, out, err = run("inspect", exported["gptq"], "--layers", "--json")
    result = json.loads(out)
    assert status == 0, err
    assert (result["kind"], result["architecture"], result["blocks"]) == ("onnx", "LlamaForCausalLM", 3)
    assert result["operators"]["MatMulNBits"] == 21 == len(result["layers"])
    assert [one["scheme"] for one in result["schemes"]] == ["int4-g32"] and result["made_by"] is not None
    recorded = {layer["stored"]: layer for layer in manifest.load(gptq)["layers"]}
    assert {row["sqnr_db"] for row in result["layers"]} == {layer["sqnr_db"] for layer in recorded.values()}
    original = load_file(gptq.parent / "tiny/model.safetensors")
    assert result["parameters"] == sum(tensor.numel() for tensor in original.values())
    assert all(row["bits_per_weight"] == 5 and row["kurtosis"] > 1 for row in result["layers"])  # float32 scales of 32
    worst = max(recorded.values(), key=lambda layer: layer["relative_error"])["name"]
    shown = run("inspect", exported["gptq"], "--sort", "error", "--top", "1", "--json")[1]
    assert [row["name"] for row in json.loads(shown)["layers"]] == [worst]


@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_verify_says_that_all_is_well(name: str, run: Run, exported: dict[str, Path]) -> None:
    status, out, err = run("inspect", exported[name], "--verify", "--json")
    assert status == 0 and json.loads(out)["problems"] == [], err
    assert "every tensor decodes" in run("inspect", exported[name], "--verify")[1]


def change(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def offset_of_a_scale(model: onnx.ModelProto) -> None:
    next(entry for tensor in model.graph.initializer if tensor.name.endswith("scales")
         for entry in tensor.external_data if entry.key == "offset").value = "16"


def one_bit_more(model: onnx.ModelProto) -> None:
    next(entry for node in model.graph.node if node.op_type == "MatMulNBits"
         for entry in node.attribute if entry.name == "bits").i = 8


def renamed_input(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "MatMulNBits").input[0] = "nothing"


def elsewhere(model: onnx.ModelProto) -> None:
    next(entry for tensor in model.graph.initializer for entry in tensor.external_data
         if entry.key == "location").value = "../../etc/passwd"


@pytest.mark.parametrize(("edit", "message"), [
    (offset_of_a_scale, "begins inside another tensor"), (one_bit_more, "qweight is uint8"),
    (renamed_input, "takes nothing, which nothing before it gives"),
])
def test_faults_without_a_manifest(edit: Callable[[onnx.ModelProto], None], message: str, run: Run, tmp_path: Path,
                                   exported: dict[str, Path]) -> None:
    shutil.copytree(exported["gptq"], tmp_path / "bad")
    (tmp_path / "bad" / manifest.NAME).unlink()
    change(tmp_path / "bad", edit)
    status, out, _ = run("inspect", tmp_path / "bad", "--verify", "--json")
    assert status == 3 and re.search(message, "\n".join(json.loads(out)["problems"]))


def test_faults_of_the_data(run: Run, tmp_path: Path, exported: dict[str, Path]) -> None:
    shutil.copytree(exported["gptq"], tmp_path / "bad")
    data = tmp_path / "bad/model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    status, out, _ = run("inspect", tmp_path / "bad", "--verify", "--json")
    problems = "\n".join(json.loads(out)["problems"])
    assert status == 3 and "ends at byte" in problems and "is not as it was written" in problems
    (tmp_path / "bad" / manifest.NAME).unlink()
    opened = graph.open_graph(str(tmp_path / "bad"))
    place = next(one for name, one in opened.placed.items() if name.endswith("scales"))
    data.write_bytes(whole[:place.offset] + b"\xff\xff\xff\x7f" + whole[place.offset + 4:])
    status, out, _ = run("inspect", tmp_path / "bad", "--verify", "--json")
    assert status == 3 and "NaN" in json.loads(out)["problems"][0]
    data.unlink()
    assert "is not there" in json.loads(run("inspect", tmp_path / "bad", "--verify", "--json")[1])["problems"][0]


def test_bad_input(run: Run, tmp_path: Path, exported: dict[str, Path], model: Path) -> None:
    status, _, err = run("inspect", exported["gptq"], "--against", model)
    assert status == 2 and "ONNX decoder" in err
    shutil.copytree(exported["gptq"], tmp_path / "bad")
    change(tmp_path / "bad", elsewhere)
    status, _, err = run("inspect", tmp_path / "bad")
    assert status == 2 and "outside of the directory" in err
    (tmp_path / "bad/model.onnx").write_bytes(b"\xff\xff no graph")
    status, _, err = run("inspect", tmp_path / "bad")
    assert status == 2 and "cannot be read as an ONNX decoder" in err
