"""Importance matrices of llama.cpp: for each matrix the mean square of every input channel.

Its GGUF file (llama-imatrix, tools/imatrix) is read and written, the older .dat file is read.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from gguf import GGMLQuantizationType, GGUFWriter

from qtool import storage
from qtool.checkpoint.gguf_families import gguf_name, written_as
from qtool.checkpoint.gguf_header import MAX_NAME, GgufTensor, read_gguf_header
from qtool.checkpoint.header import AGAIN
from qtool.checkpoint.tensor_io import read_tensor
from qtool.errors import CheckpointError, PlanError, printable
from qtool.files import open_regular
from qtool.tensors import TensorSpec, all_finite

Entries = dict[str, tuple[torch.Tensor, torch.Tensor]]
SUMS, COUNTS = ".in_sum2", ".counts"
REQUIRED = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


def read_imatrix(path: Path) -> Entries:
    """GGUF tensor name -> (mean squares float32 [n_mat, K], tokens float32 [n_mat]); n_mat: the experts of a layer.

    A matrix that saw no token has ones. In an old .dat file n_mat is 1 always and K of stacked experts n_mat times as
    large, because it does not tell. Raises CheckpointError.
    """
    try:
        with open_regular(path) as file:
            return _gguf(path, file) if file.read(4) == b"GGUF" else _legacy(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def write_imatrix(path: Path, entries: Mapping[str, tuple[torch.Tensor, torch.Tensor]], datasets: Sequence[str],
                  chunk_count: int, chunk_size: int) -> None:
    """Write llama.cpp's GGUF file. entries: as read_imatrix gives them; datasets: at least one name of the text;
    chunk_count chunks of chunk_size tokens were read. Raises StorageError."""
    if not datasets:
        raise ValueError("an importance matrix names the text that it was made from")
    with tempfile.TemporaryDirectory(prefix="qtool-imatrix-") as folder:
        made = Path(folder) / "imatrix"
        writer = GGUFWriter(made, "")  # of no architecture: the key is left out
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", chunk_count)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name, (means, counts) in sorted(entries.items()):
            writer.add_tensor(name + SUMS, (means.float() * counts.float()[:, None]).contiguous().numpy())
            writer.add_tensor(name + COUNTS, counts.float()[:, None].contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = made.read_bytes()
    try:
        storage.write(path, content)
    except OSError as error:
        raise storage.failed(error, path, "the importance matrix", len(content)) from None


def gathered(inputs: Mapping[str, tuple[torch.Tensor, int]], model_type: str) -> Entries:
    """Entries from what calibration knows: Hugging Face weight name -> (mean squares [K], tokens), experts stacked.

    Raises PlanError for a model that GGUF has no names for, and where experts of a layer are missing.
    """
    stacks: dict[str, dict[int, tuple[torch.Tensor, int]]] = {}
    for name, (target, index) in placed(inputs, model_type).items():
        stacks.setdefault(target, {})[index] = inputs[name]
    for target, stack in stacks.items():
        if sorted(stack) != list(range(len(stack))):
            raise PlanError(f"{target}: statistics of {len(stack)} experts, numbered up to {max(stack)}; give all")
    return {target: (torch.stack([stack[index][0].float() for index in range(len(stack))]),
                     torch.tensor([float(stack[index][1]) for index in range(len(stack))]))
            for target, stack in stacks.items()}


def spread(entries: Mapping[str, tuple[torch.Tensor, torch.Tensor]], shapes: Mapping[str, tuple[int, int]],
           model_type: str, where: str) -> dict[str, tuple[torch.Tensor, float]]:
    """The inverse: Hugging Face weight name -> (mean squares [K], tokens), for those of `shapes` [N, K] that it has.

    Raises CheckpointError for an entry of another size.
    """
    result: dict[str, tuple[torch.Tensor, float]] = {}
    places = placed(shapes, model_type)
    matrices: dict[str, int] = {}
    for target, index in places.values():
        matrices[target] = max(matrices.get(target, 0), index + 1)
    for name, (target, index) in places.items():
        if target not in entries:
            continue
        means, counts = entries[target]
        columns = shapes[name][1]
        if len(counts) == 1 and means.numel() == matrices[target] * columns:  # an old file, or one count for all
            means = means.reshape(-1, columns)
            counts = counts.expand(len(means))
        if means.shape[1] != columns or index >= len(means):
            raise CheckpointError(f"{where}: '{target}' has {list(means.shape)} values, and {name} has {columns} "
                                  "columns; the importance matrix belongs to another model")
        result[name] = means[index], float(counts[index])
    return result


def placed(names: Iterable[str], model_type: str) -> dict[str, tuple[str, int]]:
    """Hugging Face weight name -> (GGUF tensor, which of its stacked matrices). Raises PlanError."""
    family = written_as(model_type)
    if family is None:
        raise PlanError(f"model type '{model_type}' has no names in GGUF")
    result: dict[str, tuple[str, int]] = {}
    for name in names:
        target = gguf_name(name, family)
        if target is None:
            raise PlanError(f"tensor '{name}' has no place in a GGUF file of architecture {family.architecture}")
        result[name] = target[0], target[1] or 0
    return result


def _gguf(path: Path, file: BinaryIO) -> Entries:
    header = read_gguf_header(path)
    kind = header.metadata.get("general.type")
    missing = [key for key in REQUIRED if key not in header.metadata]
    if kind != "imatrix" or missing:
        what = f"lacks {', '.join(missing)}" if kind == "imatrix" else f"holds {printable(str(kind))}"
        raise CheckpointError(f"{path}: is no importance matrix, it {what}; give a file that llama-imatrix wrote")
    result: Entries = {}
    for name, tensor in header.tensors.items():
        if not name.endswith(SUMS):
            continue
        stem = name.removesuffix(SUMS)
        counted = header.tensors.get(stem + COUNTS)
        if counted is None:
            raise CheckpointError(f"{path}: '{name}' has no '{printable(stem + COUNTS)}' beside it; {AGAIN}")
        counts, sums = _values(path, file, counted), _values(path, file, tensor)
        if len(sums) % len(counts):
            raise CheckpointError(f"{path}: '{name}' has {len(sums)} values for {len(counts)} matrices; {AGAIN}")
        means = sums.reshape(len(counts), -1) / counts.clamp(min=1)[:, None]
        means[counts == 0] = 1.0
        result[stem] = means, counts
    if not result:
        raise CheckpointError(f"{path}: has no entries; {AGAIN}")
    return result


def _values(path: Path, file: BinaryIO, tensor: GgufTensor) -> torch.Tensor:
    """float32, flat; finite and not negative."""
    if tensor.kind != GGMLQuantizationType.F32:
        raise CheckpointError(f"{path}: '{tensor.name}' is {tensor.kind.name}, not F32; {AGAIN}")
    values = read_tensor(file.fileno(), TensorSpec(tensor.name, torch.float32, (math.prod(tensor.shape),)),
                         tensor.offset)
    if values is None:
        raise CheckpointError(f"{path}: became shorter while it was read; {AGAIN}")
    return _checked(path, tensor.name, values)


def _checked(path: Path, name: str, values: torch.Tensor) -> torch.Tensor:
    if not all_finite(values) or bool((values < 0).any()):
        raise CheckpointError(f"{path}: '{printable(name)}' has values that are negative or not finite; make the "
                              "importance matrix again")
    return values


def _legacy(path: Path, file: BinaryIO) -> Entries:
    """int32 count; each: int32 length, name, int32 calls, int32 length, float32 mean squares times calls."""
    size = path.stat().st_size
    file.seek(0)

    def number(what: str, limit: int) -> int:
        content = file.read(4)
        value = struct.unpack("<i", content)[0] if len(content) == 4 else 0
        if not 0 < value <= limit:
            raise CheckpointError(f"{path}: {what} is {value}; no importance matrix (GGUF or .dat), or a damaged one")
        return value

    result: Entries = {}
    for index in range(number("the number of entries", size // 16)):
        text = file.read(number(f"the length of name {index}", MAX_NAME))
        name = text.decode("utf-8", errors="replace")
        calls, length = number(f"the calls of entry {index}", 1 << 31), number(f"the size of entry {index}", size // 4)
        content = bytearray(file.read(4 * length))
        if len(content) < 4 * length or name in result:
            raise CheckpointError(f"{path}: entry '{printable(name)}' is cut off or given twice; {AGAIN}")
        values = torch.frombuffer(content, dtype=torch.float32) / calls
        result[name] = _checked(path, name, values)[None], torch.tensor([float(calls)])
    return result
