"""Reading and writing checkpoints: safetensors directories, Hub repositories, GGUF files."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from qtool.checkpoint.reader import WHY_NO_PICKLE, Checkpoint, is_pickle, open_directory
from qtool.errors import CheckpointError, printable
from qtool.files import expanded

__all__ = ["Checkpoint", "open_checkpoint"]

MAX_NAME = 4000  # characters; Linux takes paths of 4096 bytes
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(model: str, revision: str | None = None, work_dir: Path | None = None,
                    gguf_dtype: torch.dtype | None = None) -> Checkpoint:
    """Open a directory, a .gguf file, or a Hub repository org/name or org/name@revision. Raises CheckpointError.

    work_dir: where config and tokenizer of a GGUF file are unpacked; None is a temporary folder.  gguf_dtype: what
    its tensors are read as; float32 holds what its blocks say (a dtype in which such models are kept).
    """
    path = expanded(model)
    if len(model) > MAX_NAME:
        raise CheckpointError(f"{printable(model)}: too long to be a path or a Hub id")
    if path.is_dir() or path.is_file():
        if revision is not None:
            raise CheckpointError(f"{model}: a revision ({revision}) goes with a Hub id; this is a path, leave it out")
        if path.is_dir():
            path = _only_gguf(path) or path
        if path.is_dir():
            return open_directory(path)
        if path.suffix.lower() == ".gguf":
            from qtool.checkpoint.gguf_file import open_gguf  # needs transformers

            return open_gguf(path, work_dir, gguf_dtype)
        if is_pickle(path.name):
            raise CheckpointError(f"{model}: holds pickled weights, and {WHY_NO_PICKLE}")
        raise CheckpointError(f"{model}: is a file, but not a .gguf file; for safetensors give the folder that holds "
                              "it and config.json")
    if path.is_symlink() or path.exists():
        what = "a link that leads nowhere" if path.is_symlink() else "neither a file nor a folder"
        raise CheckpointError(f"{model}: is {what}; give the folder of a model, a .gguf file or a Hub id")
    repository, at, tag = model.partition("@")
    if model.endswith(".gguf") or not HUB_ID.fullmatch(repository) or (at and not tag):
        raise CheckpointError(f"{model}: no such file or folder, and not a Hub id (org/name or org/name@revision)")
    if tag and revision is not None and tag != revision:
        raise CheckpointError(f"{model}: two revisions are given, {tag} and {revision}; give one")
    from qtool.checkpoint.hub import open_repository  # needs huggingface_hub

    return open_repository(repository, tag or revision)


def local_gguf(model: str) -> Path | None:
    """The .gguf file that open_checkpoint would open; None for all else, and for what is no path."""
    if len(model) > MAX_NAME:
        return None
    path = expanded(model)
    if path.is_dir():
        return _only_gguf(path)
    return path if path.is_file() and path.suffix.lower() == ".gguf" else None


def _only_gguf(folder: Path) -> Path | None:
    """The .gguf file of a directory that holds no other checkpoint, as `quantize --method q4_k_m` writes it."""
    files = sorted(folder.glob("*.gguf"))
    other = (folder / "config.json").exists() or any(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 and not other else None
