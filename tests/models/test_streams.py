"""The activation stream: the same bytes in memory and in a file, saved and loaded, cut into batches."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from qtool.errors import OutputError, StorageError
from qtool.models.streams import StreamStore, batches_for


def filled(budget: int, folder, dtype=torch.bfloat16) -> StreamStore:
    store = StreamStore(7, 6, 10, dtype, budget, folder)
    values = torch.randn(7, 6, 10, generator=torch.Generator().manual_seed(1))
    for batch in (slice(0, 3), slice(3, 6), slice(6, 7)):
        store.write(batch, values[batch])
    return store


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_file_equals_memory(tmp_path, dtype):
    memory, file = filled(1 << 20, tmp_path, dtype), filled(0, tmp_path, dtype)
    assert file.spilled and not memory.spilled
    for batch in (slice(0, 7), slice(2, 5), slice(6, 7)):
        assert torch.equal(memory.read(batch), file.read(batch)) and file.read(batch).dtype == dtype
    assert not list(tmp_path.iterdir())  # the file has no name, so a kill leaves nothing behind
    file.close()
    memory.close()


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_saved_and_loaded(tmp_path, budget):
    path = tmp_path / "stream.bin"
    store = filled(budget, tmp_path)
    store.save(path)
    assert torch.equal(load_file(path)["stream"], store.read(slice(0, 7)))
    for other_budget in (0, 1 << 20):
        other = StreamStore(7, 6, 10, torch.bfloat16, other_budget, tmp_path)
        other.load(path)
        assert torch.equal(other.read(slice(0, 7)), store.read(slice(0, 7)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["stream.bin"]


def test_copy(tmp_path):
    source, target = filled(0, tmp_path), StreamStore(7, 6, 10, torch.bfloat16, 1 << 20)
    target.copy_from(source, [slice(0, source.shape[0])])
    assert torch.equal(target.read(slice(0, 7)), source.read(slice(0, 7)))


@pytest.mark.parametrize("damage", ["shape", "dtype", "short", "absent"])
def test_foreign_or_damaged_stream(tmp_path, damage):
    path = tmp_path / "stream.bin"
    filled(0, tmp_path).save(path)
    store = StreamStore(6 if damage == "shape" else 7, 6, 10,
                        torch.float16 if damage == "dtype" else torch.bfloat16, 0, tmp_path)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "absent":
        path.unlink()
    with pytest.raises(OutputError, match="stream.bin.*--restart"):
        store.load(path)


def test_full_disk_and_missing_folder(tmp_path):
    with pytest.raises(StorageError, match="the file of the activations cannot be written"):
        StreamStore(7, 6, 10, torch.bfloat16, 0, tmp_path / "absent")
    with pytest.raises(StorageError, match="the activations cannot be written"):
        filled(0, tmp_path).save(tmp_path / "absent" / "stream.bin")


@pytest.mark.parametrize(("samples", "tokens", "held", "expected", "held_count"), [
    (128, 4096, 0.0625, 16, 8), (5, 1024, 0.2, 3, 1), (5, 1, 0.5, 5, 3), (1, 4096, 0.5, 1, 0), (10, 4096, 0.0, 2, 0),
    (2, 4096, 0.01, 2, 1),
])
def test_batches(samples, tokens, held, expected, held_count):
    batches, held_out = batches_for(samples, 512, tokens, held)
    assert [sample for batch in batches for sample in range(batch.start, batch.stop)] == list(range(samples))
    assert len(batches) == expected
    assert held_out == frozenset(range(samples - held_count, samples))
    assert all(len({sample in held_out for sample in range(batch.start, batch.stop)}) == 1 for batch in batches)
