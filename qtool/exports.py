"""Which exporter writes what `qtool export --to` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import begun, console, found, heap
from qtool.errors import InputError
from qtool.files import expanded


@dataclass(frozen=True)
class Wanted:
    """The options of `qtool export` that say what to write; None: not given."""

    to: str
    out: Path | None = None
    requantize: str | None = None
    type: str | None = None
    imatrix: Path | None = None
    accuracy_level: int | None = None
    dtype: str | None = None
    calibration: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    device: str | None = None
    restart: bool = False


APART = ("gguf", "imatrix", "onnx", "text")  # targets that no format of weights alone can be
RUN = ("imatrix", "text")  # targets that run the model
# option, the field of Wanted, the targets that it is for
ONLY_FOR = (("--type", "type", ("gguf",)), ("--imatrix", "imatrix", ("gguf",)),
            ("--accuracy-level", "accuracy_level", ("onnx",)), ("--dtype", "dtype", ("onnx",)),
            ("--calibration", "calibration", ("imatrix",)), ("--samples", "samples", RUN),
            ("--sequence-length", "sequence_length", RUN), ("--device", "device", RUN))


def exported(path: str, wanted: Wanted, quiet: bool) -> dict[str, Any]:
    """Write it and return what `--json` prints. Raises InputError for options of another target."""
    for name, field, targets in ONLY_FOR:
        if getattr(wanted, field) is not None and wanted.to not in targets:
            raise InputError(f"{name} is for --to {' or '.join(targets)}, not {wanted.to}; leave it out")
    if wanted.requantize is not None:
        return _requantized(path, wanted, wanted.requantize, quiet)
    with console.working(f"reading {path}", quiet):
        heap.reuse()  # before there are threads, which would get heaps of their own
        begun.begin(expanded(path))
        module, job = _made(path, wanted)
    heap.settle()
    for text in job.lost:
        console.note(f"note: {text}", quiet)
    with console.steps("exporting", quiet) as step:
        result: dict[str, Any] = module.run(job, step, wanted.restart)
    return result


def _made(path: str, wanted: Wanted) -> tuple[Any, Any]:
    """The exporter and its job; the others are not imported, which would take longer than many an export."""
    from qtool.checkpoint import local_gguf

    if wanted.to == "gguf" and (file := local_gguf(path)) is not None:
        from qtool import retype

        job = retype.make_export(file, wanted.type, wanted.out, wanted.imatrix)
        if job is not None:
            return retype, job
    from qtool.decode import open_model

    if wanted.to not in APART:
        found.load("formats", wanted.to, APART)  # an unknown one is told before the checkpoint is read
    source = open_model(path)
    if wanted.to == "gguf":
        from qtool import export_gguf

        return export_gguf, export_gguf.make_export(source, wanted.type, wanted.out, wanted.imatrix)
    if wanted.to == "onnx":
        from qtool import export_onnx

        return export_onnx, export_onnx.make_export(source, wanted.out, wanted.accuracy_level, wanted.dtype)
    if wanted.to == "imatrix":
        from qtool import export_imatrix

        return export_imatrix, export_imatrix.make_export(source, wanted.out, wanted.calibration, wanted.samples,
                                                          wanted.sequence_length, wanted.device or "auto")
    if wanted.to == "text":
        from qtool import export_text

        return export_text, export_text.make_export(source, wanted.out, wanted.samples, wanted.sequence_length,
                                                    wanted.device or "auto")
    from qtool import export

    return export, export.make_export(source, wanted.to, wanted.out)


def _requantized(path: str, wanted: Wanted, how: str, quiet: bool) -> dict[str, Any]:
    with console.working(f"reading {path}", quiet):
        from qtool import requantize
        from qtool.decode import open_model

        job = requantize.make(open_model(path), wanted.to, how, wanted.out)
    with console.progress(quiet) as progress:
        return requantize.run(job, progress, wanted.restart)
