"""Writes a checkpoint as an ONNX decoder that onnxruntime-genai loads: the same codes and scales, in other bytes.

Initializer by initializer, so memory is one tensor. Each is read back from the file; a quantized linear is also decoded
from what lies there and compared with the source bit for bit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qtool
from qtool import export, inspect, resuming, storage, transfer
from qtool.checkpoint.writer import Shard, ShardWriter
from qtool.decode import Source
from qtool.errors import InputError, VerificationError
from qtool.models import decoder as decoders
from qtool.onnx_graph import genai, weights
from qtool.onnx_graph.builder import DATA_FILE, Graph, library
from qtool.onnx_graph.decoder import draw
from qtool.onnx_graph.weights import Part
from qtool.tensors import same_bits
from qtool.workspace import Workspace

NAME = "onnx"
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class OnnxExport:
    """What will be written. settings: those of the graph.  record, made: as in export.Export."""

    source: Source
    out: Path
    graph: Graph
    settings: dict[str, Any]
    extra_files: dict[str, Any]
    record: dict[str, Any] | None
    made: dict[str, Any] | None = None

    @property
    def lost(self) -> tuple[str, ...]:
        return export.lost(self.source)


def make_export(source: Source, out: Path | None = None, accuracy_level: int | None = None,
                dtype: str | None = None) -> OnnxExport:
    """accuracy_level: of MatMulNBits; 4 lets it round its inputs to 8 bits, which is faster (0).  dtype: in which the
    graph computes, float16 or float32 (float32).

    Raises InputError (or a class below it) when the graph cannot hold the model, before any work.
    """
    library()
    level, computed = accuracy_level or 0, dtype or "float32"
    if level not in ACCURACY_LEVELS:
        raise InputError(f"--accuracy-level is 0 to 4, not {level}")
    if computed not in DTYPES:
        raise InputError(f"--dtype of an ONNX graph is {' or '.join(DTYPES)}, not {computed}")
    if source.schemes and computed != "float32":
        transfer.refuse_inexact(source, DTYPES[computed], f"an ONNX graph in {computed}", "leave --dtype out")
    decoder = decoders.describe(source.directory, source.config, source.specs)
    where = out or Path(f"{source.name}-{NAME}")
    settings = {"accuracy_level": level, "dtype": computed}
    made = export.finished(where, source, NAME, **settings)
    files = {"config.json": dict(source.config), **genai.files(decoder, source.config, source.directory)}
    graph = draw(source, decoder, level, DTYPES[computed])
    return OnnxExport(source, where, graph, settings, files, inspect.record_of(source), made)


def run(job: OnnxExport, step: inspect.Step = inspect.no_steps, restart: bool = False) -> dict[str, Any]:
    """Write it; returns what `qtool export --json` prints. Raises StorageError, VerificationError."""
    source, parts = job.source, job.graph.parts
    if job.made is not None:
        return export.told(source, job.out, job.made, len(source.schemes), _checked(source),
                           [*_notes(source), export.ALREADY])
    identity = {"export": NAME, "qtool": qtool.__version__, "onnx": library().__version__,
                **job.settings, "source": {"name": source.name, "files": source.hashes()}}
    specs = tuple(spec for part in parts for spec in part.specs)
    export.refuse_full_disk(job.out, sum(spec.nbytes for spec in specs), source)
    with Workspace(job.out, identity, restart) as work, torch.inference_mode():
        writer = ShardWriter(work.folder, [Shard(DATA_FILE, specs, bare=True)], resumed=resuming.resumed(work))
        with resuming.unwritten(work, parts, lambda part: sum(spec.nbytes for spec in part.specs),
                                writer.sync) as left:
            for done, part in left:
                step(done, len(parts), part.tensor or part.specs[0].name)
                _write(part, writer)
        step(len(parts), len(parts), "naming and hashing the files")
        export.name_files(work, writer)
        storage.write(work.folder / genai.MODEL_FILE, job.graph.serialized(writer.place))
        places = {DATA_FILE: [(spec.name, *writer.place(spec.name)) for spec in specs]}
        names = [*writer.names, genai.MODEL_FILE]
        result = export.finish(work, source, names, job.extra_files, _record(job), genai.LOADERS, places)
    return export.told(source, job.out, result, len(source.schemes), _checked(source), _notes(source))


def _write(part: Part, writer: ShardWriter) -> None:
    """Write the tensors of a part and compare what lies in the file with them and with the source."""
    tensors = part.load()
    for spec, tensor in zip(part.specs, tensors, strict=True):
        writer.write(spec.name, tensor)
    again = [writer.read_back(spec.name) for spec in part.specs]
    equal = all(same_bits(one, other) for one, other in zip(again, tensors, strict=True))
    del tensors
    if not equal or not part.check(again):
        raise VerificationError(f"{part.specs[0].name}: what was read back from {writer.folder} differs from the "
                                "source; the disk or the memory of this machine may be faulty")


def _record(job: OnnxExport) -> dict[str, Any]:
    source = job.source
    sizes = Counter[str]()
    for part in job.graph.parts:
        sizes[part.tensor.removesuffix(".weight")] += sum(spec.nbytes for spec in part.specs)
    return export.record(source, job.record, NAME, sizes, sizes.total(), [], **job.settings)


def _checked(source: Source) -> str:
    if source.schemes:
        return "lossless: every quantized weight was decoded from both and compared bit for bit"
    return "lossless: every tensor was read back and compared"


def _notes(source: Source) -> list[str]:
    widened = Counter((scheme.bits, weights.STORED_BITS[scheme.bits]) for scheme in source.schemes.values()
                      if weights.STORED_BITS[scheme.bits] != scheme.bits)
    notes = [f"{count} linears of {bits} bits take {stored} bits per weight here: MatMulNBits has 2, 4 and 8"
             for (bits, stored), count in sorted(widened.items())]
    if not (source.directory / "tokenizer.json").is_file():
        notes.append("there is no tokenizer.json, the only tokenizer file that onnxruntime-genai reads; transformers "
                     "makes one: AutoTokenizer.from_pretrained(MODEL).save_pretrained(OUT)")
    return notes
