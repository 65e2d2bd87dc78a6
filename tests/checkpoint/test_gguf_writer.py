"""GGUF files as output: what our reader, gguf's reader and a second converter find in them; kills; bad inputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from safetensors.torch import load_file

from qtool import export_gguf
from qtool.checkpoint import gguf_seal, open_checkpoint
from qtool.checkpoint.gguf_families import FAMILIES, written_as
from qtool.checkpoint.gguf_writer import GgufModel, GgufWriter
from qtool.decode import open_model
from qtool.errors import InputError, OutputError, PlanError
from qtool.tensors import TensorSpec
from tests import tiny
from tests.checkpoint.gguf_maker import convert

ROOT = Path(__file__).parents[2]
# family of tests/tiny.py -> general.architecture
WRITTEN = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
           "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "qwen3_moe": "qwen3moe"}
NORMALISED = {"norm_topk_prob": True}
# Differs because GGUF does not hold it, or because llama.cpp knows one model type where transformers has two
NOT_COMPARED = {"dtype", "torch_dtype", "_name_or_path", "initializer_range", "transformers_version", "model_type",
                "architectures", "sliding_window", "head_dim"}


def made(path: Path, family: str, **overrides: Any) -> Path:
    return tiny.make(path, family, **(NORMALISED if family == "qwen3_moe" else {}), **overrides)


def export(folder: Path, out: Path, kind: str | None = None) -> dict[str, Any]:
    return export_gguf.run(export_gguf.make_export(open_model(str(folder)), kind, out))


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("family", WRITTEN)
def test_every_family_goes_there_and_back(tmp_path: Path, family: str) -> None:
    """HF -> GGUF -> HF: equal tensors, configs, tokens; the same file by a second converter, tensor by tensor."""
    from transformers import AutoConfig, AutoTokenizer

    original = made(tmp_path / "hf", family)
    result = export(original, tmp_path / "m.gguf", "f32")
    assert result["lossless"] and result["weight_bytes"] == (tmp_path / "m.gguf").stat().st_size
    back = open_checkpoint(str(tmp_path / "m.gguf"), work_dir=tmp_path / "w")
    tensors = load_file(original / "model.safetensors")
    assert list(back.specs) == sorted(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(back.read(name), tensor.float(), rtol=0, atol=2e-7 if "norm" in name else 0)
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (back.directory, original))
    assert {key for key in {*ours} & {*theirs} - NOT_COMPARED if ours[key] != theirs[key]} == set()
    left, right = (AutoTokenizer.from_pretrained(folder) for folder in (back.directory, original))
    assert all(left(text).input_ids == right(text).input_ids for text in tiny.TEXT)
    if family == "gemma3":  # the second converter does not know of layer_types
        return
    reference = GGUFReader(convert(original, tmp_path / "reference.gguf", WRITTEN[family]))
    reader = GGUFReader(tmp_path / "m.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert set(stored) == {tensor.name for tensor in reference.tensors}
    for tensor in reference.tensors:
        mine = stored[tensor.name]
        assert (mine.tensor_type, list(mine.shape)) == (tensor.tensor_type, list(tensor.shape)), tensor.name
        assert np.array_equal(mine.data, tensor.data), tensor.name
    for key in reference.fields:
        if not key.startswith("GGUF.") and not key.endswith(("key_length", "value_length", "chat_template")):
            assert value(reader, key) == value(reference, key), key


@pytest.mark.parametrize(("kind", "stored", "file_type"), [
    ("f16", GGMLQuantizationType.F16, 1), ("bf16", GGMLQuantizationType.BF16, 32), ("f32", GGMLQuantizationType.F32, 0),
    (None, GGMLQuantizationType.BF16, 32)])
def test_element_types(llama: Path, tmp_path: Path, kind: str | None, stored: Any, file_type: int) -> None:
    export(llama, tmp_path, kind)
    path = tmp_path / f"hf-{stored.name}.gguf"
    assert list(tmp_path.iterdir()) == [path]
    reader = GGUFReader(path)
    assert value(reader, "general.file_type") == file_type and value(reader, "general.quantization_version") == 2
    for tensor in reader.tensors:
        assert tensor.tensor_type == (GGMLQuantizationType.F32 if len(tensor.shape) == 1 else stored)
        assert tensor.data_offset % 32 == 0
    original = load_file(llama / "model.safetensors")
    back = open_checkpoint(str(path))
    for name, tensor in original.items():
        meant = tensor if "norm" in name else tensor.to(back.specs[name].dtype)
        assert torch.equal(back.read(name).float(), meant.float()), name


def test_two_runs_are_equal_and_a_gguf_file_comes_out_as_it_went_in(llama: Path, tmp_path: Path) -> None:
    for name in "ab":
        export(llama, tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    (tmp_path / "c").mkdir()
    export(tmp_path / "a.gguf", tmp_path / "c" / "a.gguf", "bf16")
    first, again = GGUFReader(tmp_path / "a.gguf"), GGUFReader(tmp_path / "c" / "a.gguf")
    for key in first.fields:
        if not key.startswith("GGUF.") and key not in ("general.name", gguf_seal.KEY):
            assert value(first, key) == value(again, key), key
    assert [(one.name, one.data.tobytes()) for one in first.tensors] == \
        [(one.name, one.data.tobytes()) for one in again.tensors]


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_comes_back(tmp_path: Path, space: bool) -> None:
    from transformers import AutoTokenizer

    original = tiny.make(tmp_path / "hf", "llama", num_hidden_layers=1)
    tokenizer = tiny.sentencepiece(space)
    tokenizer.save_pretrained(original)
    export(original, tmp_path / "m.gguf")
    back = AutoTokenizer.from_pretrained(open_checkpoint(str(tmp_path / "m.gguf"), work_dir=tmp_path / "w").directory)
    for text in (*tiny.TEXT, "  two  spaces\n\nhere", "Größe 東京 😀", "a <think> smaller<|turn|>guess</s>"):
        assert back(text).input_ids == tokenizer(text).input_ids, text


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0 + index for index in range(8)],
                 "short_factor": [1.25] * 8},
    "partial": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_settings_come_back(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    family = "phi3" if name in ("longrope", "partial") else "llama"
    more = {"original_max_position_embeddings": 64} if family == "phi3" else {}
    original = tiny.make(tmp_path / "hf", family, num_hidden_layers=1, rope_parameters=ROPES[name], **more)
    export(original, tmp_path / "m.gguf")
    back = open_checkpoint(str(tmp_path / "m.gguf"), work_dir=tmp_path / "w")
    ours, theirs = (AutoConfig.from_pretrained(folder).rope_parameters for folder in (back.directory, original))
    for key in {*ours, *theirs} - {"beta_fast", "beta_slow"}:
        meant = theirs.get(key)
        assert ours.get(key) == (pytest.approx(meant, rel=1e-6) if key == "factor" else meant), key


def test_biases_and_heads_of_another_size_come_back(tmp_path: Path) -> None:
    """Biases of q and k move with their rows."""
    original = tiny.make(tmp_path / "hf", "llama", num_hidden_layers=1, head_dim=32, attention_bias=True, mlp_bias=True)
    tensors = load_file(original / "model.safetensors")
    export(original, tmp_path / "m.gguf")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    bias = tensors["model.layers.0.self_attn.q_proj.bias"].float()
    assert stored["blk.0.attn_q.bias"].tolist() == bias.reshape(4, 2, 16).swapaxes(1, 2).flatten().tolist()
    back = open_model(str(tmp_path / "m.gguf"))
    assert back.config["head_dim"] == 32 and back.config["attention_bias"] and back.config["mlp_bias"]
    assert set(back.specs) == set(tensors)
    assert all(torch.equal(back.read(name), tensor) for name, tensor in tensors.items())


def test_the_pattern_of_windows_is_told_where_llama_cpp_would_guess_wrong(tmp_path: Path) -> None:
    key = "gemma3.attention.sliding_window_pattern"
    for layers, kinds in ((6, None), (3, ["full_attention", "sliding_attention", "sliding_attention"])):
        settings = {"num_hidden_layers": layers, "layer_types": kinds or [
            "sliding_attention"] * 5 + ["full_attention"]}
        original = tiny.make(tmp_path / f"hf{layers}", "gemma3", **settings)
        export(original, tmp_path / f"{layers}.gguf")
        reader = GGUFReader(tmp_path / f"{layers}.gguf")
        assert (value(reader, key) if key in reader.fields else None) == (kinds and [False, True, True])
        assert open_model(str(tmp_path / f"{layers}.gguf")).config["layer_types"] == settings["layer_types"]


# The writer by itself


def model_of(model_type: str, **values: Any) -> GgufModel:
    family = written_as(model_type)
    assert family is not None
    keys = gguf.GGUFWriter(None, family.architecture)
    keys.add_block_count(1)
    return GgufModel(family, 4, 2, keys.kv_data[0], **values)


def quantized(shape: tuple[int, int], kind: GGMLQuantizationType, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense weights and their blocks as uint8 rows."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return dense, torch.from_numpy(gguf.quantize(dense.numpy(), kind))


def test_blocks_of_permuted_rows_and_of_experts(tmp_path: Path) -> None:
    """q rows move whole, experts lie side by side; both come back as they were given."""
    kind = GGMLQuantizationType.Q4_0
    names = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.layers.0.self_attn.k_proj.weight": (32, 64)}
    names |= {f"model.layers.0.block_sparse_moe.experts.{index}.w2.weight": (64, 96) for index in (1, 0, 2)}
    pairs = {name: quantized(shape, kind, seed) for seed, (name, shape) in enumerate(names.items())}
    gate = torch.randn(3, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    specs = [TensorSpec(name, torch.uint8, tuple(blocks.shape)) for name, (_, blocks) in pairs.items()]
    specs.append(TensorSpec("model.layers.0.block_sparse_moe.gate.weight", torch.bfloat16, (3, 64)))
    writer = GgufWriter(tmp_path / "m.gguf", specs, model_of("mixtral"), dict.fromkeys(names, kind),
                        LlamaFileType.MOSTLY_Q4_0)
    for name, (_, blocks) in pairs.items():
        writer.write(name, blocks)
        assert torch.equal(writer.read_back(name), blocks) and torch.equal(writer.held(name, blocks), blocks)
    writer.write(specs[-1].name, gate)
    assert torch.equal(writer.read_back(specs[-1].name), gate)
    writer.finish()
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.ffn_gate_inp.weight"].tensor_type == GGMLQuantizationType.F32
    assert list(stored["blk.0.ffn_down_exps.weight"].shape) == [96, 64, 3]
    for index in range(3):
        dense, _ = pairs[f"model.layers.0.block_sparse_moe.experts.{index}.w2.weight"]
        expected = gguf.dequantize(gguf.quantize(dense.numpy(), kind), kind)
        assert np.array_equal(gguf.dequantize(stored["blk.0.ffn_down_exps.weight"].data[index], kind), expected)
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        dense, _ = pairs[f"model.layers.0.self_attn.{name[-1]}_proj.weight"]
        moved = dense.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(dense.shape)
        assert np.array_equal(stored[f"blk.0.{name}.weight"].data, gguf.quantize(moved.numpy(), kind))


def test_norms_of_gemma_read_back_as_they_are_held(tmp_path: Path) -> None:
    """1 is added in float32, which rounds tiny weights: held() says to what."""
    spec = TensorSpec("model.norm.weight", torch.bfloat16, (3,))
    writer = GgufWriter(tmp_path / "m.gguf", [spec], model_of("gemma2"), {}, LlamaFileType.ALL_F32)
    norm = torch.tensor([0.5, -1.25, 3e-9]).bfloat16()
    writer.write(spec.name, norm)
    assert torch.equal(writer.read_back(spec.name), writer.held(spec.name, norm))
    assert writer.read_back(spec.name).tolist() == [0.5, -1.25, 0.0]
    writer.finish()
    assert GGUFReader(tmp_path / "m.gguf").tensors[0].data.tolist() == [1.5, -0.25, 1.0]


KILLED = """
import os, signal, sys, torch
from tests.checkpoint.test_gguf_writer import *
writer = plain_writer(Path(sys.argv[1]))
writer.write("model.layers.0.mlp.up_proj.weight", torch.full((8, 4), 2.0))
writer.sync()
os.kill(os.getpid(), signal.SIGKILL)
"""


def plain_writer(folder: Path) -> GgufWriter:
    specs = [TensorSpec("model.embed_tokens.weight", torch.float32, (16, 4)),
             TensorSpec("model.layers.0.mlp.up_proj.weight", torch.float32, (8, 4))]
    model = model_of("llama", rotary={"rope_freqs.weight": torch.arange(2.0)})
    return GgufWriter(folder / "m.gguf", specs, model, {}, LlamaFileType.ALL_F32)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(killed)], cwd=ROOT, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in killed.iterdir()] == ["m.gguf.part"]
    first, second = plain_writer(straight), plain_writer(killed)
    assert (killed / "m.gguf.part").stat().st_size == (straight / "m.gguf.part").stat().st_size  # the full size at once
    assert bool((second.read_back("model.layers.0.mlp.up_proj.weight") == 2).all())
    first.write("model.layers.0.mlp.up_proj.weight", torch.full((8, 4), 2.0))
    for writer in (first, second):
        writer.write("model.embed_tokens.weight", torch.arange(64.0).reshape(4, 16).t())  # any strides
        writer.finish()
    assert (straight / "m.gguf").read_bytes() == (killed / "m.gguf").read_bytes()
    third = plain_writer(killed)
    assert third.finished
    with pytest.raises(OutputError, match="is finished"):
        third.write("model.embed_tokens.weight", torch.zeros(16, 4))
    third.finish()  # safe to repeat


def test_refuses_another_runs_file_and_wrong_tensors(tmp_path: Path) -> None:
    writer = plain_writer(tmp_path)
    with pytest.raises(ValueError, match=r"torch.float32 \[3\], planned torch.float32 \[16, 4\]"):
        writer.write("model.embed_tokens.weight", torch.zeros(3))
    spec = TensorSpec("model.norm.weight", torch.float32, (4,))
    with pytest.raises(OutputError, match="holds other tensors"):
        GgufWriter(tmp_path / "m.gguf", [spec], model_of("llama"), {}, LlamaFileType.ALL_F32)
    with pytest.raises(ValueError, match="planned twice"):
        GgufWriter(tmp_path / "n.gguf", [spec, spec], model_of("llama"), {}, LlamaFileType.ALL_F32)


def expert(index: int, rows: int = 4) -> TensorSpec:
    return TensorSpec(f"model.layers.0.mlp.experts.{index}.up_proj.weight", torch.float32, (rows, 4))


@pytest.mark.parametrize(("specs", "text"), [
    ([TensorSpec("model.layers.0.mlp.router.weight", torch.float32, (4,))], "mlp.router.weight' has no place"),
    ([TensorSpec("model.norm.weight", torch.float64, (4,))], "'model.norm.weight' is float64.*--type f16"),
    ([expert(0), expert(1, 8)], r"F32 \[8, 4\] and other experts of its layer are F32 \[4, 4\].*the same type"),
    ([expert(0), expert(2)], r"experts \[0, 2\], not all of them"),
])
def test_tensors_that_the_container_cannot_hold(tmp_path: Path, specs: list[TensorSpec], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        GgufWriter(tmp_path / "m.gguf", specs, model_of("qwen3_moe"), {}, LlamaFileType.ALL_F32)
    assert not list(tmp_path.iterdir())


def test_the_table_of_names_has_an_inverse() -> None:
    for family in FAMILIES:
        assert len(family.inverse) == len(family.layer)


# Models that are refused


def edited(folder: Path, out: Path, name: str, **changes: Any) -> Path:
    """A copy with other values in one JSON file."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    (out / name).write_text(json.dumps({**json.loads((out / name).read_text()), **changes}))
    return out


@pytest.mark.parametrize(("changes", "text"), [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp computes llama models with 'silu'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary scaling 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 3.0}},
     "rotary scaling 'yarn' with .*attention_factor"),
])
def test_configs_that_llama_cpp_would_compute_otherwise(llama: Path, tmp_path: Path, changes: dict[str, Any],
                                                        text: str) -> None:
    with pytest.raises(PlanError, match=text):
        export(edited(llama, tmp_path / "m", "config.json", **changes), tmp_path / "m.gguf")


def test_families_that_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="model type 'olmo2' is not written as GGUF .written: llama, mistral, mixtral"):
        export(tiny.make(tmp_path / "m", "olmo2", num_hidden_layers=1), tmp_path / "m.gguf")
    with pytest.raises(PlanError, match="norm_topk_prob is False"):
        export(tiny.make(tmp_path / "q", "qwen3_moe"), tmp_path / "m.gguf")
    with pytest.raises(PlanError, match="query_pre_attn_scalar is 20"):
        export(tiny.make(tmp_path / "g", "gemma2", query_pre_attn_scalar=20), tmp_path / "m.gguf")


def test_outputs_that_are_taken_and_types_that_are_unknown(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(OutputError, match="m.gguf exists; remove it"):
        export(llama, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="--type q9: give one of auto, f32, f16, bf16"):
        export(llama, tmp_path / "n.gguf", "q9")


def test_values_too_large_for_f16(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = edited(llama, tmp_path / "m", "config.json")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PlanError, match="layers.0.mlp.up_proj.weight has values beyond 65504.*--type bf16"):
        export(folder, tmp_path / "m.gguf", "f16")
    export(folder, tmp_path / "b.gguf", "bf16")
