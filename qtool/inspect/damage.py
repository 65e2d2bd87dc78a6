"""Whether the files of an output are those that were written, before anything in them is believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool import digests, keeping, manifest
from qtool.errors import CheckpointError, InputError, VerificationError
from qtool.files import expanded
from qtool.inspect import graph
from qtool.inspect.files import Step, no_steps
from qtool.onnx_graph.builder import DATA_FILE

SHOWN = 3  # damaged tensors of a file


def damage(path: str, step: Step = no_steps) -> list[str]:
    """What differs from the manifest beside `path` (a directory or a .gguf file), one sentence a file: the manifest
    itself, files that are missing, changed (with the tensors), or that it does not know. A GGUF file is held against
    the sha256 that it carries. Nothing is known of files that qtool did not write. Raises VerificationError for a
    manifest that says nothing about the other files, as it is not what was written; CheckpointError.
    """
    place = expanded(path)
    alone = place.suffix.lower() == ".gguf" and place.is_file()
    folder = place.parent if alone else place
    problems = [text for file in ([place] if alone else sorted(folder.glob("*.gguf"))) for text in _wrong_seal(file)]
    if not (folder / manifest.NAME).is_file():
        return problems
    unsealed = manifest.wrong_seal(folder)
    known = None if unsealed else manifest.load(folder)
    if alone and known is not None and place.name not in known["outputs"]:
        return problems  # a file beside another one's manifest
    if unsealed and (not alone or place.name.encode() in (folder / manifest.NAME).read_bytes()):
        raise VerificationError(unsealed)
    return [*_changed(folder, known, step), *_unknown(folder, known), *problems] if known is not None else problems


def _wrong_seal(file: Path) -> list[str]:
    from qtool.checkpoint import gguf_seal
    from qtool.checkpoint.gguf_header import read_gguf_header

    try:
        found = gguf_seal.wrong(file, read_gguf_header(file))
    except CheckpointError as error:
        found = str(error)
    return [found] if found else []


def _changed(folder: Path, record: Mapping[str, Any], step: Step) -> list[str]:
    problems, kept = [], _statistics(folder, record)
    files = {**record["outputs"], **kept}
    for done, (name, meant) in enumerate(files.items()):
        step(done, len(files), name)
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: is in the manifest, but not there")
            continue
        digest, inside = digests.of_file(path, _places(path))
        if digest != meant:
            problems.append(f"{path}: is not as it was written (its sha256 differs from the manifest's)"
                            + _where(inside, {} if name in kept else record.get("tensors") or {}))
    return problems


def _statistics(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The files that --keep-statistics made; all of them may have been removed."""
    files = (record.get("statistics") or {}).get("files", {}) if (folder / keeping.FOLDER).is_dir() else {}
    return {f"{keeping.FOLDER}/{name}": digest for name, digest in files.items()}


def _places(path: Path) -> digests.Places:
    """Of the tensors in a file; () where it cannot be told, which opening the file will say."""
    try:
        if path.name != DATA_FILE:
            return digests.places(path)
        opened = graph.open_graph(str(path.parent))
        return [(name, one.offset, one.nbytes) for name, one in opened.placed.items() if one.file == path.name]
    except (CheckpointError, InputError):
        return ()


def _where(inside: Mapping[str, str], known: Mapping[str, str]) -> str:
    wrong = [name for name, digest in inside.items() if known.get(name) != digest]
    if not wrong or not known:
        return ""
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f", in {', '.join(wrong[:SHOWN])}{more}"


def _unknown(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Files that are not in the manifest. Those with a dot before their names are other programs' (git, the Hub)."""
    known = {*record["outputs"], *_statistics(folder, record), manifest.NAME}
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return [f"{folder / name}: is not in the manifest; a loader may take it for a part of the model: remove it"
            for name in names if name.as_posix() not in known and not any(one.startswith(".") for one in name.parts)]
