"""qtool quantize and export to GGUF's block types: what other readers find, sizes, kills, bad inputs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader

from qtool import decode, export_gguf, inspect, recipe
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointError, InputError, PlanError, RecipeError
from qtool.mixtures import MIXTURES
from qtool.plan import make_plan
from tests import tiny
from tests.test_pipeline import contents, quantize

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}


def wide(path: Path, family: str = "llama", **overrides: Any) -> Path:
    own = {"qwen3_moe": {"moe_intermediate_size": 256, "norm_topk_prob": True},
           "gemma3": {"num_hidden_layers": 3, "query_pre_attn_scalar": 64}}
    return tiny.make(path, family, **{**WIDE, **own.get(family, {}), **overrides})


def read_by_gguf(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """GGUF name -> (type, values), by the gguf package alone."""
    return {tensor.name: (tensor.tensor_type.name.lower(),
                          torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()))
            for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "qwen3_moe"])
def test_families_go_through_and_come_back(family: str, tmp_path: Path) -> None:
    model = wide(tmp_path / "model", family)
    result = quantize(model, tmp_path / "out", "q4_k_m")
    path = tmp_path / "out" / "model-Q4_K_M.gguf"
    assert set(result["outputs"]) == {path.name, "README.md"} and {one.name for one in (
        tmp_path / "out").iterdir()} == {path.name, "manifest.json", "README.md"}
    types = [layer["scheme"]["grid"] for layer in result["layers"]]
    assert {"q4_k", "q6_k"} <= set(types) <= {"q4_k", "q5_k", "q6_k", "q8_0"}
    assert all(layer["relative_error"] is None or 0 <= layer["relative_error"] < 0.05 for layer in result["layers"])
    source, decoded = decode.open_model(str(model)), decode.open_model(str(tmp_path / "out"))
    assert set(decoded.specs) == set(source.specs)
    for name in source.specs:
        original, back = source.read(name).float(), decoded.read(name).float()
        assert (original - back).norm() <= (0.2 if original.dim() == 2 else 1e-2) * original.norm(), name
    record = inspect.record_of(decoded)
    assert record is not None and record["recipe"]["mixture"] == "q4_k_m"
    rows = inspect.layers(decoded, record)
    assert {row["stored"]: row["scheme_label"] for row in rows} == {
        layer["stored"]: layer["scheme"]["grid"] for layer in result["layers"]}
    summary = inspect.summary(decoded)
    assert summary["bits_per_weight"] == result["totals"]["bits_per_weight"]
    assert {one["scheme"] for one in summary["schemes"]} == set(types)
    assert inspect.verify(decoded, rows) == []


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    quantize(wide(tmp_path / "model", num_hidden_layers=1), tmp_path / "out", "q4_0", steps=[{"rtn": {}}])
    path = tmp_path / "out" / "model-Q4_0.gguf"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    problems = inspect.damage(str(tmp_path / "out"))
    assert len(problems) == 2 and all(str(path) in one and "sha256" in one for one in problems)


def test_what_gguf_reads_is_what_was_solved(tmp_path: Path) -> None:
    """The type of each tensor is the record's, and the values are those that the layer's error was measured with."""
    model = wide(tmp_path / "model", num_key_value_heads=4)
    result = quantize(model, tmp_path / "out", "q3_k_m")
    found = read_by_gguf(tmp_path / "out" / "model-Q3_K_M.gguf")
    source = decode.open_model(str(model))
    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    checked = 0
    for layer in result["layers"]:
        role = names.get(".".join(layer["stored"].split(".")[3:]))
        if role is None:
            continue
        kind, values = found[f"blk.{layer['block']}.{role}.weight"]
        weight = source.read(layer["stored"] + ".weight").float()
        error = float((weight - values).square().sum() / weight.square().sum())
        assert kind == layer["scheme"]["grid"] and error == pytest.approx(layer["weight_error"], rel=1e-4)
        checked += 1
    assert checked == 10


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_mixture_is_written_and_read(mixture: str, tmp_path: Path) -> None:
    model = wide(tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    source = decode.open_model(str(model))
    out = tmp_path / "m.gguf"
    result = export_gguf.run(export_gguf.make_export(source, mixture, out))
    assert result["format"] == f"gguf {mixture.upper()}" and not result["lossless"]
    reader = GGUFReader(out)
    assert reader.fields["general.file_type"].contents() == MIXTURES[mixture][0]
    back = open_checkpoint(str(out), work_dir=tmp_path / "work")
    worst = 0.6 if mixture.startswith("tq") else 0.35 if mixture.startswith("q2") else 0.2
    for name, spec in source.specs.items():
        original = source.read(name).float()
        assert (original - back.read(name).float()).norm() < worst * original.norm(), (name, spec)


def test_solving_beats_rounding_on_the_layers_outputs(tmp_path: Path) -> None:
    model = wide(tmp_path / "model", num_hidden_layers=1)
    plain = {"steps": [{"rtn": {}}]}
    text = {"calibration.samples": 24, "calibration.sequence_length": 64}
    solved = quantize(model, tmp_path / "solved", "q3_k_s", steps=[{"gptq": {}}, {"refine": {}}], **text)
    rounded = quantize(model, tmp_path / "rounded", "q3_k_s", steps=[{"gptq": {"rounds": 0}}], **text)
    only = quantize(model, tmp_path / "plain", "q3_k_s", **plain)

    def median(result: dict[str, Any]) -> float:
        errors = sorted(layer["relative_error"] for layer in result["layers"] if layer["relative_error"] is not None)
        return float(errors[len(errors) // 2])

    assert median(solved) < median(rounded) and all(layer["relative_error"] is None for layer in only["layers"])


def test_two_runs_and_a_killed_one_write_the_same_bytes(tmp_path: Path) -> None:
    model = wide(tmp_path / "model", num_hidden_layers=3)
    quantize(model, tmp_path / "whole", "q4_k_m")
    quantize(model, tmp_path / "again", "q4_k_m")
    assert contents(tmp_path / "whole") == contents(tmp_path / "again")
    child = subprocess.run([
        sys.executable, "-c", "from pathlib import Path; from tests.test_pipeline import *\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # the order of sums in matrix products depends on it
        f"quantize(Path({str(model)!r}), Path({str(tmp_path / 'killed')!r}), 'q4_k_m', progress=KilledAt(1))"],
        cwd=Path(__file__).parent.parent, timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    quantize(model, tmp_path / "killed", "q4_k_m")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_rows_that_do_not_divide_fall_back(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", hidden_size=96, head_dim=24, intermediate_size=256)
    result = quantize(model, tmp_path / "out", "q4_k_m")
    types = {layer["name"].rpartition(".")[2]: layer["scheme"]["grid"] for layer in result["layers"]
             if layer["block"] == 1}
    assert types["q_proj"] == "q5_0" and types["down_proj"] in ("q4_k", "q6_k")
    odd = tiny.make(tmp_path / "odd", "llama", hidden_size=80, head_dim=20, intermediate_size=96)
    result = quantize(odd, tmp_path / "odd-out", "q4_0")
    assert {one["name"].rpartition(".")[2] for one in result["kept"]} >= {"q_proj", "lm_head", "embed_tokens"}
    assert {layer["name"].rpartition(".")[2] for layer in result["layers"]} == {"down_proj"}


def test_rules_choose_types(tmp_path: Path) -> None:
    model = wide(tmp_path / "model", num_hidden_layers=1)
    rules = [{"match": "*.o_proj", "grid": "q8_0"}, {"match": "lm_head", "grid": "q5_k"},
             {"match": "*.up_proj", "skip": True}]
    result = quantize(model, tmp_path / "out", "q4_k_s", rules=rules)
    types = {layer["name"].rpartition(".")[2]: layer["scheme"]["grid"] for layer in result["layers"]}
    assert types["o_proj"] == "q8_0" and types["lm_head"] == "q5_k" and "up_proj" not in types
    assert types["embed_tokens"] == "q4_k"
    found = read_by_gguf(tmp_path / "out" / "model-Q4_K_S.gguf")
    assert found["output.weight"][0] == "q5_k" and found["blk.0.ffn_up.weight"][0] == "bf16"


@pytest.mark.parametrize("method, settings, words", [
    ("gptq", {"format": "gguf"}, "needs a mixture"),
    ("q4_k_m", {"format": "gptq"}, "leave --format out"),
    ("q4_k_m", {"budget": {"bits": 4.5}}, "give one of them"),
    ("q4_k_m", {"kv_cache": "fp8"}, "no place for kv_cache"),
    ("q4_k_m", {"rules": [{"match": "*", "grid": "nf4", "bits": 4, "group_size": 64, "symmetric": True}]},
     "GGUF has no type"),
    ("gptq", {"mixture": "q4_k_m"}, "leave --format out"),
])
def test_recipes_that_cannot_be(method: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=1)
    with pytest.raises(PlanError, match=words):
        made = recipe.override(recipe.preset(method), settings)
        make_plan(open_checkpoint(str(model)), made, tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'q4_k_m'"):
        recipe.preset("q4_km")
    with pytest.raises(RecipeError, match="no such mixture of GGUF types"):
        recipe.override(recipe.preset("q4_k_m"), {"mixture": "q9_k"})
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=1)
    with pytest.raises(InputError, match="--type q9_k"):
        export_gguf.make_export(decode.open_model(str(model)), "q9_k", tmp_path / "x.gguf")


def test_nan_in_an_embedding_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = wide(tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight"):
        quantize(model, tmp_path / "out", "q4_k_m", steps=[{"rtn": {}}])
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight"):
        export_gguf.run(export_gguf.make_export(decode.open_model(str(model)), "q4_k_m", tmp_path / "x.gguf"))


def test_an_importance_matrix_weighs_the_rounding(tmp_path: Path) -> None:
    """The columns that it calls important come out better; a file of another model is refused."""
    from qtool.checkpoint.imatrix import write_imatrix

    model = wide(tmp_path / "model", num_hidden_layers=1)
    source = decode.open_model(str(model))
    means = torch.ones(256)
    means[::2] = 100.0
    one = torch.ones(1)
    write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_up.weight": (means[None], one)}, ["text"], 1, 1)
    errors = []
    for name, imatrix in (("plain", None), ("weighed", tmp_path / "i.gguf")):
        out = tmp_path / f"{name}.gguf"
        export_gguf.run(export_gguf.make_export(source, "q3_k_s", out, imatrix))
        weight = source.read("model.layers.0.mlp.up_proj.weight").float()
        off = (weight - read_by_gguf(out)["blk.0.ffn_up.weight"][1]).square().sum(0)
        errors.append((float(off[::2].sum()), float(off[1::2].sum())))
    assert errors[1][0] < 0.9 * errors[0][0] and errors[1][1] > errors[0][1]
    write_imatrix(tmp_path / "o.gguf", {"blk.0.ffn_up.weight": (torch.ones(1, 512), one)}, ["text"], 1, 1)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        export_gguf.make_export(source, "q3_k_s", tmp_path / "x.gguf", tmp_path / "o.gguf")
    with pytest.raises(InputError, match="such as q4_k_m"):
        export_gguf.make_export(source, "f16", tmp_path / "x.gguf", tmp_path / "i.gguf")


def test_an_importance_matrix_reaches_experts_of_any_name(tmp_path: Path) -> None:
    """Mixtral's linears are called w1, w2 and w3."""
    from qtool.checkpoint.imatrix import write_imatrix

    model = wide(tmp_path / "model", "mixtral", num_hidden_layers=1)
    means = torch.ones(4, 256)
    means[2, ::2] = 100.0  # of one expert
    write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_gate_exps.weight": (means, torch.ones(4))}, ["text"], 1, 1)
    source = decode.open_model(str(model))
    for name, imatrix in (("plain", None), ("weighed", tmp_path / "i.gguf")):
        export_gguf.run(export_gguf.make_export(source, "q3_k_s", tmp_path / f"{name}.gguf", imatrix))
    plain, weighed = (read_by_gguf(tmp_path / f"{name}.gguf")["blk.0.ffn_gate_exps.weight"][1]
                      for name in ("plain", "weighed"))
    gates = ("w1.weight", "gate_proj.weight")
    linear = next(name for name in source.specs if ".experts.2." in name and name.endswith(gates))
    original = source.read(linear).float()
    before, after = ((original - values[2])[:, ::2].square().sum() for values in (plain, weighed))
    assert after < 0.9 * before
