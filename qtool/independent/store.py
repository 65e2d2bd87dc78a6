"""safetensors files and the numbers in them: headers, element types, bit streams, groups.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qtool.errors import CheckpointError

Reader = Callable[[], np.ndarray] | str  # float32 [N, K]; a text: why it is not read here
INDEX = "model.safetensors.index.json"
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
          "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
PLAIN = {"U8": "<u1", "I8": "<i1", "I16": "<i2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "F16": "<f2", "F32": "<f4",
         "F64": "<f8"}
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies. start: in bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Store:
    """The tensors of a directory, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Place] = {}
        for file in _files(folder):
            self.places.update(_header(file))

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def stems(self, suffix: str) -> list[str]:
        """P of every tensor that is called P.suffix."""
        return [name.removesuffix("." + suffix) for name in self.places if name.endswith("." + suffix)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape

    def dtype(self, name: str) -> str:
        return self._place(name).dtype

    def bytes(self, name: str, part: int | None = None) -> np.ndarray:
        """uint8 [any], as stored. part: of the first dimension, here and below; None: all of it."""
        place = self._place(name, part)
        found = np.fromfile(place.file, np.uint8, place.size, offset=place.start)
        if len(found) != place.size:
            raise CheckpointError(f"{place.file}: ends inside {name}; fetch the file again")
        return found

    def numbers(self, name: str, *dtypes: str, part: int | None = None) -> np.ndarray:
        """In its own element type, which must be one of `dtypes`."""
        place = self._place(name, part)
        if place.dtype not in dtypes:
            raise CheckpointError(f"{name} is {place.dtype}, not {' or '.join(dtypes)} as its format wants")
        return self.bytes(name, part).view(PLAIN[place.dtype]).reshape(place.shape)

    def words(self, name: str, part: int | None = None) -> np.ndarray:
        """uint32, of int32 or uint32."""
        return self.numbers(name, "I32", "U32", part=part).view("<u4")

    def floats(self, name: str, part: int | None = None) -> np.ndarray:
        """float32, of any floating element type; float8_e4m3 by its definition."""
        place = self._place(name, part)
        if place.dtype == "F8_E4M3":
            return e4m3()[self.bytes(name, part)].reshape(place.shape)
        if place.dtype == "BF16":
            return (self.bytes(name, part).view("<u2").astype("<u4") << 16).view("<f4").reshape(place.shape)
        return self.numbers(name, "F16", "F32", "F64", part=part).astype(np.float32)

    def _place(self, name: str, part: int | None = None) -> Place:
        if name not in self.places:
            raise CheckpointError(f"{name} is missing; the download is incomplete, or config.json is another file's")
        place = self.places[name]
        if part is None:
            return place
        if not place.shape or part >= place.shape[0]:
            raise CheckpointError(f"{name} has the shape {list(place.shape)}, and so no part {part}")
        size = place.size // place.shape[0]
        return replace(place, shape=place.shape[1:], start=place.start + part * size, size=size)


def _files(folder: Path) -> list[Path]:
    """Those of the index; without one the model's, as loaders choose them."""
    if (folder / INDEX).is_file():
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(listed))]
    there = sorted(folder.glob("*.safetensors"))
    return ([path for path in there if path.name == "model.safetensors"]
            or [path for path in there if path.name.startswith("model")] or there)


def _header(file: Path) -> dict[str, Place]:
    with file.open("rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        if stop - start != int(np.prod(shape, dtype=np.int64)) * WIDTHS[entry["dtype"]]:
            raise CheckpointError(f"{file}: {name} has another size than {entry['dtype']} {list(shape)}")
        found[name] = Place(file, entry["dtype"], shape, 8 + length + start, stop - start)
    return found


def e4m3() -> np.ndarray:
    """float32 [256]: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7F and 0xFF are NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa * 2.0 ** -9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [R, count]: value j of a row of uint32 [R, W] at its bits j · bits and up, the lowest first."""
    raw = np.ascontiguousarray(words, "<u4").view(np.uint8)
    if bits in (2, 4, 8):
        each = 8 // bits
        fields = np.empty((*raw.shape, each), np.uint8)
        for place in range(each):
            fields[..., place] = raw >> (bits * place) & ((1 << bits) - 1)
        return fields.reshape(len(raw), -1)[:, :count]
    made = np.empty((len(raw), count), np.uint8)
    for row in range(0, len(raw), 256):  # a bit takes a byte here
        flags = np.unpackbits(raw[row:row + 256], axis=1, bitorder="little")[:, :count * bits]
        made[row:row + 256] = np.packbits(flags.reshape(len(flags), count, bits), axis=-1, bitorder="little")[..., 0]
    return made


def loose(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [R, count]: whole values in each word of [R, W], what is left of its bits unused."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = words[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return fields.reshape(len(words), -1)[:, :count].astype(np.uint8)


def nibbles(packed: np.ndarray, high_first: bool = False) -> np.ndarray:
    """uint8 [R, 2 C] of uint8 [R, C]."""
    low, high = packed & 15, packed >> 4
    return np.stack((high, low) if high_first else (low, high), -1).reshape(len(packed), -1)


def each_column(name: str, per_group: np.ndarray, columns: int, order: np.ndarray | None = None) -> np.ndarray:
    """[N, K] of [N, G], that of each column's group: runs of K / G, the last perhaps shorter, or as `order` says."""
    groups = per_group.shape[1]
    if order is not None:
        order = np.where(order < 0, order + groups, order)
        if order.shape != (columns,) or order.min() < 0 or order.max() >= groups:
            raise CheckpointError(f"{name}: g_idx names groups that are not there; the file is damaged")
        return per_group[:, order]
    return np.repeat(per_group, -(-columns // groups), 1)[:, :columns]


def blocks_of_128(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[N, K] of one value for each 128 x 128."""
    return np.repeat(np.repeat(scale, 128, 0)[:shape[0]], 128, 1)[:, :shape[1]]


def expect(name: str, what: str, found: tuple[int, ...], *wanted: tuple[int, ...]) -> None:
    """Raise CheckpointError where a shape is none of those wanted."""
    if found not in wanted:
        raise CheckpointError(f"{name}.{what} is {list(found)}, not {' or '.join(str(list(one)) for one in wanted)}")
