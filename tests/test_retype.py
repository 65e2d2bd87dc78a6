"""qtool export of a GGUF file to GGUF: its keys are copied, its tensors are what the longer way gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from qtool import export_gguf, retype
from qtool.checkpoint import gguf_header, open_checkpoint
from qtool.checkpoint.gguf_header import read_gguf_header
from qtool.checkpoint.gguf_outline import outline
from qtool.checkpoint.gguf_seal import SealedFile, wrong
from qtool.checkpoint.imatrix import gathered, write_imatrix
from qtool.decode import open_model
from qtool.errors import CheckpointError, OutputError, PlanError, VerificationError
from tests import tiny
from tests.checkpoint.gguf_maker import convert

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 256, "norm_topk_prob": True},
    "gemma3": {"num_hidden_layers": 3, "query_pre_attn_scalar": 64},
    "gemma2": {"query_pre_attn_scalar": 64}}
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen3_moe")
CHANGED = {"general.file_type", "general.quantization_version", "qtool.sealed", "qtool.sha256"}


def through_the_model(source: Path, out: Path, kind: str | None, imatrix: Path | None = None) -> dict[str, Any]:
    return export_gguf.run(export_gguf.make_export(open_model(str(source)), kind, out, imatrix))


def directly(source: Path, out: Path, kind: str | None, imatrix: Path | None = None) -> dict[str, Any]:
    job = retype.make_export(source, kind, out, imatrix)
    assert job is not None
    return retype.run(job, lambda done, total, text: None)


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> type, shape and bytes of every tensor."""
    data = path.read_bytes()
    return {one.name: (one.kind.name, one.shape, data[one.offset:one.offset + one.nbytes])
            for one in read_gguf_header(path).tensors.values()}


def entries(path: Path) -> dict[str, bytes]:
    """Key -> key, type and value as they lie in the file."""
    data = path.read_bytes()
    return {key: data[begin:end] for key, (begin, end) in read_gguf_header(path).entries.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.bf16.gguf, and its checkpoint."""
    path = tmp_path_factory.mktemp("retype")
    tiny.make(path / "llama", "llama", **WIDE)
    through_hf(path / "llama", path / "llama.gguf")
    return path


def through_hf(model: Path, out: Path) -> None:
    export_gguf.run(export_gguf.make_export(open_model(str(model)), None, out))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tensors_and_keys_without_a_model(family: str, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    through_hf(tiny.make(tmp_path / "hf", family, **{**WIDE, **OWN.get(family, {})}), source)
    for kind in ("q4_k_m", "f16"):
        new, old = tmp_path / f"new-{kind}.gguf", tmp_path / f"old-{kind}.gguf"
        told, before = directly(source, new, kind), through_the_model(source, old, kind)
        routers = {name: one for name, one in stored(source).items() if "ffn_gate_inp" in name}
        assert stored(new) == {**stored(old), **routers}  # the longer way rounds routers to float16 on the way
        assert {**told, "out": "", "outputs": ""} == {**before, "out": "", "outputs": ""}
        there, made = entries(source), entries(new)
        assert set(made) == set(there) and {key for key in there if made[key] != there[key]} <= CHANGED
        assert made["general.file_type"] == entries(old)["general.file_type"]
        assert wrong(new, read_gguf_header(new)) is None
        gguf.GGUFReader(new)
        open_checkpoint(str(new)).close()


@pytest.mark.parametrize("shared", [False, True])
def test_keys_of_other_programs_go_over(shared: bool, tmp_path: Path) -> None:
    """A file that another converter made, with keys that no one here knows; also one with shared experts."""
    own = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
           "shared_expert_intermediate_size": 256, "norm_topk_prob": False}
    model = tiny.make(tmp_path / "hf", "qwen2" if shared else "llama", **{**WIDE, **(own if shared else {})})
    kind, name = GGMLQuantizationType.F16, "qwen2moe" if shared else "llama"
    source = convert(model, tmp_path / "m.gguf", name, kind, custom__note="kept", custom__list=[1, 2, 3])
    directly(source, tmp_path / "new.gguf", "q8_0")
    through_the_model(source, tmp_path / "old.gguf", "q8_0")
    assert stored(tmp_path / "new.gguf") == stored(tmp_path / "old.gguf")
    there, made = entries(source), entries(tmp_path / "new.gguf")
    assert {key: made[key] for key in there if key not in CHANGED} == {
        key: value for key, value in there.items() if key not in CHANGED}
    assert set(made) - set(there) == CHANGED - set(there) and b"kept" in made[f"{name}.custom.note"]


def test_blocks_of_the_wanted_type_are_copied(folder: Path, tmp_path: Path) -> None:
    """And others are decoded to float32, not to bfloat16 first."""
    first, again, other = tmp_path / "q8.gguf", tmp_path / "again.gguf", tmp_path / "q4.gguf"
    assert not directly(folder / "llama.gguf", first, "q8_0")["lossless"]
    told = directly(first, again, "q8_0")
    assert told["lossless"] and told["checked"] == "every tensor was read back; lossless"
    assert stored(again) == stored(first)
    directly(first, other, "q4_0")
    exact = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(first).tensors}
    wide = convert_values(folder / "llama.gguf", exact, tmp_path / "f32.gguf")
    directly(wide, tmp_path / "reference.gguf", "q4_0")
    assert stored(other) == stored(tmp_path / "reference.gguf")


def convert_values(like: Path, values: dict[str, np.ndarray], out: Path) -> Path:
    """A float32 file with the keys of `like` and these values."""
    directly(like, out, "f32")
    data = bytearray(out.read_bytes())
    for one in read_gguf_header(out).tensors.values():
        data[one.offset:one.offset + one.nbytes] = np.ascontiguousarray(values[one.name], np.float32).tobytes()
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("kind", [None, "AUTO", "bf16", "f32"])
def test_dense_types(folder: Path, tmp_path: Path, kind: str | None) -> None:
    told = directly(folder / "llama.gguf", tmp_path / "new.gguf", kind)
    before = through_the_model(folder / "llama.gguf", tmp_path / "old.gguf", kind)
    assert told["lossless"] and told["format"] == before["format"] and stored(tmp_path / "new.gguf") == stored(
        tmp_path / "old.gguf")


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q5_0, GGMLQuantizationType.IQ4_NL])
def test_blocks_decode_to_what_the_gguf_package_says(kind: GGMLQuantizationType, folder: Path, tmp_path: Path) -> None:
    source = convert(folder / "llama", tmp_path / "m.gguf", "llama", kind) if kind != GGMLQuantizationType.IQ4_NL else (
        tmp_path / "m.gguf")
    if kind == GGMLQuantizationType.IQ4_NL:
        directly(folder / "llama.gguf", source, "iq4_nl")
    directly(source, tmp_path / "f32.gguf", "f32")
    found = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    for one in gguf.GGUFReader(source).tensors:
        expected = gguf.dequantize(one.data, one.tensor_type)
        assert np.array_equal(found[one.name].reshape(expected.shape), expected), one.name


def test_an_importance_matrix_of_each_expert(tmp_path: Path) -> None:
    source, matrix = tmp_path / "m.gguf", tmp_path / "i.gguf"
    through_hf(tiny.make(tmp_path / "hf", "qwen3_moe", **{**WIDE, **OWN["qwen3_moe"]}), source)
    draw = torch.Generator().manual_seed(3)
    inputs = {name: (torch.rand(spec.shape[1], generator=draw), 8) for name, spec in
              open_model(str(tmp_path / "hf")).specs.items() if "_proj" in name}
    write_imatrix(matrix, gathered(inputs, "qwen3_moe"), ["text"], 1, 8)
    for name, imatrix in (("plain", None), ("weighed", matrix)):
        directly(source, tmp_path / f"new-{name}.gguf", "q4_k_m", imatrix)
        through_the_model(source, tmp_path / f"old-{name}.gguf", "q4_k_m", imatrix)
        assert stored(tmp_path / f"new-{name}.gguf") == stored(tmp_path / f"old-{name}.gguf")
    assert stored(tmp_path / "new-plain.gguf") != stored(tmp_path / "new-weighed.gguf")


def test_no_transformers(folder: Path, tmp_path: Path) -> None:
    script = ("import sys\nfrom qtool.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
              "    assert not end.code\nassert 'transformers' not in sys.modules and 'tokenizers' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", script, "export", str(folder / "llama.gguf"), "--to", "gguf", "--type",
                    "q4_0", "--out", str(tmp_path / "m.gguf"), "--quiet"], check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "m.gguf").is_file()


def test_two_threads_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    directly(folder / "llama.gguf", tmp_path / "one.gguf", "q4_k_m")
    torch.set_num_threads(2)
    try:
        directly(folder / "llama.gguf", tmp_path / "two.gguf", "q4_k_m")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_what_is_left_to_the_longer_way(folder: Path, tmp_path: Path) -> None:
    model, source = folder / "llama", folder / "llama.gguf"
    assert retype.make_export(source, "q9", tmp_path / "m.gguf", None) is None
    assert retype.make_export(source, "f16", tmp_path / "m.gguf", tmp_path / "i.gguf") is None
    bare = convert(model, tmp_path / "bare.gguf", "llama", tokens=False)
    assert outline(bare) is None  # its tokenizer is nowhere
    for key, value in (("llama.embedding_length", 512), ("llama.feed_forward_length", 256),
                       ("llama.attention.head_count_kv", 4), ("llama.block_count", 1)):
        path = tmp_path / f"{key}.gguf"
        data = bytearray(source.read_bytes())
        begin, end = read_gguf_header(source).entries[key]
        data[end - 4:end] = value.to_bytes(4, "little")
        path.write_bytes(data)
        assert outline(path) is None, key
    assert outline(source) is not None
    (tmp_path / "m.gguf").touch()
    with pytest.raises(OutputError, match=r"m\.gguf exists; remove it"):
        retype.make_export(source, "q4_0", tmp_path / "m.gguf", None)


def test_values_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    def with_value(name: str, value: float) -> Path:
        path = tmp_path / "bad.gguf"
        directly(folder / "llama.gguf", tmp_path / "wide.gguf", "f32")
        data = bytearray((tmp_path / "wide.gguf").read_bytes())
        offset = read_gguf_header(tmp_path / "wide.gguf").tensors[name].offset
        data[offset:offset + 4] = np.float32(value).tobytes()
        path.write_bytes(data)
        (tmp_path / "wide.gguf").unlink()
        return path

    with pytest.raises(CheckpointError, match=r"bad\.gguf: blk\.0\.attn_q\.weight: has values that are NaN"):
        directly(with_value("blk.0.attn_q.weight", np.nan), tmp_path / "a.gguf", "q4_0")
    with pytest.raises(CheckpointError, match=r"output_norm\.weight: has values that are NaN or infinite"):
        directly(with_value("output_norm.weight", np.inf), tmp_path / "b.gguf", "q4_0")
    with pytest.raises(PlanError, match=r"blk\.1\.ffn_up\.weight has values beyond 65504"):
        directly(with_value("blk.1.ffn_up.weight", 1e6), tmp_path / "c.gguf", "f16")


def test_a_stopped_export_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool import resuming

    monkeypatch.setattr(resuming, "RECORDED", 100_000)
    directly(folder / "llama.gguf", tmp_path / "whole.gguf", "q4_k_m")
    real, written = SealedFile.write, list[str]()

    def write(self: SealedFile, data: memoryview, offset: int, name: str) -> None:
        written.append(name)
        if len(written) == 12:
            raise SystemExit(9)
        real(self, data, offset, name)

    with monkeypatch.context() as patch:
        patch.setattr(SealedFile, "write", write)
        with pytest.raises(SystemExit):
            directly(folder / "llama.gguf", tmp_path / "m.gguf", "q4_k_m")
    before, count = [*written], len(set(written))
    with monkeypatch.context() as patch:
        patch.setattr(SealedFile, "write", lambda *given: (written.append(given[3]), real(*given))[1])
        directly(folder / "llama.gguf", tmp_path / "m.gguf", "q4_k_m")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    again = set(written[len(before):]) & set(before)
    assert count == 12 and len(again) < 6  # what was recorded is not written again
    assert not (tmp_path / "m.gguf.partial").exists()


def test_what_is_read_back_is_compared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SealedFile.write

    def write(self: SealedFile, data: memoryview, offset: int, name: str) -> None:
        flipped = bytearray(data)
        flipped[-1] ^= 1
        real(self, memoryview(flipped) if name == "blk.1.attn_v.weight" else data, offset, name)

    monkeypatch.setattr(SealedFile, "write", write)
    with pytest.raises(VerificationError, match=r"blk\.1\.attn_v\.weight: what was read back"):
        directly(folder / "llama.gguf", tmp_path / "m.gguf", "q4_k_m")


def test_texts_across_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_gguf_header(folder / "llama.gguf").metadata
    monkeypatch.setattr(gguf_header, "WINDOW_BYTES", 21)
    assert read_gguf_header(folder / "llama.gguf").metadata == whole
