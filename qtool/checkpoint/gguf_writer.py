"""Writes a GGUF file from tensors under their Hugging Face names: header first, then each tensor at its place.

The header is made by the `gguf` package; the rules for parts and killed runs are those of part_file.py.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from qtool import storage
from qtool.checkpoint import gguf_seal
from qtool.checkpoint.gguf_families import Family, gguf_name, norm_offset, permuted_heads
from qtool.checkpoint.gguf_header import GgufHeader
from qtool.checkpoint.tensor_io import as_bytes
from qtool.checkpoint.writer import check_planned
from qtool.errors import OutputError, PlanError, StorageError
from qtool.tensors import TensorSpec

ALIGNMENT = 32  # of every tensor; GGUF's default
DENSE = {torch.float32: GGMLQuantizationType.F32, torch.float16: GGMLQuantizationType.F16,
         torch.bfloat16: GGMLQuantizationType.BF16}
DTYPES = {kind: dtype for dtype, kind in DENSE.items()}
UINT32, BOOL = 4, 7  # types of values
FILE_TYPE, QUANTIZATION = "general.file_type", "general.quantization_version"
OF_THE_FILE = ("general.alignment", "split.", "qtool.")  # keys of one file, which another does not take over


@dataclass(frozen=True)
class GgufModel:
    """What a file says beside its weights.

    keys: key -> typed value, in the order of the file.  heads, kv_heads: of queries, of keys and values.
    rotary: name -> float32 tensor of frequency divisors.  notes: what a reader of the file computes otherwise.
    """

    family: Family
    heads: int
    kv_heads: int
    keys: Mapping[str, gguf.GGUFValue]
    rotary: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class Stored:
    """A tensor of the file. shape: in elements, as PyTorch has it.  parts: the Hugging Face tensors in it, in order."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    parts: list[str]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * (self.shape[-1] // block) * size


class GgufWriter:
    """Opens or continues the file `path`; used like a ShardWriter.

    specs: the tensors in the order of the file, those that are quantized as uint8 [N, bytes of a row] with their block
    type in `types`.  file_type: what general.file_type says.  Norms, vectors and routers are stored in float32.
    resumed: the file must be there.  Raises PlanError for tensors that have no place, StorageError, and OutputError for
    a foreign or missing file.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], model: GgufModel,
                 types: Mapping[str, GGMLQuantizationType], file_type: gguf.LlamaFileType,
                 resumed: bool = False) -> None:
        self.path, self.folder, self.model = path, path.parent, model
        planned = list(specs)
        self._specs = {spec.name: spec for spec in planned}
        self._places: dict[str, tuple[Stored, int]] = {}
        stored = layout(planned, model, types)
        header = header_bytes(model, stored, file_type)
        end = place(stored, len(header))
        for tensor in stored:
            each = tensor.nbytes // max(1, len(tensor.parts))
            self._places |= {name: (tensor, tensor.offset + index * each) for index, name in enumerate(tensor.parts)}
        self._file = gguf_seal.SealedFile(path, header, end, resumed)
        try:
            storage.sync_folder(self.folder)
            if not self._file.finished:
                for tensor in stored:
                    if tensor.name in model.rotary:
                        self._file.write(as_bytes(model.rotary[tensor.name]), tensor.offset, tensor.name)
        except (OutputError, StorageError, OSError):
            self.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (any device, any strides) at its place; shape and dtype must be as planned."""
        stored, offset = self._places[name]
        check_planned(self._specs[name], tensor)
        self._file.write(as_bytes(self._encoded(name, tensor.detach().cpu(), stored)), offset, name)

    def read_back(self, name: str) -> torch.Tensor:
        """The tensor as it is in the file now, in the shape and dtype of its spec."""
        stored, offset = self._places[name]
        spec = self._specs[name]
        inside = TensorSpec(name, DTYPES.get(stored.kind, torch.uint8), spec.shape)
        return self._decoded(name, self._file.read(inside, offset), stored)

    def held(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What read_back gives after write(name, tensor): a norm to which GGUF adds one is rounded by that."""
        stored, _ = self._places[name]
        return self._decoded(name, self._encoded(name, tensor.detach().cpu(), stored), stored)

    @property
    def names(self) -> list[str]:
        return [self.path.name]

    @property
    def finished(self) -> bool:
        """Whether the file has its name already, and all its tensors."""
        return self._file.finished

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        self._file.sync()

    def finish(self) -> None:
        """Write the file's own sha256 into it, give it its name and close it. Safe to repeat after a kill."""
        self._file.finish()

    def close(self) -> None:
        """Close the file; a part stays as it is."""
        self._file.close()

    def _encoded(self, name: str, tensor: torch.Tensor, stored: Stored) -> torch.Tensor:
        """As the file has it: q and k rows in llama.cpp's order, norms with what GGUF adds."""
        heads = permuted_heads(name, self.model.family, self.model.heads, self.model.kv_heads)
        if heads:
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if stored.kind in DTYPES:
            tensor = tensor.to(DTYPES[stored.kind])
        offset = norm_offset(stored.name, self.model.family)
        return (tensor + offset if offset else tensor).contiguous()

    def _decoded(self, name: str, tensor: torch.Tensor, stored: Stored) -> torch.Tensor:
        heads = permuted_heads(name, self.model.family, self.model.heads, self.model.kv_heads)
        if heads:
            tensor = tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        offset = norm_offset(stored.name, self.model.family)
        return (tensor - offset if offset else tensor).to(self._specs[name].dtype).contiguous()


def layout(specs: Iterable[TensorSpec], model: GgufModel,
           types: Mapping[str, GGMLQuantizationType]) -> list[Stored]:
    """The tensors of the file: rotary divisors, then those of `specs`, experts where the first of their layer is."""
    made = {name: Stored(name, GGMLQuantizationType.F32, tuple(tensor.shape), [])
            for name, tensor in model.rotary.items()}
    experts: dict[str, list[int]] = {}
    for spec in specs:
        target = gguf_name(spec.name, model.family)
        if target is None:
            raise PlanError(f"tensor '{spec.name}' has no place in a GGUF file of architecture "
                            f"{model.family.architecture}; use another format for this model")
        name, expert = target
        kind = _kind(spec, name, types)
        block, size = GGML_QUANT_SIZES[kind]
        shape = (*spec.shape[:-1], spec.shape[-1] // size * block) if kind not in DTYPES else spec.shape
        if expert is None:
            # the gate of shared experts is a matrix of one row in transformers, a vector in llama.cpp
            vector = name.endswith("ffn_gate_inp_shexp.weight")
            _add(made, Stored(name, kind, shape[-1:] if vector else shape, [spec.name]))
            continue
        experts.setdefault(name, []).append(expert)
        stack = made.setdefault(name, Stored(name, kind, (0, *shape), []))
        if (kind, shape) != (stack.kind, stack.shape[1:]):
            raise PlanError(f"'{spec.name}' is {kind.name} {list(shape)} and other experts of its layer are "
                            f"{stack.kind.name} {list(stack.shape[1:])}; a GGUF file holds them as one tensor: give "
                            "them all the same type")
        stack.shape = (stack.shape[0] + 1, *shape)
        stack.parts.append(spec.name)
    for name, numbers in experts.items():
        if sorted(numbers) != list(range(len(numbers))):
            raise PlanError(f"'{name}' would hold the experts {sorted(numbers)[:8]}, not all of them or some twice; "
                            "the checkpoint is incomplete")
        made[name].parts = [part for _, part in sorted(zip(numbers, made[name].parts, strict=True))]
    return list(made.values())


def file_bytes(specs: Iterable[TensorSpec], model: GgufModel, types: Mapping[str, GGMLQuantizationType],
               file_type: gguf.LlamaFileType) -> int:
    """The size of the file that a GgufWriter would write."""
    stored = layout(specs, model, types)
    return place(stored, len(header_bytes(model, stored, file_type)))


def header_bytes(model: GgufModel, tensors: Sequence[Stored], file_type: gguf.LlamaFileType) -> bytes:
    """Everything before the data, padded."""
    with tempfile.TemporaryDirectory(prefix="qtool-gguf-") as folder:  # the package writes to files only
        path = Path(folder) / "header"
        writer = GGUFWriter(path, model.family.architecture)
        for key, value in model.keys.items():
            if key != gguf.Keys.General.ARCHITECTURE:
                writer.add_key_value(key, value.value, value.type, value.sub_type)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_bool(gguf_seal.SAYS_SO, True)
        writer.add_string(gguf_seal.KEY, gguf_seal.BLANK)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % ALIGNMENT)


def copied_header(path: Path, source: GgufHeader, tensors: Sequence[Stored], file_type: gguf.LlamaFileType) -> bytes:
    """The same with the keys of the file `path`, byte for byte, but for what is said of its types, size and parts."""
    said = {FILE_TYPE: struct.pack("<II", UINT32, file_type),
            QUANTIZATION: struct.pack("<II", UINT32, gguf.GGML_QUANT_VERSION)}
    entries: list[bytes] = []
    with path.open("rb") as file:
        before = file.read(max((end for _, end in source.entries.values()), default=0))
    for key, (begin, end) in source.entries.items():
        if key in said:
            entries.append(_text(key) + said.pop(key))
        elif not key.startswith(OF_THE_FILE):
            entries.append(before[begin:end])
    said |= {gguf_seal.SAYS_SO: struct.pack("<I?", BOOL, True),
             gguf_seal.KEY: struct.pack("<I", gguf_seal.STRING) + _text(gguf_seal.BLANK)}
    entries += [_text(key) + value for key, value in said.items()]
    table, begin = [], 0
    for tensor in tensors:
        table += [_text(tensor.name), struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1]),
                  struct.pack("<IQ", tensor.kind, begin)]
        begin += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    header = b"".join([struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries)), *entries, *table])
    return header + bytes(-len(header) % ALIGNMENT)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(spec: TensorSpec, name: str, types: Mapping[str, GGMLQuantizationType]) -> GGMLQuantizationType:
    """How a tensor is stored."""
    if spec.name in types:
        if spec.dtype != torch.uint8 or spec.shape[-1] % GGML_QUANT_SIZES[types[spec.name]][1]:
            raise ValueError(f"{spec.name} is {spec.dtype} {list(spec.shape)}, no blocks of {types[spec.name].name}")
        return types[spec.name]
    if spec.dtype not in DENSE:
        raise PlanError(f"'{spec.name}' is {str(spec.dtype).removeprefix('torch.')}, which GGUF files of models do not "
                        "hold; give --type f16, bf16 or f32")
    return GGMLQuantizationType.F32 if always_float32(name, spec.shape) else DENSE[spec.dtype]


def always_float32(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of that name in the file is a norm, a vector or a router, which llama.cpp wants so."""
    return len(shape) == 1 or "ffn_gate_inp" in name or name.endswith("norm.weight")


def _add(made: dict[str, Stored], tensor: Stored) -> None:
    if tensor.name in made:
        raise ValueError(f"tensor '{tensor.parts[0]}' is planned twice")
    made[tensor.name] = tensor


def place(tensors: Sequence[Stored], begin: int) -> int:
    """Set the offsets; returns where the last tensor and its padding end."""
    for tensor in tensors:
        tensor.offset = begin
        begin += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    return begin
