"""inspect --verify: what loaders look for, in every format, with and without a manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, manifest
from qtool.inspect import loaders
from tests import tiny
from tests.cli.conftest import Run, make

WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 32}
MADE = {
    "rtn": ["--method", "rtn"], "asymmetric": ["--method", "rtn", "--asymmetric"],
    "three": ["--method", "rtn", "--bits", "3"], "w8a8": ["--method", "w8a8"], "fp8": ["--method", "fp8"],
    "fp8-static": ["--method", "fp8-static"],
    "fp8-block": ["--method", "fp8-block"], "nf4": ["--method", "nf4"], "nf4-dq": ["--method", "nf4", "--double-quant"],
    "llm-int8": ["--method", "llm-int8"], "mxfp4": ["--method", "mxfp4"], "nvfp4": ["--method", "nvfp4"],
    "gptq": ["--method", "rtn", "--format", "gptq"], "gptq3": ["--method", "rtn", "--format", "gptq", "--bits", "3"],
    "awq": ["--method", "rtn", "--format", "awq", "--asymmetric"],
    "mlx": ["--method", "rtn", "--format", "mlx", "--asymmetric"],
    "modelopt": ["--method", "nvfp4", "--format", "modelopt"],
    "aqlm": ["--method", "aqlm", "--set", "steps.aqlm.rounds=1"],
}


EXPORTED = {  # of which, to what
    "e-gptq": ("rtn", "gptq"), "e-hf": ("rtn", "hf"), "e-awq": ("asymmetric", "awq"), "e-mlx": ("asymmetric", "mlx"),
    "e-onnx": ("rtn", "onnx"), "e-onnx-zeros": ("asymmetric", "onnx"), "e-onnx-three": ("three", "onnx"),
    "e-gptq3": ("three", "gptq"), "e-modelopt": ("nvfp4", "modelopt"), "e-ct": ("modelopt", "compressed-tensors"),
    "e.gguf": ("rtn", "gguf"),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("loaders")
    source = tiny.make(folder / "wide", "llama", **WIDE)

    def get(name: str) -> Path:
        if name in EXPORTED and not (folder / name).exists():
            make("export", get(EXPORTED[name][0]), "--to", EXPORTED[name][1], "--out", folder / name, "--quiet")
        elif not (folder / name).exists():
            make("quantize", source, *MADE[name], "--samples", "2", "--sequence-length", "16", "--quiet",
                 "--out", folder / name)
        return folder / name
    return get


@pytest.mark.parametrize("name", MADE)
def test_what_quantize_writes_has_what_loaders_want(name: str, quantized: Callable[[str], Path]) -> None:
    found = loaders.check(decode.open_model(str(quantized(name))))
    assert found and all(one["problems"] == [] for one in found), found
    assert {one["loader"] for one in found} <= {"transformers", "vLLM", "GPTQModel", "mlx-lm"}


@pytest.mark.parametrize("name", [*MADE, *EXPORTED])
def test_both_decoders_agree_on_what_is_written(name: str, run: Run, quantized: Callable[[str], Path]) -> None:
    status, out, err = run("inspect", quantized(name), "--verify", "--json")
    result = json.loads(out)
    assert status == 0 and result["problems"] == [] and not result.get("decoded_once"), (result["problems"], err)
    recorded = manifest.load(quantized(name)) if quantized(name).is_dir() else {"layers": []}
    assert all(len(layer["values_sha256"]) == 64 for layer in recorded["layers"])


@pytest.mark.parametrize(("name", "loader", "words"), [
    ("three", "vLLM", "no kernel for 3 bits"), ("gptq3", "vLLM", "no kernel for 3 bits"),
])
def test_limits_are_no_faults(name: str, loader: str, words: str, quantized: Callable[[str], Path], run: Run) -> None:
    status, out, _ = run("inspect", quantized(name), "--verify", "--json")
    limits = {one["loader"]: one["limits"] for one in json.loads(out)["loaders"]}
    assert status == 0 and words in limits[loader][0] and "and 6 more" in limits[loader][0]
    assert words in run("inspect", quantized(name), "--verify")[1]


Q = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def cut(suffix: str) -> Change:
    return lambda tensors, config: tensors.__setitem__(f"{Q}.{suffix}", tensors[f"{Q}.{suffix}"][:-1].clone())


def cast(suffix: str, dtype: torch.dtype) -> Change:
    return lambda tensors, config: tensors.__setitem__(f"{Q}.{suffix}", tensors[f"{Q}.{suffix}"].to(dtype))


def drop(suffix: str) -> Change:
    return lambda tensors, config: tensors.__delitem__(f"{Q}.{suffix}")


def add(suffix: str) -> Change:
    return lambda tensors, config: tensors.__setitem__(f"{Q}.{suffix}", torch.zeros(3))


def forget(key: str) -> Change:
    return lambda tensors, config: config["quantization_config"].__delitem__(key)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("rtn", cast("weight_scale", torch.float64), "weight_scale: is F64"),
    ("rtn", add("weight_extra"), "weight_extra: no loader of compressed-tensors knows"),
    ("asymmetric", drop("weight_zero_point"), "weight_zero_point: is missing"),
    ("rtn", forget("quantization_status"), "no quantization_status, which transformers needs"),
    ("gptq", cast("g_idx", torch.int64), "g_idx: is I64 [128]"),
    ("gptq", cut("qzeros"), "qzeros: is I32 [0, 16], loaders want I32 [1, 16]"),
    ("gptq", forget("desc_act"), "no desc_act, which vLLM needs"),
    ("fp8-block", forget("activation_scheme"), "no activation_scheme, which vLLM needs"),
    ("nf4", drop("weight.quant_map"), "weight.quant_map: is missing"),
    ("mlx", cut("biases"), "biases: is"),
    ("aqlm", add("extra"), "extra: no loader of aqlm knows"),
    ("aqlm", forget("num_codebooks"), "AQLM with 1 codebooks of 8 bits"),
])
def test_faults_are_found_without_a_manifest(name: str, change: Change, message: str, run: Run, tmp_path: Path,
                                             quantized: Callable[[str], Path]) -> None:
    out = tmp_path / "bad"
    shutil.copytree(quantized(name), out)
    (out / manifest.NAME).unlink()
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, out / "model.safetensors", {"format": "mlx" if name == "mlx" else "pt"})
    (out / "config.json").write_text(json.dumps(config))
    status, shown, err = run("inspect", out, "--verify", "--json")
    assert status == 3, (status, err)
    assert any(message in problem for problem in json.loads(shown)["problems"]), json.loads(shown)["problems"]


def test_gguf_names_are_those_of_llama_cpp(run: Run, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    source = quantized("rtn").parent / "wide"
    make("export", source, "--to", "gguf", "--type", "q4_0", "--out", tmp_path / "a.gguf", "--quiet")
    status, out, _ = run("inspect", tmp_path / "a.gguf", "--verify", "--json")
    assert status == 0 and json.loads(out)["loaders"] == [{"loader": "llama.cpp", "problems": [], "limits": []}]
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"llama.feed_forward_length", b"llama.feed_forward_lengtx"))
    found = run("inspect", tmp_path / "b.gguf", "--verify", "--json")
    assert found[0] in (2, 3) and "feed_forward_length" in found[1] + found[2]


def put(path: str, value: Any) -> Change:
    """A value in the quantization_config, under keys joined by slashes."""
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place = config["quantization_config"]
        for key in parents:
            place = place[key]
        place[last] = value
    return change


@pytest.mark.parametrize(("name", "change", "message"), [
    ("rtn", put("config_groups/group_0/weights/num_bits", "4"), "weights.num_bits is '4', not a positive whole number"),
    ("rtn", put("config_groups/group_0/weights/groups", 3), "weights.groups is no key that loaders know"),
    ("rtn", put("config_groups/group_0/weights/actorder", "group"), "actorder is 'group', not 'weight' or 'static'"),
    ("rtn", put("config_groups/group_0/extra", 1), "group_0.extra is no key that loaders know"),
    ("rtn", put("ignore", []), "lm_head is not quantized, but nothing here says so"),
    ("rtn", put("quantization_status", "frozen"), "quantization_status is 'frozen', not 'compressed'"),
    ("gptq", put("desc_act", "false"), "desc_act is 'false', not true or false"),
    ("gptq", put("sym", False), "checkpoint_format gptq with sym false is refused"),
    ("gptq", put("lm_head", True), "lm_head is not quantized, but nothing here says so"),
    ("awq", put("zero_point", False), "zero_point is False, not True"),
    ("nf4", put("llm_int8_skip_modules", ["mlp"]), "lm_head is not quantized"),
    ("nf4", put("load_in_8bit", True), "must not be the same"),
    ("fp8-block", put("weight_block_size", [128, "128"]), "weight_block_size is [128, '128']"),
    ("fp8-block", put("modules_to_not_convert", ["embed"]), "lm_head is not quantized"),
    ("modelopt", put("ignore", "lm_head"), "ignore is 'lm_head', not a list of texts"),
    ("mlx", put("mode", 1), "mode is 1, not 'affine'"),
    ("aqlm", put("linear_weights_not_to_quantize", []), "lm_head is not quantized, but nothing here says so"),
    ("aqlm", put("linear_weights_not_to_quantize", "lm_head"), "is 'lm_head', not a list of texts or null"),
])
def test_values_that_crash_loaders(name: str, change: Change, message: str, run: Run, tmp_path: Path,
                                   quantized: Callable[[str], Path]) -> None:
    out = tmp_path / "bad"
    shutil.copytree(quantized(name), out)
    (out / manifest.NAME).unlink()
    config = json.loads((out / "config.json").read_text())
    change({}, config)
    if name == "mlx":
        config["quantization"] = config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    source = decode.open_model(str(quantized(name)))
    monkeyed = {**config["quantization_config"]}
    source.quantization = lambda: monkeyed  # type: ignore[method-assign]
    found = [text for one in loaders.check(source) for text in one["problems"]]
    assert any(message in text for text in found), found
    assert run("inspect", out, "--verify")[0] == 3


def test_groups_that_several_gpus_would_cut_are_a_limit(quantized: Callable[[str], Path]) -> None:
    limits = {one["loader"]: one["limits"] for one in loaders.check(decode.open_model(str(quantized("rtn"))))}
    assert any(text.startswith("tensor parallel over 2 GPUs would cut groups apart: model.layers.0.mlp.down_proj")
               for text in limits["vLLM"]) and not limits["transformers"]
