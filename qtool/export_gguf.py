"""Writes a checkpoint as one GGUF file, tensor by tensor; a quantized one is decoded on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, LlamaFileType

import qtool
from qtool import footprint, found, inspect, manifest, outside, plan_gguf, recipe, resuming
from qtool import storage as disk
from qtool.checkpoint.gguf_header import read_gguf_header
from qtool.checkpoint.gguf_writer import DENSE, DTYPES, GgufModel, GgufWriter, file_bytes
from qtool.checkpoint.imatrix import read_imatrix, spread
from qtool.checkpoint.reader import refuse_non_finite
from qtool.decode import Source
from qtool.errors import InputError, PlanError, VerificationError
from qtool.formats import gguf as blocks
from qtool.methods import rtn
from qtool.mixtures import MIXTURES
from qtool.models import outline, skeleton
from qtool.tensors import QuantizedTensor, TensorSpec, same_bits
from qtool.workspace import Workspace, file_place

NAME = "gguf"
FILE_TYPES = {GGMLQuantizationType.F32: LlamaFileType.ALL_F32, GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
              GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16}
PLAIN = rtn.Options(shrink_steps=9, rounds=1)  # a shorter search than with text
TENSORS_NAME = "model.gguf"  # in the working directory


@dataclass(frozen=True)
class Storage:
    """How the tensors of a file are stored: what --type stands for.

    label: in the file's name.  outputs: what `encode` makes of each tensor, in the order of the file.  types: block
    type of the quantized ones.  encode: (tensor, its output) -> as stored.
    """

    label: str
    file_type: LlamaFileType
    outputs: tuple[TensorSpec, ...]
    types: Mapping[str, GGMLQuantizationType]
    encode: Callable[[torch.Tensor, TensorSpec], torch.Tensor]
    weighed_by: str | None = None  # sha256 of the means of an importance matrix


@dataclass(frozen=True)
class GgufExport:
    """What will be written. out: the file."""

    source: Source
    out: Path
    model: GgufModel
    storage: Storage
    lost: tuple[str, ...]


def make_export(source: Source, kind: str | None = None, out: Path | None = None,
                imatrix: Path | None = None) -> GgufExport:
    """Raises InputError (or a class below it) when GGUF cannot hold the model, before any work.

    kind: a key of STORAGES or MIXTURES.  imatrix: llama.cpp's importance matrix, for a mixture.  out: a file ending in
    .gguf, or a directory for it.
    """
    kind = None if kind is None else kind.lower()
    if kind is not None and kind not in STORAGES and kind not in MIXTURES:
        raise InputError(f"--type {kind}: give one of {', '.join((*STORAGES, *MIXTURES))}")
    described = source.directory, source.config, source.specs
    bones = outline.build(*described) or skeleton.build(*described)
    specs = [source.specs[bones.source(name)] for name in bones.parameters]
    if imatrix is not None and kind not in MIXTURES:
        raise InputError(f"--imatrix {imatrix} says how block types are fitted; give one with --type, such as q4_k_m")
    storage = (mixed(kind, bones, source, specs, _importance(source, imatrix)) if kind in MIXTURES
               else STORAGES[kind or "auto"](specs))
    model = plan_gguf.described(source, bones)
    where = file_place(out, f"{source.name}-{storage.label}.gguf", source.directory)
    return GgufExport(source, where, model, storage, model.notes)


def dense(kind: GGMLQuantizationType | None) -> Callable[[list[TensorSpec]], Storage]:
    """Storage with all matrices of one element type, or each as it is (None)."""
    def store(specs: list[TensorSpec]) -> Storage:
        outputs = tuple(TensorSpec(spec.name, DTYPES[kind], spec.shape) if kind is not None else spec for spec in specs)
        largest = max(outputs, key=lambda spec: spec.nbytes)
        main = DENSE.get(largest.dtype, GGMLQuantizationType.F32)
        return Storage(main.name, FILE_TYPES[main], outputs, {}, _converted)

    return store


STORAGES = {"auto": dense(None), "f32": dense(GGMLQuantizationType.F32), "f16": dense(GGMLQuantizationType.F16),
            "bf16": dense(GGMLQuantizationType.BF16)}


def _importance(source: Source, imatrix: Path | None) -> dict[str, torch.Tensor]:
    """Weight name -> mean squares of its inputs [K]; empty without an importance matrix."""
    if imatrix is None:
        return {}
    shapes = {name: (spec.shape[0], spec.shape[1]) for name, spec in source.specs.items()
              if len(spec.shape) == 2 and name.endswith(".weight")}
    found_means = spread(read_imatrix(imatrix), shapes, str(source.config.get("model_type")), str(imatrix))
    if not found_means:
        raise InputError(f"{imatrix}: has no entry for any matrix of {source.origin}; it belongs to another model")
    return {name: means for name, (means, _) in found_means.items()}


def mixed(mixture: str, bones: skeleton.Skeleton, source: Source, specs: list[TensorSpec],
          importance: Mapping[str, torch.Tensor]) -> Storage:
    """Block types as llama.cpp's mixture of that name gives them, fitted without text."""
    shape = plan_gguf.shape_of(source.config, bones, calibrated=bool(importance))
    wanted = recipe.Recipe(mixture=mixture, format=NAME)
    schemes = {f"{one.stored}.weight": one.scheme for one in plan_gguf.outside(wanted, bones, shape)[0]}
    for index in range(len(bones.blocks)):
        for name, (_, columns) in bones.block_linears(index).items():
            scheme = plan_gguf.base_scheme(wanted, name, index, columns, shape)
            if scheme is not None:
                schemes[bones.source(f"{name}.weight")] = scheme
    outputs = []
    for spec in specs:
        linear, scheme = spec.name.removesuffix(".weight"), schemes.get(spec.name)
        rows = spec.shape[:2]
        outputs += [spec] if scheme is None else blocks.layout(linear, (rows[0], rows[1]), scheme, spec.dtype)

    def encode(tensor: torch.Tensor, output: TensorSpec) -> torch.Tensor:
        scheme = schemes.get(output.name)
        if scheme is None:
            return tensor.to(output.dtype)
        kept = _kept_codes(source, output.name.removesuffix(".weight"), scheme)
        if kept is not None:
            return blocks.pack(kept[0], kept[1])[output.name]
        packed = torch.empty(output.shape, dtype=output.dtype)
        for chunk in outside.rounded(blocks, output.name.removesuffix(".weight"), (tensor.shape[0], tensor.shape[1]),
                                     scheme, tensor.dtype, lambda start, stop: tensor[start:stop], PLAIN,
                                     importance.get(output.name)):
            packed[chunk.start:chunk.stop] = chunk.packed
        return packed

    types = {name: GGMLQuantizationType[scheme.grid.upper()] for name, scheme in schemes.items()}
    weighed = hashlib.sha256(b"".join(means.numpy().tobytes() for _, means in sorted(importance.items()))).hexdigest()
    return Storage(mixture.upper(), LlamaFileType(MIXTURES[mixture][0]), tuple(outputs), types, encode,
                   weighed if importance else None)


def _kept_codes(source: Source, linear: str, scheme: recipe.Scheme) -> tuple[str, QuantizedTensor] | None:
    """A quantized linear of the source as blocks with the same codes and scales, where the type holds these."""
    if linear not in source.schemes or source.obstacle(linear) is not None:
        return None
    held = found.load("grids", scheme.grid).holding(source.read_quantized(linear))
    return None if held is None else (linear, held)


def run(job: GgufExport, step: inspect.Step = inspect.no_steps, restart: bool = False) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints. Raises StorageError, VerificationError."""
    source, storage = job.source, job.storage
    identity = {"export": NAME, "type": storage.label, "importance": storage.weighed_by, "qtool": qtool.__version__,
                "source": {"name": source.name, "files": source.hashes()}}
    needed = file_bytes(storage.outputs, job.model, storage.types, storage.file_type)
    disk.refuse_full(job.out, needed, "this export", ["choose an --out on another disk"])
    with Workspace(job.out, identity, restart) as work, torch.inference_mode():
        writer = GgufWriter(work.folder / TENSORS_NAME, storage.outputs, job.model, storage.types, storage.file_type,
                            resuming.resumed(work))
        same: set[str] = set(work.finished.get(resuming.SOME, {}).get("same", ()))
        left = resuming.unwritten(work, storage.outputs, lambda spec: spec.nbytes, writer.sync,
                                lambda: {"same": sorted(same)})
        with left as specs:
            for done, spec in specs:
                step(done, len(storage.outputs), spec.name)
                same.update({spec.name.removesuffix(".weight")} if _copy(job, writer, spec) else ())
        step(len(storage.outputs), len(storage.outputs), "naming and hashing the file")
        writer.finish()
        work.complete_file(TENSORS_NAME)
        size, digest = job.out.stat().st_size, manifest.file_hash(job.out)
    checked, lossless, notes = _said(job, same)
    return {
        "schema": inspect.SCHEMA, "out": str(job.out), "format": f"{NAME} {storage.label}",
        "from": inspect.stored_name(source) or f"{inspect.dtype_name(source.dtype)} weights",
        "linears": len(source.schemes), "lossless": lossless, "source_bytes": footprint.stored_bytes(source),
        "weight_bytes": size, "notes": notes, "outputs": {job.out.name: digest}, "checked": checked,
    }


def _said(job: GgufExport, same: set[str]) -> tuple[str, bool, list[str]]:
    """What was checked, whether nothing was lost, and what to know of it. same: the tensors that kept their values."""
    source, storage = job.source, job.storage
    rounded = [spec.name for spec in storage.outputs
               if spec.name in storage.types and spec.name.removesuffix(".weight") not in source.schemes]
    if not source.schemes:
        lossless = len(same) == len(storage.outputs) and not _inexact(source)
    else:
        lossless = same.issuperset(source.schemes)
    if source.schemes and lossless:
        notes = [f"{len(rounded)} tensors that were not quantized are rounded now: "
                 + ", ".join(f"{name} to {storage.types[name].name}" for name in rounded[:3])] if rounded else []
        return ("lossless: codes and scales of every quantized linear were read back and have the source's values, bit "
                "for bit"), True, notes
    again = len(source.schemes.keys() - same) if storage.types else 0
    notes = [f"{again} of {len(source.schemes)} quantized linears are decoded and rounded again, as {storage.label} "
             "cannot hold their codes or scales"] if again else []
    return ("every tensor was read back" + ("; lossless" if lossless else f" and is the source's in {storage.label}"),
            lossless, notes)



def _copy(job: GgufExport, writer: GgufWriter, output: TensorSpec) -> bool:
    """Write one tensor and check it; returns whether nothing of it was lost."""
    tensor = refuse_non_finite(job.source.origin, output.name, job.source.read(output.name))
    stored = job.storage.encode(tensor, output)
    if not writer.finished:
        writer.write(output.name, stored)
    meant = writer.held(output.name, stored)
    if not same_bits(writer.read_back(output.name), meant):
        raise VerificationError(f"{output.name}: what was read back from {writer.folder} differs from what was "
                                "written; the disk or the memory of this machine may be faulty")
    kind, linear = job.storage.types.get(output.name), output.name.removesuffix(".weight")
    if kind is None:
        return linear not in job.source.schemes and torch.equal(meant.to(tensor.dtype), tensor)
    if linear not in job.source.schemes:
        return False
    scheme = found.load("grids", kind.name.lower()).scheme
    values = blocks.dequantize(linear, {output.name: meant}.__getitem__, scheme, (tensor.shape[0], tensor.shape[1]))
    return torch.equal(values, job.source.decoded(linear))


def _inexact(source: Source) -> bool:
    """Whether reading rounds already: a GGUF file with tensors of other types than the one that it is read as."""
    if source.kind != NAME:
        return False
    tensors = read_gguf_header(Path(source.origin)).tensors.values()
    return any(tensor.kind != DENSE.get(source.dtype) for tensor in tensors)


def _converted(tensor: torch.Tensor, output: TensorSpec) -> torch.Tensor:
    made = tensor.to(output.dtype)
    if output.dtype is torch.float16 and bool((made.isinf() & tensor.isfinite()).any()):
        raise PlanError(f"{output.name} has values beyond 65504, which F16 cannot hold; use --type bf16 or f32")
    return made
