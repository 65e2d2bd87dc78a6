"""Export to ONNX: the graph is well formed, its data stands for the source's weights bit for bit, refusals say why."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool import decode, export, export_onnx, manifest
from qtool.checkpoint.writer import ShardWriter
from qtool.cli import main
from qtool.errors import CheckpointError, InputError, ModelError, OutputError, VerificationError
from qtool.grids import affine
from qtool.onnx_graph import weights
from qtool.recipe import Rule, Scheme
from tests import tiny
from tests.formats.cases import dense as by_formula
from tests.formats.cases import random_tensor
from tests.loaders.checkpoints import build, case

SMALL = {"num_hidden_layers": 2, "intermediate_size": 96}
CT = "compressed-tensors"
MIXED = (Rule(match="*.layers.1.mlp.down_proj", bits=8, group_size=-1), Rule(match="lm_head", bits=8),
         Rule(match="*.o_proj", skip=True))
CASES = [case("gptq", 4, 32), case(CT, 4, 16, False), case(CT, 8, -1, False), case(CT, 2, 32, False), case(CT, 3, 32),
         case(CT, 3, 32, False), case("awq", 4, 32, False, name="awq"), case(CT, 4, 32, True, *MIXED, name="mixed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources: tiny models with 2 blocks, and quantized ones with scales of both signs."""
    folder = tmp_path_factory.mktemp("onnx")
    tiny.make(folder / "llama", "llama", **SMALL)
    for one in CASES:
        build(one, folder, folder / "llama")
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[str], Path]:
    """The exports of these sources, each made once."""
    def get(name: str) -> Path:
        out = folder / f"{name}-onnx"
        if not out.exists():
            write(folder / name, out)
        return out
    return get


def write(source: Path, out: Path, level: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    return export_onnx.run(export_onnx.make_export(decode.open_model(str(source)), out, level, dtype))


def load(out: Path) -> onnx.ModelProto:
    return onnx.load(out / "model.onnx", load_external_data=False)


def initializers(out: Path) -> dict[str, np.ndarray]:
    """Read from the data file as the format of external data says."""
    found = {}
    for tensor in load(out).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            with (out / where["location"]).open("rb") as file:
                file.seek(int(where["offset"]))
                found[tensor.name] = np.frombuffer(file.read(int(where["length"])), dtype).reshape(tensor.dims)
    return found


def node_weights(node: onnx.NodeProto, data: dict[str, np.ndarray]) -> np.ndarray:
    """What MatMulNBits multiplies by, [N, K], after its documentation; code by code."""
    told = {entry.name: entry.i for entry in node.attribute}
    bits, size, rows, columns = told["bits"], told["block_size"], told["N"], told["K"]
    packed, scales = data[node.input[1]].reshape(rows, -1), data[node.input[2]]
    zeros = data[node.input[3]] if len(node.input) > 3 else None
    result = np.empty((rows, columns), np.float32)
    mask = (1 << bits) - 1
    for column in range(columns):
        block = column // size
        codes = (packed[:, column * bits // 8] >> (column * bits % 8)) & mask
        zero = np.float32(1 << (bits - 1))
        if zeros is not None:
            zero = ((zeros[:, block * bits // 8] >> (block * bits % 8)) & mask).astype(np.float32)
        result[:, column] = (codes.astype(np.float32) - zero) * scales[:, block]
    return result


@pytest.mark.parametrize("one", CASES, ids=str)
def test_every_linear_stands_for_the_weights_of_the_source(one: Any, exported: Callable[[str], Path],
                                                           folder: Path) -> None:
    out, source = exported(one.name), decode.open_model(str(folder / one.name))
    data, nodes = initializers(out), {node.name: node for node in load(out).graph.node}
    seen = 0
    for linear in source.schemes:
        name = "/" + linear.replace(".self_attn.", ".attn.").replace(".", "/").replace("layers/", "layers.", 1)
        node = nodes[f"{name}/MatMulNBits"]
        assert np.array_equal(node_weights(node, data), source.decoded(linear).numpy())
        told = {entry.name: entry.i for entry in node.attribute}
        scheme = source.schemes[linear]
        assert len(node.input) == (3 if scheme.symmetric else 4) and told["accuracy_level"] == 0
        assert told["bits"] == {3: 4}.get(scheme.bits, scheme.bits)
        seen += 1
    assert seen == sum(node.op_type == "MatMulNBits" for node in nodes.values())


def test_what_is_not_quantized_is_kept_in_its_dtype(exported: Callable[[str], Path], folder: Path) -> None:
    out, source = exported("mixed"), decode.open_model(str(folder / "mixed"))
    data = {name: torch.from_numpy(one.view(np.uint8).copy()) for name, one in initializers(out).items()}
    table = source.read("model.embed_tokens.weight")
    assert torch.equal(data["model.embed_tokens.weight"], table.view(torch.uint8))
    skipped = source.read("model.layers.0.self_attn.o_proj.weight").T.contiguous()
    assert torch.equal(data["model.layers.0.attn.o_proj.MatMul.weight"], skipped.view(torch.uint8))
    norm = source.read("model.layers.1.input_layernorm.weight").float()
    assert torch.equal(data["model.layers.1.input_layernorm.weight"], norm.view(torch.uint8))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_the_graph_is_well_formed(family: str, tmp_path: Path) -> None:
    """SimplifiedLayerNormalization is onnxruntime's operator in the domain of ONNX: the checker does not know it."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    write(tiny.make(tmp_path / "source", family, **SMALL, **layers), tmp_path / "out")
    model = load(tmp_path / "out")
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    (tmp_path / "out" / "checked.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(tmp_path / "out" / "checked.onnx"))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    table = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [tiny.VOCABULARY, 64]]
    head = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [64, tiny.VOCABULARY]]
    assert len(table) == 1 and len(head) == (0 if tiny.FAMILIES[family].get("tie_word_embeddings") else 1)
    windows = [entry.i for node in model.graph.node for entry in node.attribute if entry.name == "local_window_size"]
    assert windows == {"mistral": [8, 8], "gemma2": [8, -1], "gemma3": [8, -1]}.get(family, [-1, -1])


def test_inputs_outputs_and_places(exported: Callable[[str], Path]) -> None:
    out = exported("int4-g32")
    model = load(out)

    def shapes(values: Any) -> dict[str, list]:
        return {one.name: [size.dim_param or size.dim_value for size in one.type.tensor_type.shape.dim]
                for one in values}

    inputs, outputs = shapes(model.graph.input), shapes(model.graph.output)
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16] and len(inputs) == 6
    assert outputs["logits"] == ["batch_size", "sequence_length", tiny.VOCABULARY]
    assert outputs["present.0.key"] == ["batch_size", 2, "total_sequence_length", 16] and len(outputs) == 5
    assert model.ir_version == 10
    assert {one.domain: one.version for one in model.opset_import} == {"": 21, "com.microsoft": 1}
    end = 0
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            assert int(where["offset"]) >= end and int(where["offset"]) % 64 == 0
            end = int(where["offset"]) + int(where["length"])
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            assert int(where["length"]) == math.prod(tensor.dims) * kind.itemsize
    assert end == (out / "model.onnx.data").stat().st_size


def test_a_graph_in_float16(folder: Path, tmp_path: Path) -> None:
    """The same weights; scales that float16 cannot hold are refused."""
    source = decode.open_model(str(folder / "uint4-g16"))
    write(folder / "uint4-g16", tmp_path / "out", dtype="float16")
    model, data = load(tmp_path / "out"), initializers(tmp_path / "out")
    node = next(node for node in model.graph.node if node.name == "/model/layers.1/mlp/up_proj/MatMulNBits")
    assert data[node.input[2]].dtype == np.float16
    assert np.array_equal(node_weights(node, data), source.decoded("model.layers.1.mlp.up_proj").numpy())
    kinds = {one.type.tensor_type.elem_type for one in (*model.graph.output, *model.graph.input)}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    with pytest.raises(InputError, match="--dtype of an ONNX graph is float32 or float16, not bfloat16"):
        write(folder / "uint4-g16", tmp_path / "other", dtype="bfloat16")
    shutil.copytree(folder / "uint4-g16", tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 2.0**-30
    save_file(tensors, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="1 of 14 linears have bfloat16 scales that float16.*leave --dtype out"):
        write(tmp_path / "small", tmp_path / "other", dtype="float16")


def test_the_files_of_genai(folder: Path, exported: Callable[[str], Path], tmp_path: Path) -> None:
    made = json.loads((exported("llama") / "genai_config.json").read_text())
    assert made["model"]["type"] == "llama" and made["model"]["eos_token_id"] == 1
    assert made["model"]["decoder"]["num_key_value_heads"] == 2 and made["model"]["context_length"] == 256
    source = tiny.make(tmp_path / "source", "llama", **SMALL)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "do_sample": True, "top_k": 3}))
    write(source, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert made["model"]["eos_token_id"] == [7, 9] and made["model"]["pad_token_id"] == 7
    assert made["search"]["do_sample"] is True and made["search"]["top_k"] == 3
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 256
    assert "quantization_config" not in json.loads((exported("int4-g32") / "config.json").read_text())
    (source / "generation_config.json").write_text("[")
    with pytest.raises(InputError, match="generation_config.json cannot be read as JSON"):
        write(source, tmp_path / "other")


def test_two_exports_are_equal(exported: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    write(folder / "int4-g32", tmp_path / "again")
    files = [{path.name: path.read_bytes() for path in place.iterdir()}
             for place in (exported("int4-g32"), tmp_path / "again")]
    assert files[0] == files[1]
    hashes = manifest.load(tmp_path / "again")["outputs"]
    assert hashes["model.onnx.data"] == manifest.file_hash(tmp_path / "again" / "model.onnx.data")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        return int(stopped.value.code or 0)

    three = folder / "int3-g32"
    assert run("export", three, "--to", "onnx", "--accuracy-level", "4", "--out", tmp_path / "out", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "onnx" and result["lossless"] and result["linears"] == 14
    assert result["notes"] == ["14 linears of 3 bits take 4 bits per weight here: MatMulNBits has 2, 4 and 8"]
    levels = {entry.i for node in load(tmp_path / "out").graph.node for entry in node.attribute
              if entry.name == "accuracy_level"}
    assert levels == {4}
    assert "onnxruntime_genai" in (tmp_path / "out" / "README.md").read_text()
    assert run("export", three, "--to", "gptq", "--accuracy-level", "4") == 2
    assert "--accuracy-level is for --to onnx, not gptq" in capsys.readouterr().err
    assert run("export", three, "--to", "onnx", "--accuracy-level", "9", "--out", tmp_path / "x") == 2
    assert "--accuracy-level is 0 to 4, not 9" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_without_a_tokenizer_and_with_zero_points_that_are_denied(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder / "int4-g32", source)
    (source / "tokenizer.json").unlink()
    assert "no tokenizer.json" in write(source, tmp_path / "out")["notes"][0]
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.qzeros"][0, 0] ^= 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj: .* calls it symmetric, but its zero points.*--to hf"):
        write(source, tmp_path / "other")


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("place", ["data", "naming", "finishing"])
def test_a_killed_export_gives_the_same_files(place: str, exported: Callable[[str], Path], folder: Path,
                                              tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any, **more: Any) -> None:
        raise Killed

    def step(done: int, total: int, text: str) -> None:
        if place == "data" and done == 5:
            raise Killed

    job = export_onnx.make_export(decode.open_model(str(folder / "int4-g32")), tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if place != "data":
            patch.setattr(*((ShardWriter, "finish", die) if place == "naming" else (export, "finish", die)))
        export_onnx.run(job, step)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    with pytest.raises(OutputError, match="accuracy_level: 0 -> 1"):
        write(folder / "int4-g32", tmp_path / "out", 1)
    export_onnx.run(job)
    files = [{path.name: path.read_bytes() for path in one.iterdir()}
             for one in (exported("int4-g32"), tmp_path / "out")]
    assert files[0] == files[1] and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.MatMulNBits.scales", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_noticed(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = ShardWriter.read_back

    def flipped(self: ShardWriter, wanted: str) -> torch.Tensor:
        tensor = genuine(self, wanted)
        if wanted == name:
            tensor.view(torch.uint8)[0, 0] ^= 4
        return tensor

    monkeypatch.setattr(ShardWriter, "read_back", flipped)
    with pytest.raises(VerificationError, match="differs from the source"):
        write(folder / "int4-g32", tmp_path / "out")


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Scheme, int, int, int]:
    group = draw(st.sampled_from([-1, 16, 32, 48, 64, 128, 256]))
    columns = draw(st.integers(1, 3)) * (16 if group == -1 else group)
    scheme = Scheme(bits=draw(st.integers(2, 8)), group_size=group, symmetric=draw(st.booleans()))
    return scheme, draw(st.integers(1, 9)), columns, draw(st.integers(0, 99))


@settings(max_examples=80, deadline=None)
@given(tensors())
def test_blocks_hold_every_integer_grid(drawn: tuple[Scheme, int, int, int]) -> None:
    scheme, rows, columns, seed = drawn
    assert weights.refusal(scheme, "linear", (rows, columns)) is None
    tensor, form = random_tensor(rows, columns, scheme, torch.bfloat16, seed), weights.blocks(scheme, (rows, columns))
    packed = weights.pack(tensor, form)
    assert [(one.dtype, tuple(one.shape)) for one in packed] == [
        (spec.dtype, spec.shape) for spec in form.specs("linear", (rows, columns))]
    assert torch.equal(affine.decode(weights.unpack(packed, form)), by_formula(tensor))


@pytest.mark.parametrize(("scheme", "columns", "words"), [
    (Scheme(grid="nf4", bits=4, group_size=64), 64, "integers, not the nf4 grid of P"),
    (Scheme(grid="fp8", bits=8, group_size=-1), 64, "integers, not the fp8 grid of P"),
    (Scheme(bits=8, group_size=-1, activations="token"), 64, "P has activations: token"),
    (Scheme(bits=4, group_size=8), 64, "the groups of 8 columns of P"),
    (Scheme(bits=4, group_size=-1), 72, "the rows of 72 columns of P"),
])
def test_linears_that_have_no_place(scheme: Scheme, columns: int, words: str) -> None:
    reason = weights.refusal(scheme, "P", (8, columns))
    assert reason is not None and words in reason and "quantize the original" in reason and "--to hf" in reason


@pytest.mark.parametrize(("family", "overrides", "words"), [
    ("phi3", {}, "model type 'phi3'; known: llama, mistral"),
    ("mixtral", {}, "model type 'mixtral'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
])
def test_models_that_have_no_graph(family: str, overrides: dict, words: str, tmp_path: Path) -> None:
    source = decode.open_model(str(tiny.make(tmp_path / "source", family, num_hidden_layers=2, **overrides)))
    with pytest.raises(ModelError, match=words):
        export_onnx.make_export(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_without_the_onnx_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install 'qtool\\[onnx\\]'"):
        export_onnx.make_export(decode.open_model(str(folder / "llama")), tmp_path / "out")
