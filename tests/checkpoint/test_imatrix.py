"""Importance matrices: llama.cpp's two files, the names of a model, hostile bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.checkpoint.imatrix import gathered, read_imatrix, spread, write_imatrix
from qtool.errors import CheckpointError, PlanError

ENTRIES = {
    "blk.0.attn_q.weight": (torch.tensor([[1.0, 2.0, 0.5, 4.0]]), torch.tensor([512.0])),
    "blk.0.ffn_up_exps.weight": (torch.tensor([[1.0, 2.0], [3.0, 0.25], [1.0, 1.0]]), torch.tensor([100.0, 28.0, 0.0])),
}


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    write_imatrix(tmp_path / "m.imatrix", ENTRIES, ["wiki.train.raw", "code.txt"], 4, 128)
    return tmp_path / "m.imatrix"


def test_what_is_written_is_read(path: Path) -> None:
    found = read_imatrix(path)
    assert set(found) == set(ENTRIES)
    for name, (means, counts) in ENTRIES.items():
        assert torch.equal(found[name][0], means) and torch.equal(found[name][1], counts)
    again = path.with_name("again")
    write_imatrix(again, dict(reversed(ENTRIES.items())), ["wiki.train.raw", "code.txt"], 4, 128)
    assert again.read_bytes() == path.read_bytes()


def test_the_file_is_what_llama_cpp_writes(path: Path) -> None:
    """Keys, names and dimensions as in formats of tools/imatrix; sums, not means."""
    reader = GGUFReader(path)
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} == {
        "general.type": "imatrix", "imatrix.datasets": ["wiki.train.raw", "code.txt"], "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 128}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    sums = stored["blk.0.ffn_up_exps.weight.in_sum2"]
    assert list(sums.shape) == [2, 3] and sums.data.tolist() == [[100.0, 200.0], [84.0, 7.0], [0.0, 0.0]]
    assert list(stored["blk.0.ffn_up_exps.weight.counts"].shape) == [1, 3]
    assert stored["blk.0.attn_q.weight.counts"].data.reshape(-1).tolist() == [512.0]


def test_a_file_whose_single_matrices_have_one_dimension(tmp_path: Path) -> None:
    """ggml drops dimensions of 1 at the end."""
    writer = imatrix_writer(tmp_path / "m")
    writer.add_tensor("output.weight.in_sum2", np.array([8.0, 4.0], np.float32))
    writer.add_tensor("output.weight.counts", np.array([4.0], np.float32))
    writer.add_tensor("output.weight.in_sum", np.array([1.0, -1.0], np.float32))
    finish(writer)
    means, counts = read_imatrix(tmp_path / "m")["output.weight"]
    assert means.tolist() == [[2.0, 1.0]] and counts.tolist() == [4.0]


def imatrix_writer(path: Path, kind: str = "imatrix") -> GGUFWriter:
    writer = GGUFWriter(path, "any")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["a"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def legacy(entries: list[tuple[bytes, int, list[float]]]) -> bytes:
    content = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        content += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        content += struct.pack(f"<{len(values)}f", *values)
    return content + struct.pack("<ii", 7, 4) + b"text"


def test_old_files(tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(legacy([(b"output.weight", 4, [8.0, 2.0]), (b"blk.0.attn_k.weight", 1, [3.0])]))
    found = read_imatrix(tmp_path / "m.dat")
    assert found["output.weight"][0].tolist() == [[2.0, 0.5]] and found["output.weight"][1].tolist() == [4.0]
    assert found["blk.0.attn_k.weight"][0].tolist() == [[3.0]]


def test_names_of_a_model_there_and_back() -> None:
    name = "model.layers.3.mlp.experts.{}.gate_proj.weight".format
    inputs = {name(index): (torch.arange(4.0) + index, 10 + index) for index in (2, 0, 1)}
    inputs["model.layers.3.self_attn.q_proj.weight"] = torch.ones(4), 33
    entries = gathered(inputs, "qwen3_moe")
    assert set(entries) == {"blk.3.ffn_gate_exps.weight", "blk.3.attn_q.weight"}
    means, counts = entries["blk.3.ffn_gate_exps.weight"]
    assert means[:, 0].tolist() == [0.0, 1.0, 2.0] and counts.tolist() == [10.0, 11.0, 12.0]
    shapes = dict.fromkeys((*inputs, "lm_head.weight"), (8, 4))
    back = spread(entries, shapes, "qwen3_moe", "m")
    assert set(back) == set(inputs)
    assert all(torch.equal(back[key][0], inputs[key][0]) and back[key][1] == inputs[key][1] for key in inputs)
    old = {"blk.3.ffn_gate_exps.weight": (means.reshape(1, -1), torch.tensor([5.0]))}
    assert torch.equal(spread(old, shapes, "qwen3_moe", "m")[name(1)][0], inputs[name(1)][0])
    with pytest.raises(CheckpointError, match="m: 'blk.3.attn_q.weight' has .1, 4. values.*belongs to another model"):
        spread(entries, {"model.layers.3.self_attn.q_proj.weight": (8, 6)}, "qwen3_moe", "m")
    del inputs[name(1)]
    with pytest.raises(PlanError, match="statistics of 2 experts, numbered up to 2"):
        gathered(inputs, "qwen3_moe")
    with pytest.raises(PlanError, match="'olmo2' has no names in GGUF"):
        gathered(inputs, "olmo2")


# Files that are refused


def refused(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_gguf_files(tmp_path: Path) -> None:
    finish(imatrix_writer(tmp_path / "m", "model"))
    refused(tmp_path / "m", "is no importance matrix, it holds model")
    writer = GGUFWriter(tmp_path / "n", "any")
    writer.add_type("imatrix")
    finish(writer)
    refused(tmp_path / "n", "lacks imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size")
    finish(imatrix_writer(tmp_path / "o"))
    refused(tmp_path / "o", "has no entries")
    refused(tmp_path / "absent", "cannot be read: No such file")


@pytest.mark.parametrize(("tensors", "text"), [
    ({"a.in_sum2": np.ones(4, np.float32)}, "has no 'a.counts' beside it"),
    ({"a.in_sum2": np.ones(4, np.float32), "a.counts": np.ones(3, np.float32)}, "4 values for 3 matrices"),
    ({"a.in_sum2": np.ones(4, np.float16), "a.counts": np.ones(1, np.float32)}, "is F16, not F32"),
    ({"a.in_sum2": np.array([1, np.nan], np.float32), "a.counts": np.ones(1, np.float32)}, "negative or not finite"),
    ({"a.in_sum2": np.array([1, -1], np.float32), "a.counts": np.ones(1, np.float32)}, "negative or not finite"),
])
def test_entries_that_make_no_sense(tmp_path: Path, tensors: dict[str, np.ndarray], text: str) -> None:
    writer = imatrix_writer(tmp_path / "m")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    refused(tmp_path / "m", text)


@pytest.mark.parametrize(("content", "text"), [
    (b"", "number of entries is 0"), (struct.pack("<i", 1 << 30) + bytes(64), "number of entries is 1073741824"),
    (struct.pack("<ii", 1, -5) + bytes(64), "length of name 0 is -5"),
    (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 28) + bytes(9), "size of entry 0 is 268435456"),
    (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 4) + bytes(9), "'a' is cut off"),
    (legacy([(b"a", 1, [1.0]), (b"a", 1, [1.0])]), "'a' is cut off or given twice"),
    (legacy([(b"a", 1, [float("inf")])]), "negative or not finite"),
], ids=str.split("empty many-entries long-name large-entry cut-off twice infinite"))
def test_damaged_old_files(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "m.dat").write_bytes(content)
    refused(tmp_path / "m.dat", text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_bytes_do_harm(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of a good file are changed or cut: an error that names the file, or entries that are sound."""
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "m"
    if data.draw(st.booleans(), "legacy"):
        content = bytearray(legacy([(b"output.weight", 4, [8.0, 2.0]), (b"blk.0.attn_k.weight", 1, [3.0])]))
    else:
        write_imatrix(path, ENTRIES, ["a"], 1, 1)
        content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    try:
        found = read_imatrix(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    for means, counts in found.values():
        assert means.dtype == counts.dtype == torch.float32 and means.shape[0] == len(counts)
        assert bool((means >= 0).all()) and bool(means.isfinite().all())


def test_it_needs_the_name_of_its_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names the text"):
        write_imatrix(tmp_path / "m", ENTRIES, [], 1, 1)
