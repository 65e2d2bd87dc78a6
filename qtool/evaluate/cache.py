"""The exits of a model on a text, kept between evaluations: the base of many quantized models runs once.

A file is named by the hash of everything that its bytes depend on: the files of the model, how its linears are stored,
the tokens, what computes and in which type. Kept are the hidden states after the last block as they were computed, not
logits: these follow from them exactly and are many times larger. A file is a safetensors file with one tensor and the
sha256 of its bytes; it is written aside and renamed, and one that is not whole counts for none.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qtool
from qtool import ops
from qtool.decode import Source
from qtool.evaluate.predictions import Exits, Setting
from qtool.files import expanded, open_regular
from qtool.models.streams import StreamStore
from qtool.tensors import NAMES_OF_DTYPES

FOLDER = Path("~/.cache/qtool/exits")
NAME = "exits"


@dataclass
class Cache:
    """folder: None keeps nothing.  used: whether the last exits came from a file.  trouble: why none was written."""

    folder: Path | None
    used: bool = False
    trouble: str | None = None

    def exits(self, key: str, empty: Callable[[], StreamStore], run: Callable[[], Exits | None]) -> Exits | None:
        """Those of `key`: from its file, into a store that `empty` makes, else those of `run`, which are then kept."""
        if self.folder is None:
            return run()
        path = expanded(self.folder) / f"{key}.safetensors"
        found = load(path, key, empty)
        self.used = found is not None
        if found is not None:
            return found
        exits = run()
        if exits is not None:
            try:
                save(path, key, exits)
            except OSError as error:
                self.trouble = f"{path}: {error.strerror or error}"
        return exits


def key(source: Source, tokens: str, setting: Setting) -> str:
    """The hash that names the exits of `source` on tokens with this sha256. Reads all of its files."""
    device = setting.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    facts = {
        "files": source.hashes(), "schemes": {name: one.model_dump() for name, one in sorted(source.schemes.items())},
        "tokens": tokens, "shape": list(setting.ids.shape), "dtype": str(setting.dtype),
        "device": [device.type, machine], "threads": torch.get_num_threads(), "ops": ops.backend(),
        "qtool": qtool.__version__, "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save(path: Path, name: str, exits: Exits) -> None:
    """Write the exits of key `name`; `path` appears only when complete. Raises OSError.

    Until then a part is locked; one that is not was left by a process that was killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob("*.part"):
        _remove_unlocked(old)
    header = _header(exits.store, name, exits.as_tuple, _digest(exits.store))
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(len(header).to_bytes(8, "little") + header)
            for window in range(exits.store.shape[0]):
                file.write(_row(exits.store, window))
            file.flush()
            os.fsync(file.fileno())
            Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)


def _remove_unlocked(part: Path) -> None:
    with suppress(OSError), part.open("rb") as file:  # gone, or locked
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_size:  # an empty one may be about to be locked
            part.unlink()


def load(path: Path, name: str, empty: Callable[[], StreamStore]) -> Exits | None:
    """What `save` wrote for key `name`; None where there is no such file, or it is not whole."""
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            told = json.loads(file.read(size)) if size < 1 << 16 else {}
            about = told.get("__metadata__", {})
            store, as_tuple = empty(), about.get("as_tuple") == "True"
            header = _header(store, name, as_tuple, about.get("sha256", ""))
            whole = 8 + len(header) + store.shape[0] * store.row_bytes
            if told != json.loads(header) or os.fstat(file.fileno()).st_size != whole:
                return None
            seen = hashlib.sha256()
            for window in range(store.shape[0]):
                tensor = torch.empty((1, *store.shape[1:]), dtype=store.dtype)
                file.readinto(memoryview(tensor.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                store.write(slice(window, window + 1), tensor)
                seen.update(_row(store, window))
    except (OSError, ValueError, AttributeError, RecursionError):  # not there, or no such file
        return None
    return Exits(store, as_tuple) if seen.hexdigest() == about["sha256"] else None


def _header(store: StreamStore, name: str, as_tuple: bool, digest: str) -> bytes:
    entry = {"dtype": NAMES_OF_DTYPES[store.dtype], "shape": list(store.shape),
             "data_offsets": [0, store.shape[0] * store.row_bytes]}
    about = {"key": name, "as_tuple": str(as_tuple), "sha256": digest}
    return json.dumps({"__metadata__": about, NAME: entry}, separators=(",", ":")).encode()


def _digest(store: StreamStore) -> str:
    seen = hashlib.sha256()
    for window in range(store.shape[0]):
        seen.update(_row(store, window))
    return seen.hexdigest()


def _row(store: StreamStore, window: int) -> Any:
    """The bytes of one window."""
    tensor = store.read(slice(window, window + 1)).contiguous()
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
