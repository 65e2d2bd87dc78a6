"""Writes safetensors files: header first, then each tensor at its place, in any order (part_file.py has the rules)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool import storage
from qtool.checkpoint import stacks
from qtool.checkpoint.part_file import PartFile, has_room
from qtool.checkpoint.tensor_io import as_bytes
from qtool.errors import OutputError, StorageError
from qtool.tensors import NAMES_OF_DTYPES, TensorSpec

INDEX = "model.safetensors.index.json"
PYTORCH = {"format": "pt"}  # loaders ask for this key
SMALLER = "use a smaller --set shard_gb"
BARE_ALIGNMENT, PAGE, LARGE = 64, 4096, 1 << 20


@dataclass(frozen=True)
class Shard:
    """A file and its tensors, in the order of their data. bare: without a header, each tensor at an address that is a
    multiple of BARE_ALIGNMENT, a large one at the start of a page (ONNX's external data)."""

    file_name: str
    specs: tuple[TensorSpec, ...]
    bare: bool = False


def plan_shards(specs: Iterable[TensorSpec], limit_bytes: int) -> list[Shard]:
    """Distribute tensors over files of at most `limit_bytes` of data (a larger tensor gets a file of its own).

    The order is kept, except that of stacks, and in a file where a tensor would begin at an address that its dtype
    cannot have. Raises PlanError for a stack that is not whole.
    """
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for unit in stacks.units(specs):
        size = sum(spec.nbytes for spec in unit)
        if groups[-1] and used + size > limit_bytes:
            groups.append([])
            used = 0
        groups[-1] += unit
        used += size
    if len(groups) == 1:
        return [Shard("model.safetensors", aligned(groups[0]))]
    return [Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", aligned(group))
            for number, group in enumerate(groups, 1)]


def aligned(specs: list[TensorSpec]) -> tuple[TensorSpec, ...]:
    """As given if every tensor then begins at a multiple of its element size, else the widest elements first."""
    offset = 0
    for spec in specs:
        if offset % spec.dtype.itemsize:
            return tuple(sorted(specs, key=lambda one: -one.dtype.itemsize))
        offset += spec.nbytes
    return tuple(specs)


def header_bytes(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None, least: int = 0) -> bytes:
    """Length and JSON header, padded with spaces so that the data begins at a multiple of eight bytes; `least` bytes of
    it, which is one too, at least."""
    entries: dict[str, object] = {"__metadata__": dict(sorted((PYTORCH if metadata is None else metadata).items()))}
    offset = 0
    for spec in stacks.entries(specs):
        entries[spec.name] = {"dtype": NAMES_OF_DTYPES[spec.dtype], "shape": list(spec.shape),
                              "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % 8, least - 8 - len(text))
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """Opens or continues the files of `shards` in `folder`; resumed: they must be there.

    Raises StorageError, and OutputError for foreign and missing files."""

    def __init__(self, folder: Path, shards: Iterable[Shard], metadata: Mapping[str, str] | None = None,
                 resumed: bool = False) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._places: dict[str, tuple[TensorSpec, Shard, int]] = {}
        self._begins: dict[str, int] = {}
        self._files: dict[str, PartFile] = {}
        self._current: PartFile | None = None
        try:
            for shard in self.shards:
                header = b"" if shard.bare else header_bytes(shard.specs, metadata)
                size, self._begins[shard.file_name] = self._place(shard, len(header)), len(header)
                self._files[shard.file_name] = PartFile(folder / shard.file_name, header, size, self._outstanding,
                                                        SMALLER, resumed=resumed)
            storage.sync_folder(folder)
        except (OutputError, StorageError, OSError):
            self.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (any device, any strides) at its place; shape and dtype must be as planned."""
        spec, file, offset = self._use(name)
        check_planned(spec, tensor)
        file.write(as_bytes(tensor.detach().cpu().contiguous()), offset, name)

    def read_back(self, name: str) -> torch.Tensor:
        """The tensor as it is in the file now (zeros where it has not been written); from any thread."""
        spec, shard, offset = self._places[name]
        return self._files[shard.file_name].read(spec, offset)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write some rows of a tensor, contiguous on the CPU, from row `start` on."""
        spec, file, offset = self._use(name)
        check_planned(TensorSpec(name, spec.dtype, (len(rows), *spec.shape[1:])), rows)
        file.write(as_bytes(rows), offset + start * (spec.nbytes // spec.shape[0]), name)

    def read_rows_back(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop as they are in the file now; from any thread."""
        spec, shard, offset = self._places[name]
        rows = TensorSpec(name, spec.dtype, (stop - start, *spec.shape[1:]))
        return self._files[shard.file_name].read(rows, offset + start * (spec.nbytes // spec.shape[0]))

    @property
    def names(self) -> list[str]:
        """The files that there are in the end."""
        return [shard.file_name for shard in self.shards] + ([INDEX] if len(self.shards) > 1 else [])

    def place(self, name: str) -> tuple[int, int]:
        """(offset in its file, bytes) of a tensor."""
        spec, _, offset = self._places[name]
        return offset, spec.nbytes

    def stored(self, name: str) -> str:
        """Its name in the file."""
        return self._places[name][0].stored

    def part(self, name: str) -> tuple[str, Path, int]:
        """Of the file of a tensor that is not finished: its name in the end, where it is, where its data begins."""
        file = self._places[name][1].file_name
        return file, self.folder / (file + storage.PART), self._begins[file]

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        for file in self._files.values():
            file.sync()

    def finish(self) -> None:
        """Give the files their names, write the index if there are several, close. Safe to repeat after a kill."""
        self.sync()
        try:
            for file in self._files.values():
                file.rename()
            if len(self.shards) > 1:
                write_index(self.folder, {one.name: (one.nbytes, shard.file_name)
                                          for shard in self.shards for one in stacks.entries(shard.specs)})
            storage.sync_folder(self.folder)
        except OSError as error:
            raise storage.failed(error, self.folder, "the names of the finished files") from None
        self.close()

    def close(self) -> None:
        """Close the files; parts stay as they are."""
        while self._files:
            self._files.popitem()[1].close()

    def _use(self, name: str) -> tuple[TensorSpec, PartFile, int]:
        """A tensor, its file and its offset there. One file is open at a time: a model may have hundreds."""
        spec, shard, offset = self._places[name]
        file = self._files[shard.file_name]
        if self._current is not None and self._current is not file:
            self._current.close()
        self._current = file
        return spec, file, offset

    def _place(self, shard: Shard, offset: int) -> int:
        """Give every tensor its offset; returns the size of the file."""
        for spec in shard.specs:
            if spec.name in self._places:
                raise ValueError(f"tensor '{spec.name}' is planned twice")
            if shard.bare:
                offset += -offset % (PAGE if spec.nbytes >= LARGE else BARE_ALIGNMENT)
            self._places[spec.name] = (spec, shard, offset)
            offset += spec.nbytes
        return offset

    def _outstanding(self) -> int:
        """Bytes of the files that have no room reserved yet."""
        return sum(spec.nbytes for shard in self.shards if not has_room(self.folder / shard.file_name)
                   for spec in shard.specs)


def write_index(folder: Path, tensors: Mapping[str, tuple[int, str]]) -> None:
    """The index of several files, durable before it has its name. tensors: name -> (bytes, file name)."""
    index = {"metadata": {"total_size": sum(size for size, _ in tensors.values())},
             "weight_map": {name: file for name, (_, file) in sorted(tensors.items())}}
    storage.write(folder / INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())


def check_planned(spec: TensorSpec, tensor: torch.Tensor) -> None:
    """Raise ValueError for a tensor of another shape or dtype."""
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise ValueError(f"{spec.name} is {tensor.dtype} {list(tensor.shape)}, planned {spec.dtype} "
                         f"{list(spec.shape)}")
