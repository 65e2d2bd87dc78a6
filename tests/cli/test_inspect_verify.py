"""inspect --verify: damage of every kind and what is said of it; the second decoder; what a damaged model predicts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, digests, independent, manifest
from qtool.inspect import loader_gguf
from tests import tiny
from tests.cli.conftest import Run, make

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def sharded(model: Path) -> Path:
    out = model.with_name("sharded")
    make("quantize", model, "--method", "rtn", "--group-size", "32", "--set", "shard_gb=0.0001", "--out", out,
         "--quiet")
    return out


@pytest.fixture(scope="module")
def alone(model: Path) -> Path:
    """A GGUF file without a manifest."""
    out = model.with_name("alone.gguf")
    make("export", model, "--to", "gguf", "--type", "q4_0", "--out", out, "--quiet")
    return out


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def swap(folder: Path) -> None:
    one, other = shards(folder)[:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def cut_off(folder: Path) -> None:
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])


def longer(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"\n")
    return change


def empty(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"") and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def add(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return change


@pytest.mark.parametrize(("change", "words"), [
    (swap, r"model-00001-of-\d+.safetensors: is not as it was written"),
    (cut_off, r"model-00001-of-\d+.safetensors: is not as it was written"),
    (longer("model-00002-of-00002.safetensors"), r"model-00002-of-00002.safetensors: is not as it was written"),
    (longer("tokenizer.json"), r"tokenizer.json: is not as it was written"),
    (longer("README.md"), r"README.md: is not as it was written"),
    (longer("manifest.json"), r"manifest.json: has no sha256 of its own at its end"),
    (longer("model.safetensors.index.json"), r"model.safetensors.index.json: is not as it was written"),
    (empty("config.json"), r"config.json: is not as it was written"),
    (empty("manifest.json"), r"manifest.json: has no sha256"),
    (remove("generation_config.json"), r"generation_config.json: is in the manifest, but not there"),
    (remove("model-00001-of-00002.safetensors"), r"model-00001-of-00002.safetensors: is in the manifest, but not"),
    (remove("config.json"), r"config.json: is in the manifest, but not there"),
    (add("model-00003-of-00003.safetensors"), r"model-00003-of-00003.safetensors: is not in the manifest"),
    (add("tokenizer.model"), r"tokenizer.model: is not in the manifest"),
    (add("modeling/evil.py"), r"modeling/evil.py: is not in the manifest"),
])
def test_files_that_are_not_those_written(change: Callable[[Path], None], words: str, run: Run, sharded: Path,
                                          tmp_path: Path) -> None:
    assert len(shards(sharded)) == 2
    shutil.copytree(sharded, tmp_path / "out")
    change(tmp_path / "out")
    status, out, err = run("inspect", tmp_path / "out", "--verify", "--json")
    assert status == 3 and re.search(words, "\n".join(json.loads(out)["problems"])), (status, out, err)
    assert re.search(words, err)


def test_files_of_other_programs_are_left_alone(run: Run, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "out")
    for name in (".gitattributes", ".cache/huggingface/x.lock"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("x")
    assert run("inspect", tmp_path / "out", "--verify")[0] == 0


def test_the_damaged_tensor_is_named(run: Run, sharded: Path, tmp_path: Path) -> None:
    for name in (f"{Q}.weight_packed", "model.norm.weight"):
        out = tmp_path / name
        shutil.copytree(sharded, out)
        path, start = next((path, start) for path in shards(out) for known, start, _ in digests.places(path)
                           if known == name)
        data = bytearray(path.read_bytes())
        data[start + 3] ^= 4
        path.write_bytes(data)
        problems = json.loads(run("inspect", out, "--verify", "--json")[1])["problems"]
        assert problems[0].endswith(f"manifest's), in {name}")
        assert any(one.startswith(f"{Q}: its values are not those that were solved") for one in problems) == (
            "q_proj" in name)


def test_a_gguf_file_carries_its_own_sum(run: Run, alone: Path, tmp_path: Path) -> None:
    assert run("inspect", alone, "--verify")[0] == 0
    content = bytearray(alone.read_bytes())
    seal = content.index(b"qtool.sha256")
    for name, place, words in (("data", len(content) - 5, "is not as qtool wrote it"),
                               ("name", seal + 3, "is not as qtool wrote it"),
                               ("value", seal + 30, "is not as qtool wrote it"), ("magic", 1, "not with GGUF")):
        content[place] ^= 1
        (tmp_path / f"{name}.gguf").write_bytes(content)
        content[place] ^= 1
        status, out, _ = run("inspect", tmp_path / f"{name}.gguf", "--verify", "--json")
        assert status == 3 and words in json.loads(out)["problems"][0], name
    (tmp_path / "short.gguf").write_bytes(content[:-32])
    assert run("inspect", tmp_path / "short.gguf", "--verify")[0] == 3


def test_what_has_nothing_to_do_with_the_files_is_bad_input(run: Run, sharded: Path, tmp_path: Path) -> None:
    assert run("inspect", tmp_path / "nothing", "--verify")[0] == 2
    status, _, err = run("inspect", sharded, "--verify", "--against", tmp_path / "nothing")
    assert status == 2 and "--against" in err


def test_a_wrong_scheme_that_opens_is_found_by_the_second_decoder(run: Run, gptq: Path, tmp_path: Path) -> None:
    """gptq_v2 in place of gptq: every zero point is off by one, and everything still loads."""
    assert run("export", gptq, "--to", "gptq", "--out", tmp_path / "g", "--quiet")[0] == 0
    config = json.loads((tmp_path / "g/config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "g/config.json").write_text(json.dumps(config))
    problems = json.loads(run("inspect", tmp_path / "g", "--verify", "--json")[1])["problems"]
    assert any("its values are not those that were solved" in one for one in problems)


def test_a_mistake_of_both_sides_is_found(run: Run, gptq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that agrees with a wrong packer: only code that shares nothing with them sees it."""
    from qtool.formats import _stored

    right = _stored.Stored.dequantize
    monkeypatch.setattr(_stored.Stored, "dequantize", lambda stored: right(stored).flip(1))
    status, out, _ = run("inspect", gptq, "--verify", "--json")
    assert status == 3 and "this is a bug in qtool" in json.loads(out)["problems"][0]


@pytest.mark.parametrize("to", ["gptq", "onnx"])
def test_the_digest_of_values_outlives_the_format(to: str, gptq: Path, tmp_path: Path) -> None:
    make("export", gptq, "--to", to, "--out", tmp_path / "out", "--quiet")
    source = decode.open_model(str(gptq))
    for layer in manifest.load(tmp_path / "out")["layers"]:
        weight = source.decoded(layer["stored"])
        assert layer["values_sha256"] == digests.of_values(weight) == independent.values_sha256(weight.numpy())


def test_no_sign_of_zero_in_the_digest() -> None:
    weight = torch.tensor([[0.0, 1.0]])
    assert digests.of_values(weight) == digests.of_values(-weight * torch.tensor([1.0, -1.0]))
    assert digests.of_values(weight) != digests.of_values(weight + 1e-7)
    assert digests.of_values(weight) == independent.values_sha256(np.array([[-0.0, 1.0]], np.float32))


def test_predictions_against_the_original(run: Run, model: Path, gptq: Path, tmp_path: Path) -> None:
    result = json.loads(run("inspect", gptq, "--verify", "--against", model, "--json")[1])
    told = result["predictions"]
    assert result["problems"] == [] and 0 < told["kl"] < told["limit"] == 1.0 and told["windows"] == 4
    shutil.copytree(gptq, tmp_path / "noise")
    (tmp_path / "noise" / manifest.NAME).unlink()
    tensors = load_file(tmp_path / "noise/model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0) * 40
    save_file(tensors, tmp_path / "noise/model.safetensors", {"format": "pt"})
    status, out, _ = run("inspect", tmp_path / "noise", "--verify", "--against", model, "--json")
    assert status == 3 and "nats of KL divergence away" in json.loads(out)["problems"][-1]
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1e38
    save_file(tensors, tmp_path / "noise/model.safetensors", {"format": "pt"})
    status, out, _ = run("inspect", tmp_path / "noise", "--verify", "--against", model, "--json")
    assert status == 3 and "not finite" in json.loads(out)["no_predictions"]


def test_an_older_or_edited_manifest_is_told(run: Run, gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "out")
    record = json.loads((tmp_path / "out" / manifest.NAME).read_text())
    record.pop("sha256")
    (tmp_path / "out" / manifest.NAME).write_text(json.dumps(record, indent=1) + "\n")
    assert run("inspect", tmp_path / "out")[0] == 0
    status, _, err = run("inspect", tmp_path / "out", "--verify")
    assert status == 3 and "an older qtool wrote it" in err


def test_a_gguf_of_turned_rows_and_experts_is_read_twice(run: Run, tmp_path: Path) -> None:
    for family, extra in (("llama", {}), ("qwen3_moe", {"norm_topk_prob": True})):
        source = tiny.make(tmp_path / family, family, num_hidden_layers=1, **extra)
        make("export", source, "--to", "gguf", "--type", "q8_0", "--out", tmp_path / f"{family}.gguf", "--quiet")
        result = json.loads(run("inspect", tmp_path / f"{family}.gguf", "--verify", "--json")[1])
        assert result["problems"] == [] and result["decoded_once"] == {}


Metadata = dict[str, object]


def spoiled_gguf(alone: Path, out: Path, change: Callable[[Metadata], None]) -> Path:
    """The same file with other metadata, without a seal, as another program might write it."""
    import gguf

    reader = gguf.GGUFReader(alone)
    values: Metadata = {key: field for key, field in reader.fields.items() if not key.startswith(("GGUF.", "qtool."))}
    change(values)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in values.items():
        if key == "general.architecture":
            continue
        if isinstance(field, gguf.ReaderField):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
        else:
            writer.add_uint32(key, int(str(field)))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(("key", "value", "words"), [
    ("llama.embedding_length", 32, "token_embd.weight is [512, 64], but by llama.embedding_length it has 32"),
    ("llama.feed_forward_length", 64, "ffn_down.weight is [64, 128], but by llama.feed_forward_length it has 64"),
    ("llama.block_count", 4, "llama.block_count is 4, but the file has tensors of 3 blocks"),
    ("tokenizer.ggml.eos_token_id", 5000, "tokenizer.ggml.eos_token_id is 5000"),
])
def test_what_llama_cpp_refuses(key: str, value: int, words: str, alone: Path, tmp_path: Path) -> None:
    bad = spoiled_gguf(alone, tmp_path / "bad.gguf", lambda values: values.update({key: value}))
    found = loader_gguf.faults(bad)
    assert any(words in one for one in found), found
    assert loader_gguf.faults(spoiled_gguf(alone, tmp_path / "good.gguf", lambda values: None)) == []


@pytest.mark.parametrize(("path", "value", "words"), [
    ("vocab_size", 500, "vocab_size is 500, but the graph gives logits of 512"),
    ("context_length", "256", "context_length must be positive whole numbers"),
    ("decoder/filename", "other.onnx", "decoder.filename is 'other.onnx'"),
    ("decoder/head_size", 8, "2 heads of 8 for keys, but the graph has 2 of 16"),
    ("decoder/num_hidden_layers", 4, "the graph has no past_key_values.3.key"),
    ("decoder/inputs/input_ids", "ids", "decoder.inputs.input_ids is 'ids', but the graph has no ids"),
    ("decoder/num_hidden_layers", 2, "has no name for past_key_values.2.key"),
])
def test_what_onnxruntime_genai_refuses(path: str, value: object, words: str, run: Run, gptq: Path,
                                        tmp_path: Path) -> None:
    make("export", gptq, "--to", "onnx", "--out", tmp_path / "out", "--quiet")
    (tmp_path / "out" / manifest.NAME).unlink()
    config = json.loads((tmp_path / "out/genai_config.json").read_text())
    *parents, last = path.split("/")
    place = config["model"]
    for key in parents:
        place = place[key]
    place[last] = value
    (tmp_path / "out/genai_config.json").write_text(json.dumps(config))
    status, out, _ = run("inspect", tmp_path / "out", "--verify", "--json")
    assert status == 3 and any(words in one for one in json.loads(out)["problems"]), out


def test_a_tensor_that_was_to_stay_as_it_is(run: Run, model: Path, gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    result = json.loads(run("inspect", tmp_path / "out", "--verify", "--against", model, "--tokens", "0", "--json")[1])
    assert any(one.startswith("model.norm.weight: is not quantized, but differs") for one in result["problems"])
