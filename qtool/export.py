"""Rewrites a quantized checkpoint in another format: the same codes, zero points and scales, in other bytes.

Tensor by tensor. Every linear is read back from what was written, decoded by the other format and compared with the
source bit for bit; a pair of formats that cannot hold the same numbers is refused before anything is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import qtool
from qtool import card, formats, found, inspect, manifest
from qtool.checkpoint.writer import ShardWriter, plan_shards
from qtool.decode import Source
from qtool.errors import InputError, VerificationError
from qtool.models import skeleton
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, TensorSpec
from qtool.workspace import Workspace, refuse_existing, storage_error

DENSE = "hf"
SHARD_BYTES = 4_000_000_000
WRITTEN = "weights"  # the stage of the journal after which no tensor is written again


@dataclass(frozen=True)
class Export:
    """What will be written. schemes: of every linear in the target (none for dense weights)."""

    source: Source
    target: ModuleType
    out: Path
    schemes: dict[str, Scheme]
    skipped: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    record: dict[str, Any] | None

    @property
    def dense(self) -> bool:
        return self.target.NAME == DENSE

    @property
    def lost(self) -> tuple[str, ...]:
        return lost(self.source)


def lost(source: Source) -> tuple[str, ...]:
    """What of the source no export has."""
    if not source.cache_scales():
        return ()
    return ("the scales of cached keys and values (k_scale, v_scale) are left out; to have them in another format, "
            "quantize the original again",)


def make_export(source: Source, to: str, out: Path | None = None) -> Export:
    """Raises InputError (or a class below it) when `to` cannot hold what the source holds, before any work."""
    target = formats.load(to)
    _refuse_pointless(source, target)
    schemes = {} if target.NAME == DENSE else _schemes(source, target)
    skipped = _skipped(source, schemes) if schemes else ()
    where = out or Path(f"{source.name}-{target.NAME}")
    refuse_existing(where)
    return Export(source, target, where, schemes, skipped, tuple(_outputs(source, target, schemes)),
                  inspect.record_of(source))


def run(job: Export, step: inspect.Step = inspect.no_steps) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints. Raises StorageError, VerificationError."""
    identity = {"export": job.target.NAME, "qtool": qtool.__version__,
                "source": {"name": job.source.name, "files": job.source.hashes()}}
    with Workspace(job.out, identity) as work, torch.inference_mode():
        writer = ShardWriter(work.folder, plan_shards(job.outputs, SHARD_BYTES))
        names = list(job.source.specs)
        for done, name in enumerate(names if WRITTEN not in work.finished else ()):
            step(done, len(names), name)
            linear = name.removesuffix(".weight")
            if linear != name and linear in job.schemes:
                _convert(job, writer, linear)
            else:
                _copy(job, writer, name)
        step(len(names), len(names), "naming and hashing the files")
        name_files(work, writer)
        result = _finish(job, work)
    return told(job.source, job.out, result, len(job.schemes or job.source.schemes), _checked(job), _notes(job))


def name_files(work: Workspace, writer: ShardWriter) -> None:
    """All tensors are written: record that, and give their files their names. A killed run may do it again."""
    writer.sync()
    if WRITTEN not in work.finished:
        work.record(WRITTEN, {})
    writer.finish()


def told(source: Source, out: Path, result: dict[str, Any], linears: int, checked: str,
         notes: list[str]) -> dict[str, Any]:
    """What `qtool export --json` prints, of a finished output with the manifest `result`."""
    return {
        "schema": inspect.SCHEMA, "out": str(out), "from": inspect.stored_name(source), "format": result["format"],
        "linears": linears, "lossless": checked.startswith("lossless"), "checked": checked,
        "source_bytes": inspect.stored_bytes(source), "weight_bytes": result["totals"]["weight_bytes"], "notes": notes,
        "outputs": result["outputs"],
    }


def _refuse_pointless(source: Source, target: ModuleType) -> None:
    if source.format is not None and source.format.NAME == target.NAME:
        raise InputError(f"{source.origin} is stored as {target.NAME} already; there is nothing to export")
    if source.format is None and target.NAME != DENSE:
        raise InputError(f"{source.origin} is not quantized, so it has no codes to store as {target.NAME}; use: "
                         f"qtool quantize {source.origin} --format {target.NAME}")
    if source.format is None and source.kind != "gguf":
        raise InputError(f"{source.origin} holds plain weights already; there is nothing to export")


def _schemes(source: Source, target: ModuleType) -> dict[str, Scheme]:
    """Every linear must fit the target, its scales in the target's dtype without any change."""
    dtype = target.scale_dtype(source.dtype)
    for linear, scheme in source.schemes.items():
        reason = target.check(scheme, linear, source.specs[linear + ".weight"].shape)
        if reason:
            raise InputError(f"{reason} (or --to hf, which keeps dense weights)")
    reason = target.check_together(source.schemes)
    if reason:
        raise InputError(reason)
    refuse_inexact(source, dtype, f"{target.NAME} for this model",
                   f"quantize the original with --format {target.NAME}, or use --to hf")
    return dict(source.schemes)


def refuse_inexact(source: Source, dtype: torch.dtype, where: str, remedy: str) -> None:
    """InputError when there are scales that `dtype`, in which `where` keeps scales, cannot hold exactly."""
    inexact = [(linear, value) for linear, value in _inexact(source, dtype) if value is not None]
    if inexact:
        linear, value = inexact[0]
        stored, wanted = (str(one).removeprefix("torch.") for one in (_scale_spec(source, linear).dtype, dtype))
        raise InputError(
            f"{len(inexact)} of {len(source.schemes)} linears have {stored} scales that {wanted}, the scale type of "
            f"{where}, cannot hold exactly (first: {value:.9g} in {linear}), so the export would change the weights; "
            f"{remedy}")


def _inexact(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, float | None]]:
    """Each linear with its first scale that `dtype` cannot hold, or None. Reads nothing but the scales."""
    for linear, scheme in source.schemes.items():
        if not found.load("grids", scheme.grid).FREE_SCALES:  # stored as the grid has them, in every format
            continue
        scale = source.checkpoint.read(_scale_spec(source, linear).name)
        changed = scale.to(dtype).double() != scale.double()
        yield linear, float(scale[changed][0]) if bool(changed.any()) else None


def _scale_spec(source: Source, linear: str) -> TensorSpec:
    """The one floating tensor among those of a quantized linear, as the file has it."""
    assert source.format is not None
    names = (f"{linear}.{suffix}" for suffix in source.format.SUFFIXES)
    stored = source.checkpoint.specs
    return next(stored[name] for name in names if name in stored and stored[name].dtype in FLOATING)


def _skipped(source: Source, schemes: dict[str, Scheme]) -> tuple[str, ...]:
    """The linears of the architecture that are not quantized, by module name; formats must name them."""
    bones = skeleton.build(source.directory, source.config, source.specs)
    every = [name for index in range(len(bones.blocks)) for name in bones.block_linears(index)]
    every += [*([bones.head] if bones.head else []), *bones.routers]
    return tuple(name for name in every if bones.source(name + ".weight").removesuffix(".weight") not in schemes)


def _outputs(source: Source, target: ModuleType, schemes: dict[str, Scheme]) -> Iterator[TensorSpec]:
    for name, spec in source.specs.items():
        linear = name.removesuffix(".weight")
        if linear != name and linear in schemes:
            yield from target.layout(linear, spec.shape, schemes[linear], source.dtype)
        else:
            yield spec


def _convert(job: Export, writer: ShardWriter, linear: str) -> None:
    """The same codes and scales in the target's layout; then what lies in the file against the source."""
    quantized = job.source.read_quantized(linear)
    scheme = job.schemes[linear]
    if found.load("grids", scheme.grid).FREE_SCALES:
        quantized = replace(quantized, scale=quantized.scale.to(job.target.scale_dtype(job.source.dtype)))
    quantized = replace(quantized, symmetric=scheme.symmetric)
    for name, tensor in job.target.pack(linear, quantized, job.source.dtype).items():
        writer.write(name, tensor)
    shape = job.source.specs[linear + ".weight"].shape
    again = job.target.unpack(linear, writer.read_back, scheme, shape)
    decode: Callable[..., torch.Tensor] = found.load("grids", scheme.grid).decode
    if not torch.equal(decode(again), decode(quantized)):
        raise VerificationError(f"{linear}: its values in {writer.folder} differ from those in {job.source.origin}; "
                                "the disk or the memory of this machine may be faulty")


def _copy(job: Export, writer: ShardWriter, name: str) -> None:
    """A tensor as the dense view has it: decoded if it is quantized, else as stored."""
    tensor = job.source.read(name)
    writer.write(name, tensor)
    if not torch.equal(writer.read_back(name).view(torch.uint8), tensor.contiguous().view(torch.uint8)):
        raise VerificationError(f"{name}: what was read back from {writer.folder} differs from what was written; the "
                                "disk or the memory of this machine may be faulty")


def _finish(job: Export, work: Workspace) -> dict[str, Any]:
    config = dict(job.source.config)
    extra: dict[str, Any] = {}
    if not job.dense:
        steps = [next(iter(step)) for step in ((job.record or {}).get("recipe") or {}).get("steps", [])]
        config["quantization_config"] = job.target.config(job.schemes, list(job.skipped), steps)
        extra = job.target.extra_files(config["quantization_config"])
    sizes = {linear: sum(spec.nbytes for spec in job.target.layout(linear, job.source.specs[linear + ".weight"].shape,
                                                                   scheme, job.source.dtype))
             for linear, scheme in job.source.schemes.items()}
    kept = [{"name": name, "reason": "left out of the quantization_config"} for name in job.skipped]
    made = record(job.source, job.record, job.target.NAME, sizes, sum(spec.nbytes for spec in job.outputs), kept)
    return finish(work, job.source, {"config.json": config, **extra}, made, job.target.LOADERS)


def finish(work: Workspace, source: Source, files: Mapping[str, Any], record: Mapping[str, Any],
           loaders: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The companions of the source, JSON files, card and manifest; then the directory gets its name.

    Returns the manifest: `record` with the hashes of the files.
    """
    try:
        for path in source.companions():
            shutil.copyfile(path, work.folder / path.name)
        for name, content in files.items():
            manifest.write_json(work.folder / name, content)
        scratch = ("journal.jsonl", "lock")
        hashes = {path.name: manifest.file_hash(path) for path in sorted(work.folder.iterdir())
                  if path.name not in scratch}
        result = {**record, "outputs": hashes}
        (work.folder / "README.md").write_text(card.text(result, loaders), encoding="utf-8")
        hashes["README.md"] = manifest.file_hash(work.folder / "README.md")
        manifest.save(work.folder, result)
        work.complete()
    except OSError as error:
        raise storage_error(error, work.folder) from None
    return result


def record(source: Source, before: dict[str, Any] | None, target: str, sizes: Mapping[str, int], weight_bytes: int,
           kept: list[dict[str, str]]) -> dict[str, Any]:
    """The manifest of an export without the hashes of its files: the source's (`before`) with the sizes of the new
    ones; of a foreign checkpoint, what its files tell.

    sizes: bytes of every quantized linear.  weight_bytes: of all tensors.  kept: the linears that are not quantized.
    """
    layers = []
    known = {layer["stored"]: layer for layer in (before or {}).get("layers", [])}
    for linear in [name for name in known if name in source.schemes] or list(source.schemes):
        figures = known.get(linear, {"name": linear, "stored": linear, "relative_error": None, "weight_error": None,
                                     "sqnr_db": None, "tokens": 0})
        layers.append({**figures, "shape": list(source.specs[linear + ".weight"].shape),
                       "scheme": source.schemes[linear].model_dump(), "bytes": sizes[linear]})
    parameters = sum(spec.elements for spec in source.specs.values())
    made = before or {"schema": manifest.SCHEMA, "qtool": qtool.__version__, "recipe": None, "calibration": None,
                      "versions": {}, "source": {"name": source.name, "origin": source.origin,
                                                 "files": source.hashes()}}
    totals = manifest.totals(layers, parameters, weight_bytes,
                             (before or {}).get("totals", {}).get("source_bytes", inspect.stored_bytes(source)))
    return {**made, "exported_from": {"format": inspect.stored_name(source), "qtool": qtool.__version__,
                                      "files": source.hashes()},
            "format": target, "layers": layers, "kept": (before or {}).get("kept", kept), "totals": totals}


def _checked(job: Export) -> str:
    if job.dense:
        dtype = inspect.dtype_name(job.source.dtype)
        return f"every tensor was read back; quantized weights are rounded to {dtype}, the type of the model"
    return "lossless: every quantized weight was decoded from both and compared bit for bit"


def _notes(job: Export) -> list[str]:
    return [] if job.dense else [*job.target.notes(job.schemes), *job.target.fused_conflicts(job.schemes)]
