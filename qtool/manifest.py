"""manifest.json: what was made of what, and how well. It is also what a resumed run is compared with.

No times, no paths of the machine: the same input gives the same manifest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qtool import storage
from qtool.errors import CheckpointError, OutputError, printable
from qtool.files import read_limited

NAME = "manifest.json"
SCHEMA = 1
MAX_BYTES = 256 << 20
SEAL, NO_SEAL = "sha256", "0" * 64  # the last key of the file, and what it is while its value is computed
SEAL_PLACE = slice(-68, -4)  # in the bytes of the file: before a quote, a bracket and two ends of lines
ARITHMETIC = "arithmetic"  # what the last bits of products depend on, null where none are taken (arithmetic.py)


def identity(version: str, source: dict[str, Any], recipe: dict[str, Any], calibration: dict[str, Any] | None,
             versions: dict[str, str], arithmetic: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that decides the output bytes. Two runs with equal identities write equal files."""
    return {"schema": SCHEMA, "qtool": version, "source": source, "recipe": recipe, "calibration": calibration,
            "versions": versions, ARITHMETIC: arithmetic}


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """The fields in which two identities differ, as 'recipe.scheme.bits: 4 -> 3'."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for name in sorted({*before, *now})
                for line in differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)]
    return [] if before == now else [f"{key}: {_short(before)} -> {_short(now)}"]


def refuse_other_run(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise OutputError, field by field, when an unfinished run is not this run."""
    changed = differences(before, now)
    if changed:
        raise OutputError(f"{folder} holds an unfinished run of something else:\n  " + "\n  ".join(changed[:20])
                          + "\nGive the same command as before to go on with it, another --out to keep it, "
                            "or --restart to discard it")


def totals(layers: list[dict[str, Any]], parameters: int, weight_bytes: int, source_bytes: int) -> dict[str, Any]:
    """Sizes over the whole checkpoint; bits per weight over the quantized linears, scales and zero points included."""
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    bits = 8 * sum(layer["bytes"] for layer in layers) / weights if weights else None
    return {"parameters": parameters, "weight_bytes": weight_bytes, "source_bytes": source_bytes,
            "quantized_weights": weights, "bits_per_weight": None if bits is None else round(bits, 4)}


def errors(layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Median and worst error over the layers: of the outputs, else of the weights; None where neither is known."""
    for key, of in (("relative_error", "outputs' energy"), ("weight_error", "weights' energy")):
        known = sorted((layer[key], layer["name"]) for layer in layers if layer[key] is not None)
        if known:
            worst, name = known[-1]
            return {"of": of, "median": known[len(known) // 2][0], "worst": worst, "worst_name": name}
    return None


def file_hash(path: Path) -> str:
    """sha256, hexadecimal, of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, manifest: dict[str, Any]) -> None:
    """Write beside, then rename, so that a manifest is never half there. Its last key is its seal."""
    text = _text({**manifest, SEAL: NO_SEAL}).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    storage.write(folder / NAME, text[:SEAL_PLACE.start] + digest + text[SEAL_PLACE.stop:])


def wrong_seal(folder: Path) -> str | None:
    """Why the manifest is not as it was written, or None. Its seal is the sha256 of its bytes with zeros there."""
    path = folder / NAME
    data = path.read_bytes()
    blank = data[:SEAL_PLACE.start] + NO_SEAL.encode() + data[SEAL_PLACE.stop:]
    if not data[:SEAL_PLACE.start].endswith(f'"{SEAL}": "'.encode()) or data[SEAL_PLACE.stop:] != b'"\n}\n':
        return (f"{path}: has no {SEAL} of its own at its end; it is damaged, was changed, or an older qtool wrote it: "
                "then the command that made the output makes it anew")
    if hashlib.sha256(blank).hexdigest().encode() != data[SEAL_PLACE]:
        return (f"{path}: is not as it was written (its bytes do not have the {SEAL} at its end), so nothing can be "
                "held against it; fetch it again, or make the output anew")
    return None


def load(folder: Path) -> dict[str, Any]:
    """The manifest of a finished output. Raises CheckpointError."""
    path = Path(folder) / NAME
    try:
        data = json.loads(read_limited(path, MAX_BYTES).decode("utf-8"))
        _text(data).encode()  # NaN, infinity and halves of characters, which no one writes
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else printable(str(error))
        raise CheckpointError(f"{path} cannot be read: {why}; was this directory written by qtool?") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: not a manifest of schema {SCHEMA}; was this directory written by qtool?")
    data.pop(SEAL, None)
    from qtool import manifest_schema  # needs pydantic, and half as long as a small export

    wrong = manifest_schema.complaint(data)
    if wrong:
        raise CheckpointError(f"{path}: {wrong}; the manifest is damaged, fetch it again or make the output anew")
    return data


def write_beside(folder: Path, companions: Iterable[Path], files: Mapping[str, Any]) -> set[str]:
    """What a model has beside its weights: copies of its small files, and JSON files; returns the names."""
    names = set(files)
    for path in companions:
        shutil.copyfile(path, folder / path.name)
        names.add(path.name)
    for name, content in files.items():
        write_json(folder / name, content)
    return names


def write_json(path: Path, data: Any) -> None:
    """Deterministic JSON, durable before it has its name.

    NaN and Infinity, which configs may have (time_step_limit of Mamba 2), go over.
    """
    storage.write(path, _text(data, allow_nan=True).encode())


def _text(data: Any, allow_nan: bool = False) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
