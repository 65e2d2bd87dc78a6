"""Rewrites a quantized checkpoint in another format: the same codes, zero points and scales, in other bytes.

Tensor by tensor. Every linear is read back from what was written, unpacked by the other format and compared with the
source bit for bit; a pair of formats that cannot hold the same numbers is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import qtool
from qtool import (
    card,
    digests,
    footprint,
    formats,
    found,
    gguf_codes,
    heap,
    inspect,
    manifest,
    repacking,
    storage,
    transfer,
)
from qtool.ahead import Behind, ahead
from qtool.checkpoint.reader import refuse_non_finite
from qtool.checkpoint.tensor_io import as_bytes
from qtool.checkpoint.writer import ShardWriter, plan_shards
from qtool.decode import Source
from qtool.errors import InputError, VerificationError
from qtool.following import Following
from qtool.recipe import Scheme
from qtool.repacking import Route
from qtool.resuming import SOME, WRITTEN, resumed, unwritten
from qtool.tensors import FLOATING, INPUT_SCALE, QuantizedTensor, TensorSpec, all_finite, same_bits
from qtool.workspace import Workspace, recover, refuse_existing

DENSE = "hf"
SHARD_BYTES = 4_000_000_000
PIECE_BYTES = 8 << 20  # of a large tensor that is copied
AHEAD, BEHIND = 2, 1  # tensors, or parts of large ones, in memory: one that is read, one written, one compared
ALREADY = "it was there already: this command finished it before"
NONE = torch.empty(0)


@dataclass(frozen=True)
class Export:
    """What will be written. record: the manifest of the source.  made: that of the output, if it is finished."""

    source: Source
    target: ModuleType
    out: Path
    transfer: transfer.Transfer
    outputs: tuple[TensorSpec, ...]
    record: dict[str, Any] | None
    made: dict[str, Any] | None = None

    @property
    def dense(self) -> bool:
        return self.target.NAME == DENSE

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Of every linear in the target; none for dense weights."""
        return self.transfer.schemes

    @property
    def lost(self) -> tuple[str, ...]:
        return () if self.transfer.attentions else lost(self.source)


def lost(source: Source) -> tuple[str, ...]:
    """What of the source no export has."""
    if not source.cache_scales():
        return source.notes
    return (*source.notes, "the scales of cached keys and values (k_scale, v_scale) are left out; to have them in "
            "another format, quantize the original again")


def make_export(source: Source, to: str, out: Path | None = None) -> Export:
    """Raises InputError (or a class below it) when `to` cannot hold what the source holds, before any work."""
    target = formats.load(to)
    source = gguf_codes.of(source) if source.kind == "gguf" and target.NAME != DENSE else source
    _refuse_pointless(source, target)
    how = (transfer.Transfer({}, (), (), source.dtype, source.dtype) if target.NAME == DENSE
           else transfer.plan(source, target))
    where = out or Path(f"{source.name}-{target.NAME}")
    made = finished(where, source, target.NAME)
    return Export(source, target, where, how, tuple(_outputs(source, target, how)), inspect.record_of(source), made)


def run(job: Export, step: inspect.Step = inspect.no_steps, restart: bool = False) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints. Raises StorageError, VerificationError."""
    linears, checked = len(job.schemes or job.source.schemes), _checked(job)
    if job.made is not None:
        return told(job.source, job.out, job.made, linears, checked, [*_notes(job), ALREADY])
    identity = {"export": job.target.NAME, "qtool": qtool.__version__,
                "source": {"name": job.source.name, "files": job.source.hashes()}}
    refuse_full_disk(job.out, sum(spec.nbytes for spec in job.outputs), job.source)
    heap.reuse()
    with Workspace(job.out, identity, restart) as work, Following() as follow, torch.inference_mode():
        writer = ShardWriter(work.folder, plan_shards(job.outputs, SHARD_BYTES), getattr(job.target, "METADATA", None),
                             resumed(work))
        names = list(job.source.specs)
        _write(job, work, _Checked(writer, follow), names, step)
        again = job.transfer.attentions and WRITTEN not in work.finished
        for attention, scales in (job.source.cache_scales() if again else {}).items():
            for spec, scale in zip(job.target.kv_scales(attention), scales, strict=True):
                writer.write(spec.name, scale.reshape(spec.shape))
                _Checked(writer, follow).read_back(spec.name)
        step(len(names), len(names), "naming and hashing the files")
        name_files(work, writer)
        result = _finish(job, work, writer.names, follow.known())
    return told(job.source, job.out, result, linears, checked, _notes(job))


def finished(where: Path, source: Source, target: str, **settings: Any) -> dict[str, Any] | None:
    """The manifest of an output that this export has finished before; None where there is nothing.

    Raises OutputError where something else is in its place.
    """
    recover(where, source.directory)
    if (where / manifest.NAME).is_file() and not where.is_symlink():
        there = manifest.load(where)
        whole = all((where / name).is_file() for name in there.get("outputs", {}))
        if whole and (there.get("format"), there.get("exported_from")) == (target, _exported_from(source, settings)):
            return there
    refuse_existing(where)
    return None


def _exported_from(source: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": inspect.stored_name(source), "qtool": qtool.__version__, "files": source.hashes(), **settings}


def refuse_full_disk(out: Path, weights: int, source: Source) -> None:
    """Raise PlanError where there is no room for `weights` bytes and the files beside them."""
    storage.refuse_full(out, weights + sum(path.stat().st_size for path in source.companions()), "this export",
                        ["choose an --out on another disk"])


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
        "linears": linears, "lossless": checked.startswith("lossless"), "requantized": None, "checked": checked,
        "source_bytes": footprint.stored_bytes(source), "weight_bytes": result["totals"]["weight_bytes"],
        "notes": notes, "outputs": result["outputs"],
    }


def _refuse_pointless(source: Source, target: ModuleType) -> None:
    if source.format is not None and source.format.NAME == target.NAME:
        raise InputError(f"{source.origin} is stored as {target.NAME} already; there is nothing to export")
    if source.format is None and target.NAME != DENSE:
        raise InputError(f"{source.origin} is not quantized, so it has no codes to store as {target.NAME}; use: "
                         f"qtool quantize {source.origin} --format {target.NAME}")
    if source.format is None and source.kind != "gguf":
        raise InputError(f"{source.origin} holds plain weights already; there is nothing to export")


def _outputs(source: Source, target: ModuleType, how: transfer.Transfer) -> Iterator[TensorSpec]:
    placed = formats.placing(target, how.schemes)
    for name, spec in source.specs.items():
        linear = name.removesuffix(".weight")
        if linear != name and linear in how.schemes:
            yield from target.layout(linear, spec.shape, how.schemes[linear], how.dtype)
        else:
            yield placed(spec)
    for attention in how.attentions:
        yield from target.kv_scales(attention)


@dataclass(frozen=True)
class _Piece:
    """What is written at once: a quantized linear, a whole tensor, or of a large one the rows start .. stop."""

    name: str
    linear: str | None = None
    rows: tuple[int, int] | None = None


def _pieces(job: Export, name: str) -> Iterator[_Piece]:
    spec, linear = job.source.specs[name], name.removesuffix(".weight")
    if linear != name and linear in job.schemes:
        yield _Piece(name, linear)
    elif job.source.kind == "gguf" or linear in job.source.schemes or spec.nbytes <= PIECE_BYTES:
        yield _Piece(name)  # decoded as a whole
    else:
        step = max(1, PIECE_BYTES // (spec.nbytes // spec.shape[0]))
        for start in range(0, spec.shape[0], step):
            yield _Piece(name, rows=(start, min(start + step, spec.shape[0])))


@dataclass(frozen=True)
class _Checked:
    """Reads back what a writer wrote; what it gives is hashed on the way."""

    writer: ShardWriter
    follow: Following

    def read_back(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        back = self.writer.read_back(name) if rows is None else self.writer.read_rows_back(name, *rows)
        offset, _ = self.writer.place(name)
        if rows is not None:
            offset += rows[0] * (back.nbytes // max(1, rows[1] - rows[0]))
        self.follow.add(*self.writer.part(name), self.writer.stored(name), offset, as_bytes(back))
        return back


def _write(job: Export, work: Workspace, checked: _Checked, names: Sequence[str], step: inspect.Step) -> None:
    """Write all tensors that are not there yet: one is read and packed, one written and one compared at a time."""
    first = len(names) if WRITTEN in work.finished else work.finished.get(SOME, {}).get("count", 0)
    pieces = (piece for name in names[first:] for piece in _pieces(job, name))

    def durable() -> None:
        checks.wait()
        checked.writer.sync()
        heap.give_back()  # tensors of all sizes that live in several threads leave holes

    left = unwritten(work, names, lambda name: job.source.specs[name].nbytes, durable)
    with Behind(BEHIND) as checks, left as named, ahead(lambda piece: _read(job, piece), pieces, 1, AHEAD) as made:
        for done, name in named:
            step(done, len(names), name)
            for piece in _pieces(job, name):
                checks.add(_stored(job, checked, piece, next(made)))
        checks.wait()


@dataclass(frozen=True)
class _Linear:
    """A linear as the source has it, and packed as the target has it.

    route, words: how its codes go over as words, and these as the source has them; None where they are in `quantized`.
    """

    quantized: QuantizedTensor
    packed: dict[str, torch.Tensor]
    route: Route | None
    words: torch.Tensor | None


def _read_linear(job: Export, linear: str) -> _Linear:
    scheme = job.schemes[linear]
    route = job.source.route(linear, job.target, scheme)
    quantized = job.source.read_quantized(linear, route.source if route else None)
    if found.load("grids", scheme.grid).FREE_SCALES:
        quantized = replace(quantized, scale=quantized.scale.to(job.transfer.scale_dtype))
    quantized = replace(quantized, symmetric=scheme.symmetric)
    packed = job.target.pack(linear, quantized, job.transfer.dtype)
    if route is None:
        return _Linear(quantized, packed, None, None)
    words = job.source.checkpoint.read(route.source)
    packed[route.target] = route.repacked(words, packed[route.target].dtype)
    return _Linear(quantized, packed, route, words)


@torch.inference_mode()
def _read(job: Export, piece: _Piece) -> Any:
    """A linear, a tensor, or rows of it."""
    if piece.linear is not None:
        return _read_linear(job, piece.linear)
    if piece.rows is None:
        return refuse_non_finite(job.source.origin, piece.name, job.source.read(piece.name))
    rows = job.source.read_rows(piece.name, *piece.rows)
    if rows.dtype in FLOATING and not all_finite(rows):
        refuse_non_finite(job.source.origin, piece.name, job.source.read(piece.name))  # counts all that are not
    return rows


def _stored(job: Export, checked: _Checked, piece: _Piece, made: Any) -> Callable[[], None]:
    """Write a piece; returns what compares that which then lies in the file with the source, in any thread."""
    writer = checked.writer
    if piece.linear is not None:
        names = list(made.packed)
        for name in names:
            writer.write(name, made.packed.pop(name))
        return lambda: _check_linear(job, checked, piece, made, names)
    if piece.rows is None:
        writer.write(piece.name, made)
    else:
        writer.write_rows(piece.name, piece.rows[0], made)
    return lambda: _check(checked, piece, made)


@torch.inference_mode()
def _check(checked: _Checked, piece: _Piece, made: torch.Tensor) -> None:
    if not same_bits(checked.read_back(piece.name, piece.rows), made):
        raise VerificationError(f"{piece.name}: what was read back from {checked.writer.folder} differs from what was "
                                "written; the disk or the memory of this machine may be faulty")


@torch.inference_mode()
def _check_linear(job: Export, checked: _Checked, piece: _Piece, made: _Linear, names: Sequence[str]) -> None:
    assert piece.linear is not None
    back = {name: checked.read_back(name) for name in names}
    read = repacking.without(back, made.route.target if made.route else None)
    again = job.target.unpack(piece.linear, read, job.schemes[piece.linear], job.source.specs[piece.name].shape)
    same = _same(made.quantized, again)
    if made.route is not None and made.words is not None:
        same = same and made.route.same(made.words, back[made.route.target])
    if not same:
        raise VerificationError(f"{piece.linear}: its values in {checked.writer.folder} differ from those in "
                                f"{job.source.origin}; the disk or the memory of this machine may be faulty")


def _same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether codes (if they have data), zero points and scales are equal, and so every value that they stand for."""
    if one.codes.shape != other.codes.shape or not (one.codes.is_meta or same_bits(one.codes, other.codes)):
        return False
    pairs = [(one.zero_point, other.zero_point), (one.scale.float(), other.scale.float()),
             (one.extra.get(INPUT_SCALE, NONE).float().reshape(-1), other.extra.get(INPUT_SCALE, NONE).float())]
    return all(torch.equal(left, right) for left, right in pairs)


def _finish(job: Export, work: Workspace, names: Sequence[str], known: Mapping[str, digests.Known]) -> dict[str, Any]:
    config = dict(job.source.config)
    extra: dict[str, Any] = {}
    if not job.dense:
        steps = [next(iter(step)) for step in ((job.record or {}).get("recipe") or {}).get("steps", [])]
        said = job.target.config(job.schemes, list(job.transfer.told), steps)
        said = job.target.with_kv_cache(said) if job.transfer.attentions else said
        config = formats.with_quantization(config, job.target, said)
        extra = job.target.extra_files(said)
    sizes = {linear: sum(spec.nbytes for spec in job.target.layout(linear, job.source.specs[linear + ".weight"].shape,
                                                                   scheme, job.transfer.dtype))
             for linear, scheme in job.source.schemes.items()}
    kept = [{"name": name, "reason": "left out of the quantization_config"} for name in job.transfer.skipped]
    made = record(job.source, job.record, job.target.NAME, sizes, sum(spec.nbytes for spec in job.outputs), kept)
    return finish(work, job.source, names, {"config.json": config, **extra}, made, job.target.LOADERS, known=known)


def finish(work: Workspace, source: Source, names: Sequence[str], files: Mapping[str, Any], record: Mapping[str, Any],
           loaders: Sequence[tuple[str, str]], elsewhere: Mapping[str, digests.Places] | None = None,
           known: Mapping[str, digests.Known] | None = None) -> dict[str, Any]:
    """The companions of the source, JSON files, card and manifest; then the directory gets its name.

    names: of the files that are there.  elsewhere: where tensors lie in files that do not say so.  known: their hashes,
    where they were taken before.

    Returns the manifest: `record` with hashes of the files.
    """
    work.refuse_strays({*names, *manifest.write_beside(work.folder, source.companions(), files)})
    (work.folder / "README.md").write_text(card.text(record, loaders), encoding="utf-8")
    result = {**record, **digests.of_folder(work.folder, elsewhere, known)}
    manifest.save(work.folder, result)
    work.complete()
    return result


def record(source: Source, before: dict[str, Any] | None, target: str, sizes: Mapping[str, int], weight_bytes: int,
           kept: list[dict[str, str]], **settings: Any) -> dict[str, Any]:
    """The manifest of an export without the hashes of its files: the source's (`before`) with the sizes of the new
    ones; of a foreign checkpoint, what its files tell.

    sizes: bytes of every quantized linear.  weight_bytes: of all tensors.  kept: the linears that are not quantized.
    settings: of the target, on which bytes depend.
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
                      "versions": {}, "source": {"name": source.name, "origin": source.checkpoint.published,
                                                 "files": source.hashes()}}
    totals = manifest.totals(layers, parameters, weight_bytes,
                             (before or {}).get("totals", {}).get("source_bytes", footprint.stored_bytes(source)))
    return {**made, "exported_from": _exported_from(source, settings), "format": target, "layers": layers,
            "kept": (before or {}).get("kept", kept), "totals": totals}


def _checked(job: Export) -> str:
    if job.dense:
        dtype = inspect.dtype_name(job.source.dtype)
        return f"every tensor was read back; quantized weights are rounded to {dtype}, the type of the model"
    return "lossless: codes, zero points and scales of every linear were read back and compared bit for bit"


def _notes(job: Export) -> list[str]:
    return [] if job.dense else [*job.target.notes(job.schemes), *job.target.fused_conflicts(job.schemes)]
