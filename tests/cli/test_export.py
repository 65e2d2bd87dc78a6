"""Exports keep codes and scales; what cannot be kept is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, export, journal, manifest
from tests import tiny
from tests.cli.conftest import SMALL, Run


def test_round_trip_through_gptq(run: Run, gptq: Path, tmp_path: Path) -> None:
    status, out, _ = run("export", gptq, "--to", "gptq", "--out", tmp_path / "g", "--json")
    result = json.loads(out)
    assert status == 0 and result["lossless"] and "bit for bit" in result["checked"] and result["linears"] == 21
    assert run("export", tmp_path / "g", "--to", "compressed-tensors", "--out", tmp_path / "c", "--quiet")[0] == 0
    before, after = load_file(gptq / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (gptq, tmp_path / "c")]
    assert configs[0] == configs[1]
    middle, source = decode.open_model(str(tmp_path / "g")), decode.open_model(str(gptq))
    assert middle.format is not None and middle.format.NAME == "gptq"
    for linear in source.schemes:
        ours, theirs = source.read_quantized(linear), middle.read_quantized(linear)
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.zero_point, theirs.zero_point)
        assert torch.equal(ours.scale.double(), theirs.scale.double())


def test_an_export_is_a_complete_output(run: Run, gptq: Path, model: Path, tmp_path: Path) -> None:
    assert run("export", gptq, "--to", "gptq", "--out", tmp_path / "g", "--quiet")[0] == 0
    before, after = manifest.load(gptq), manifest.load(tmp_path / "g")
    assert after["exported_from"]["format"] == "compressed-tensors" and after["format"] == "gptq"
    figures = [[(layer["name"], layer["relative_error"]) for layer in one["layers"]] for one in (before, after)]
    assert figures[0] == figures[1]
    assert after["recipe"] == before["recipe"] and after["source"] == before["source"]
    assert after["totals"]["bits_per_weight"] > before["totals"]["bits_per_weight"]
    names = {path.name for path in (tmp_path / "g").iterdir()}
    assert {"README.md", "config.json", "quantize_config.json", "tokenizer.json", "generation_config.json"} <= names
    status, out, _ = run("inspect", tmp_path / "g", "--verify", "--against", model, "--json")
    assert status == 0 and json.loads(out)["problems"] == []


def test_asymmetric_and_mixed_bits_go_over_too(run: Run, rtn: Path, tmp_path: Path) -> None:
    status, out, _ = run("export", rtn, "--to", "gptq", "--out", tmp_path / "g", "--json")
    assert status == 0 and any("gptq_v2" in note for note in json.loads(out)["notes"])
    source, exported = decode.open_model(str(rtn)), decode.open_model(str(tmp_path / "g"))
    assert source.schemes == exported.schemes
    assert all(torch.equal(source.decoded(linear), exported.decoded(linear)) for linear in source.schemes)


def test_dense_weights_load_in_transformers(run: Run, gptq: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    status, out, _ = run("export", gptq, "--to", "hf", "--out", tmp_path / "h", "--json")
    assert status == 0 and not json.loads(out)["lossless"]
    assert "quantization_config" not in json.loads((tmp_path / "h" / "config.json").read_text())
    source = decode.open_model(str(gptq))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "h", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], source.read(name)) for name in source.specs)
    assert run("inspect", tmp_path / "h", "--verify")[0] == 0


@pytest.mark.parametrize("family", ["mixtral", "qwen2"])
def test_experts_and_tied_embeddings(family: str, run: Run, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", family)
    assert run("quantize", model, "--method", "rtn", "--out", tmp_path / "q", *SMALL)[0] == 0
    assert run("export", tmp_path / "q", "--to", "gptq", "--out", tmp_path / "g", "--quiet")[0] == 0
    assert run("inspect", tmp_path / "g", "--verify")[0] == 0
    source, exported = decode.open_model(str(tmp_path / "q")), decode.open_model(str(tmp_path / "g"))
    assert all(torch.equal(source.read(name), exported.read(name)) for name in source.specs)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts_of_mlx(family: str, run: Run, tmp_path: Path) -> None:
    """Made by quantize and by export, in one file and several; read back, verified, redone, and refused in part."""
    model, made = tiny.make(tmp_path / "model", family), tmp_path / "made"
    whole = ("quantize", model, "--method", "rtn", "--format", "mlx", *SMALL)
    assert run(*whole, "--out", made, "--set", "shard_gb=1e-6")[0] == 0 and len(list(made.glob("*-of-*"))) > 5
    assert run("export", made, "--to", "compressed-tensors", "--out", tmp_path / "ct", "--quiet")[0] == 0
    assert run("export", tmp_path / "ct", "--to", "mlx", "--out", tmp_path / "again", "--quiet")[0] == 0
    stored, again = (dict(tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).items())
                     for folder in (made, tmp_path / "again"))
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    experts = [name for name in stored if "experts." in name or "switch_mlp." in name]
    assert len(experts) == 2 * 3 * 3 and all(stored[name].dim() == 3 for name in experts)
    assert run("inspect", made, "--verify", "--against", model)[0] == 0
    assert run("inspect", tmp_path / "again", "--verify")[0] == 0
    before = (made / "manifest.json").read_text()
    status, _, err = run("quantize", model, "--redo", "*.experts.1.*", "--method", "rtn", "--bits", "8", "--out", made,
                         *SMALL)
    assert status == 2 and "one tensor" in err and "experts.*" in err
    assert (made / "manifest.json").read_text() == before
    assert run("quantize", model, "--redo", "*.1.*experts.*", "--method", "rtn", "--bits", "8", "--out", made,
               *SMALL)[0] == 0
    assert run("inspect", made, "--verify", "--against", model)[0] == 0
    source, base = decode.open_model(str(made)), decode.open_model(str(tmp_path / "ct"))
    same = {name: torch.equal(source.read(name), base.read(name)) for name in source.specs}
    assert all(same[name] != ("layers.1." in name and ".experts." in name) for name in same)


def test_experts_that_stay_dense(run: Run, tmp_path: Path) -> None:
    """A config calls them as the model and as the checkpoint does; in MLX those of a kind lie in one tensor if others
    are quantized, and as in the model if none is. Equal ones are equal to --diff wherever they lie."""
    model = tiny.make(tmp_path / "model", "mixtral")
    for name, format_, rule in (("ct", "compressed-tensors", "*.experts.*.w1"), ("some", "mlx", "*.experts.*.w1"),
                                ("all", "mlx", "*.experts.*")):
        assert run("quantize", model, "--method", "rtn", "--format", format_, "--out", tmp_path / name, *SMALL, "--set",
                   f'rules=[{{match: "{rule}", skip: true}}]')[0] == 0
    ignored = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.1.mlp.experts.3.w1", "model.layers.1.block_sparse_moe.experts.3.w1"} <= {*ignored}
    some, every = (load_file(tmp_path / name / "model.safetensors") for name in ("some", "all"))
    assert some["model.layers.1.block_sparse_moe.switch_mlp.gate_proj.weight"].shape == (4, 128, 64)
    assert not [name for name in every if "switch_mlp" in name]
    assert len([name for name in every if ".experts." in name]) == 2 * 4 * 3
    status, out, _ = run("inspect", "--diff", tmp_path / "some", model, "--json")
    told = json.loads(out)["tensors"]
    assert status == 0 and not [name for name in told["different"] if name.endswith("w1.weight")]
    assert told["equal"] >= 2 * 4


def test_scales_that_do_not_fit_are_refused(run: Run, gptq: Path, tmp_path: Path) -> None:
    """bfloat16 reaches where float16 does not; float16 is finer than bfloat16."""
    import shutil

    shutil.copytree(gptq, tmp_path / "tiny-scales")
    (tmp_path / "tiny-scales" / manifest.NAME).unlink()
    tensors = load_file(tmp_path / "tiny-scales" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name] * 2.0**-30
    save_file(tensors, tmp_path / "tiny-scales" / "model.safetensors", {"format": "pt"})
    status, _, err = run("export", tmp_path / "tiny-scales", "--to", "gptq", "--out", tmp_path / "x")
    assert status == 2 and "1 of 21 linears have bfloat16 scales that float16" in err
    assert "model.layers.0.mlp.up_proj" in err and "--format gptq" in err and "--to hf" in err
    assert not list(tmp_path.glob("x*"))

    assert run("export", gptq, "--to", "gptq", "--out", tmp_path / "fine", "--quiet")[0] == 0
    tensors = load_file(tmp_path / "fine" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] *= 1 + 2**-10
    save_file(tensors, tmp_path / "fine" / "model.safetensors", {"format": "pt"})
    status, _, err = run("export", tmp_path / "fine", "--to", "compressed-tensors", "--out", tmp_path / "x")
    assert status == 2 and "float16 scales that bfloat16" in err


def test_a_target_that_cannot_hold_the_scheme(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("quantize", model, "--method", "rtn", "--group-size", "8", "--out", tmp_path / "q", "--quiet")[0] == 0
    status, _, err = run("export", tmp_path / "q", "--to", "gptq", "--out", tmp_path / "x")
    assert status == 2 and "group_size 8" in err and "--to hf" in err


def test_an_unfinished_run_is_not_overwritten(run: Run, gptq: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text(journal.line({"identity": {"recipe": 1}}).decode())
    status, _, err = run("export", gptq, "--to", "gptq", "--out", tmp_path / "out")
    assert status == 2 and "unfinished run of something else" in err


def test_an_export_killed_at_its_end_goes_on(run: Run, gptq: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """When the files of the weights have their names already."""
    with monkeypatch.context() as patch:
        patch.setattr(export, "finish", lambda *arguments: [][0])
        assert run("export", gptq, "--to", "gptq", "--out", tmp_path / "out", "--quiet")[0] == 1
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    assert run("export", gptq, "--to", "gptq", "--out", tmp_path / "out", "--quiet") == (0, "", "")
    assert run("inspect", tmp_path / "out", "--verify")[0] == 0


def test_two_exports_are_equal(run: Run, gptq: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("export", gptq, "--to", "gptq", "--out", tmp_path / name, "--quiet")[0] == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


def test_a_gguf_file_becomes_plain_weights(run: Run, model: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    from tests.checkpoint.gguf_maker import convert

    file = convert(model, tmp_path / "tiny.gguf", "llama", GGMLQuantizationType.Q8_0)
    summary = json.loads(run("inspect", file, "--json")[1])
    assert summary["format"] == "gguf Q8_0, F32" and 8.5 <= summary["bits_per_weight"] < 8.7
    status, out, _ = run("export", file, "--to", "gptq", "--out", tmp_path / "x")
    assert status == 0 and "lossless" in out
    assert run("export", file, "--to", "hf", "--out", tmp_path / "h", "--quiet") == (0, "", "")
    plain, source = load_file(tmp_path / "h" / "model.safetensors"), decode.open_model(str(file))
    assert plain.keys() == source.specs.keys() and all(torch.equal(plain[name], source.read(name)) for name in plain)
    assert "dense weights" in (tmp_path / "h" / "README.md").read_text()


def test_another_format_can_be_had_by_rounding_again(run: Run, gptq: Path, tmp_path: Path) -> None:
    assert run("export", gptq, "--to", "awq", "--out", tmp_path / "a", "--quiet")[0] == 0
    status, _, err = run("export", tmp_path / "a", "--to", "bitsandbytes", "--out", tmp_path / "x")
    assert status == 2 and "--requantize RECIPE" in err and "--to hf" in err
    again = "--to", "bitsandbytes", "--requantize", "nf4"
    status, out, _ = run("export", tmp_path / "a", *again, "--out", tmp_path / "b", "--json")
    result = json.loads(out)
    assert status == 0 and not result["lossless"] and result["requantized"] == "nf4" and result["from"] == "awq"
    assert run("inspect", tmp_path / "b", "--verify", "--against", gptq)[0] == 0
    status, _, err = run("quantize", tmp_path / "b", "--method", "rtn", "--out", tmp_path / "y")
    assert status == 2 and "(bitsandbytes)" in err and "--requantize" in err


def test_mlx_says_what_it_is(run: Run, gptq: Path, tmp_path: Path) -> None:
    """Metadata of the file, both names of the config; and the way back."""
    from safetensors import safe_open

    assert run("export", gptq, "--to", "mlx", "--out", tmp_path / "m", "--quiet") == (0, "", "")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] and "rope_theta" in config
    assert "mlx_lm" in (tmp_path / "m" / "README.md").read_text()
    assert run("inspect", tmp_path / "m", "--verify")[0] == 0
    status, _, err = run("quantize", tmp_path / "m", "--method", "rtn", "--out", tmp_path / "y")
    assert status == 2 and "(mlx)" in err
