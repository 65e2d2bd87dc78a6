"""From one GGUF file to another, as llama.cpp's own quantizer goes: other types, and all else as it is in the file.

Names, keys, the order of rows and what norms have added are neither undone nor made again, and no config or tokenizer
is built. Matrices that have their type already are copied; the others are decoded to float32 and rounded, some rows at
a time, by one thread per core.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

import qtool
from qtool import found, heap, manifest, repairs, resuming, storage
from qtool.ahead import ahead
from qtool.checkpoint.gguf_families import EMBEDDING, HEAD, Part
from qtool.checkpoint.gguf_file import dtype_of, opened, read_blocks
from qtool.checkpoint.gguf_header import GgufTensor
from qtool.checkpoint.gguf_outline import GgufOutline, outline
from qtool.checkpoint.gguf_seal import SealedFile
from qtool.checkpoint.gguf_writer import DENSE, DTYPES, Stored, always_float32, copied_header, place
from qtool.checkpoint.imatrix import read_imatrix, spread
from qtool.checkpoint.tensor_io import as_bytes, sha256_files
from qtool.errors import CheckpointError, InputError, OutputError, PlanError, VerificationError
from qtool.formats import gguf as blocks
from qtool.formats._ggml_fields import TYPES
from qtool.methods import rtn
from qtool.mixtures import EMBEDDING as EMBEDS
from qtool.mixtures import MIXTURES, OUTPUT, Shape, choose, role_of
from qtool.tensors import TensorSpec, all_finite, same_bits
from qtool.workspace import Workspace, recover

NAME = "gguf"
SCHEMA = 1  # of what is printed, as inspect.SCHEMA, whose import takes longer than much of the work
DENSE_NAMES = {kind.name: kind for kind in DENSE.values()}
FILE_TYPES = {GGMLQuantizationType.F32: LlamaFileType.ALL_F32, GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
              GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16}
PLAIN = rtn.Options(shrink_steps=9, rounds=1)  # a shorter search than with text
TENSORS_NAME = "model.gguf"  # in the working directory
CHUNK_ELEMENTS = 1 << 18  # of what one thread has in work: it stays in the cache
AHEAD = 4  # chunks per thread that are in work or wait to be written


@dataclass(frozen=True)
class Retyping:
    """What will be written. stored: the tensors of the new file, in the order of the old one.

    importance: Hugging Face weight name -> mean squares of its inputs, float32 [K].  weighed_by: their sha256.
    """

    source: GgufOutline
    out: Path
    label: str
    file_type: LlamaFileType
    stored: tuple[Stored, ...]
    importance: Mapping[str, torch.Tensor]
    weighed_by: str | None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """Some rows of a tensor, none of two experts. first: of them in the tensor, whose parts lie one after the other."""

    tensor: GgufTensor
    kind: GGMLQuantizationType
    weight: str
    first: int
    rows: int


def make_export(path: Path, kind: str | None, out: Path | None, imatrix: Path | None) -> Retyping | None:
    """None for a file that must be understood as a model first, or a type that this cannot make.

    kind: f32, f16, bf16 or a mixture; None: that of the matrices, bfloat16 where they are quantized. Raises
    CheckpointError, OutputError.
    """
    kind = None if kind is None or kind.lower() == "auto" else kind.lower()
    if (kind is not None and kind.upper() not in DENSE_NAMES and kind not in MIXTURES) or (
            imatrix is not None and kind not in MIXTURES):
        return None
    source = outline(path)
    if source is None:
        return None
    means = _importance(source, imatrix)
    if kind in MIXTURES:
        label, file_type = kind.upper(), LlamaFileType(MIXTURES[kind][0])
        shape = Shape(source.layers, source.heads, source.kv_heads, source.experts, calibrated=bool(means))
        kinds = {name: _mixed(source, tensor, part, kind, shape) for name, tensor, part in _first_parts(source)}
    else:
        main = DENSE_NAMES[kind.upper()] if kind else DENSE[dtype_of(source.header)]
        label, file_type = main.name, FILE_TYPES[main]
        kinds = {name: GGMLQuantizationType.F32 if always_float32(name, tensor.shape) else main
                 for name, tensor, _ in _first_parts(source)}
    stored = tuple(Stored(one.name, kinds.get(one.name, one.kind), one.shape, [])
                   for one in source.header.tensors.values())
    weighed = hashlib.sha256(b"".join(each.numpy().tobytes() for _, each in sorted(means.items()))).hexdigest()
    return Retyping(source, _place(path, label, out), label, file_type, stored, means, weighed if means else None)


def _first_parts(source: GgufOutline) -> Iterator[tuple[str, GgufTensor, str]]:
    """Each tensor but rotary divisors, with the Hugging Face name of the first part of it."""
    seen: set[str] = set()
    for name, part in source.parts.items():
        if part.tensor.name not in seen:
            seen.add(part.tensor.name)
            yield part.tensor.name, part.tensor, name


def _mixed(source: GgufOutline, tensor: GgufTensor, part: str, mixture: str, shape: Shape) -> GGMLQuantizationType:
    """The type of a tensor in a mixture, with the Hugging Face name of a part of it."""
    if always_float32(tensor.name, tensor.shape):
        return GGMLQuantizationType.F32
    if tensor.name in (EMBEDDING, HEAD):
        role, layer = OUTPUT if tensor.name == HEAD or source.tied else EMBEDS, 0
    else:
        role, layer = role_of(part.removesuffix(".weight")), int(tensor.name.split(".")[1])
    type_ = choose(mixture, role, layer, tensor.shape[-1], shape)
    return tensor.kind if type_ is None else GGMLQuantizationType[type_.upper()]


def _importance(source: GgufOutline, imatrix: Path | None) -> dict[str, torch.Tensor]:
    if imatrix is None:
        return {}
    shapes = {name: (part.shape[0], part.shape[1]) for name, part in source.parts.items()
              if len(part.shape) == 2 and name.endswith(".weight")}
    there = spread(read_imatrix(imatrix), shapes, source.family.model_type, str(imatrix))
    if not there:
        raise InputError(f"{imatrix}: has no entry for any matrix of {source.path}; it belongs to another model")
    return {name: means for name, (means, _) in there.items()}


def _place(source: Path, label: str, out: Path | None) -> Path:
    """The file to write."""
    name = f"{source.stem}-{label}.gguf"
    path = Path(name) if out is None else out if out.suffix.lower() == ".gguf" else out / name
    recover(path)
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists; remove it or choose another --out")
    return path


def run(job: Retyping, step: Callable[[int, int, str], None], restart: bool = False) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints. Raises StorageError, VerificationError, CheckpointError."""
    source, path = job.source, job.source.path
    identity = {"export": NAME, "type": job.label, "importance": job.weighed_by, "qtool": qtool.__version__,
                "source": {"name": path.stem, "files": sha256_files({path.name: path})}}
    header = copied_header(path, source.header, job.stored, job.file_type)
    size = place(job.stored, len(header))
    storage.refuse_full(job.out, size, "this export", ["choose an --out on another disk"])
    heap.reuse()
    with Workspace(job.out, identity, restart) as work:
        file = SealedFile(work.folder / TENSORS_NAME, header, size, resuming.resumed(work))
        try:
            same = _write(job, work, file, step)
            step(len(job.stored), len(job.stored), "naming and hashing the file")
            file.finish()
        finally:
            file.close()
        work.complete_file(TENSORS_NAME)
    return _told(job, len(same) == len(job.stored))


def _write(job: Retyping, work: Workspace, file: SealedFile, step: Callable[[int, int, str], None]) -> set[str]:
    """Write all tensors that are not there yet; returns those that have the values of the source."""
    same: set[str] = set(work.finished.get(resuming.SOME, {}).get("same", ()))
    parts: dict[str, list[tuple[str, Part]]] = {}
    for name, part in job.source.parts.items():
        parts.setdefault(part.tensor.name, []).append((name, part))
    first = work.finished.get(resuming.SOME, {}).get("count", 0)
    if resuming.WRITTEN in work.finished:
        first = len(job.stored)
    tensors = job.source.header.tensors

    def chunks(one: Stored) -> Iterator[Chunk]:
        return _chunks(tensors[one.name], one.kind, parts.get(one.name, []))

    threads = torch.get_num_threads()
    left = (chunk for one in job.stored[first:] for chunk in chunks(one))
    unwritten = resuming.unwritten(work, job.stored, lambda one: one.nbytes, file.sync, lambda: {"same": sorted(same)})
    with unwritten as wanted, ahead(lambda chunk: _encoded(job, chunk), left, threads, AHEAD * threads) as made:
        for done, one in wanted:
            step(done, len(job.stored), one.name)
            kept = True
            for chunk in chunks(one):
                packed, exact = next(made)
                offset = one.offset + chunk.first * (one.nbytes // math.prod(one.shape[:-1]))
                file.write(as_bytes(packed), offset, one.name)
                again = file.read(TensorSpec(one.name, torch.uint8, tuple(packed.shape)), offset)
                if not same_bits(again, packed):
                    raise VerificationError(f"{one.name}: what was read back from {work.folder} differs from what was "
                                            "written; the disk or the memory of this machine may be faulty")
                kept = kept and exact
            same.update({one.name} if kept else ())
    if resuming.WRITTEN not in work.finished:
        file.sync()
        work.record(resuming.SOME, {"count": len(job.stored), "same": sorted(same)})
        work.record(resuming.WRITTEN, {})
    return same


def _chunks(tensor: GgufTensor, kind: GGMLQuantizationType, parts: list[tuple[str, Part]]) -> Iterator[Chunk]:
    step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
    if not parts:  # rotary divisors
        yield Chunk(tensor, kind, tensor.name, 0, math.prod(tensor.shape[:-1]))
    for name, part in parts:
        stop = part.start + math.prod(part.shape[:-1])
        for first in range(part.start, stop, step):
            yield Chunk(tensor, kind, name, first, min(step, stop - first))


@torch.inference_mode()
def _encoded(job: Retyping, chunk: Chunk) -> tuple[torch.Tensor, bool]:
    """The bytes of some rows as the new file has them, uint8 [rows, bytes of a row], and whether no value changes."""
    path, tensor, kind = job.source.path, chunk.tensor, chunk.kind
    with opened(path, tensor) as descriptor:
        raw = torch.from_numpy(read_blocks(descriptor, tensor, chunk.first, chunk.rows))
    if kind == tensor.kind and tensor.kind.name.lower() in TYPES:
        scheme = found.load("grids", kind.name.lower()).scheme
        part = blocks.unpack(tensor.name.removesuffix(".weight"), lambda _: raw, scheme,
                             (chunk.rows, tensor.shape[-1]))
        offset = part.offset if part.offset is not None else part.scale
        _refuse_non_finite(path, tensor, part.scale, offset)
        return raw, True
    values = _values(raw, tensor)
    ends = torch.stack(values.aminmax())
    _refuse_non_finite(path, tensor, ends)
    if kind in DTYPES:
        made = values.to(DTYPES[kind])
        if kind == GGMLQuantizationType.F16 and not all_finite(made):
            raise PlanError(f"{tensor.name} has values beyond 65504, which F16 cannot hold; use --type bf16 or f32")
        return made.contiguous().view(torch.uint8), torch.equal(made.float(), values)
    grid = found.load("grids", kind.name.lower())
    repairs.refuse_too_large(tensor.name, ends, grid.scheme, torch.float16)
    fitted = grid.fit(values, grid.scheme, torch.float16, job.importance.get(chunk.weight), PLAIN.shrink_steps,
                      PLAIN.signed, PLAIN.rounds)
    linear = tensor.name.removesuffix(".weight")
    return blocks.pack(linear, grid.encode(values, fitted))[f"{linear}.weight"], False


def _values(raw: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
    """float32 [rows, K] of the blocks uint8 [rows, bytes of a row]."""
    if tensor.kind in DTYPES:
        return raw.view(DTYPES[tensor.kind]).float()
    name = tensor.kind.name.lower()
    if name in TYPES:
        scheme = found.load("grids", name).scheme
        return blocks.dequantize(tensor.name.removesuffix(".weight"), lambda _: raw, scheme,
                                 (raw.shape[0], tensor.shape[-1]))
    with np.errstate(all="ignore"):  # a scale that is inf or NaN is found in the values
        return torch.from_numpy(gguf.dequantize(raw.numpy(), tensor.kind))


def _refuse_non_finite(path: Path, tensor: GgufTensor, *values: torch.Tensor) -> None:
    if not all(all_finite(one) for one in values):
        raise CheckpointError(f"{path}: {tensor.name}: has values that are NaN or infinite; download the file again")


def _told(job: Retyping, lossless: bool) -> dict[str, Any]:
    """What `qtool export --json` prints."""
    sizes: dict[str, int] = {}
    for one in job.source.header.tensors.values():
        sizes[one.kind.name] = sizes.get(one.kind.name, 0) + one.nbytes
    return {
        "schema": SCHEMA, "out": str(job.out), "format": f"{NAME} {job.label}",
        "from": "gguf " + ", ".join(sorted(sizes, key=lambda kind: -sizes[kind])), "linears": 0, "lossless": lossless,
        "source_bytes": sum(sizes.values()), "weight_bytes": job.out.stat().st_size, "notes": [],
        "outputs": {job.out.name: manifest.file_hash(job.out)},
        "checked": "every tensor was read back"
                   + ("; lossless" if lossless else f" and is the source's in {job.label}"),
    }
