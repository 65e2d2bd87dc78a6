"""A checkpoint that is read one tensor at a time, and the directories of safetensors files that most are."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtool.checkpoint.config import checked
from qtool.checkpoint.header import Placed, read_header, read_json
from qtool.checkpoint.tensor_io import read_tensor, sha256_files
from qtool.errors import CheckpointError, printable
from qtool.tensors import FLOATING, TensorSpec, all_finite

INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 16 << 20
SHARD_OF = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# Small files that belong to the model, in lower case. Never code, weights or the model card.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "*.model", "chat_template*", "generation_config.json", "*processor_config.json", "license*", "licence*", "notice*",
    "use_policy*", "*.jinja",
)
NO_COMPANION = ("*.py", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")
MAX_COMPANION_BYTES = 256 << 20
NOT_THE_MODEL = ("adapter_model*", "consolidated*", "optimizer*")  # safetensors files beside the model's own
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "model*.bin", "*.pkl", "*.pickle")
WHY_NO_PICKLE = ("unpickling can run any code that someone put into the file; use a safetensors version of this model, "
                 "or convert it where you trust it, with transformers: "
                 "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)")


@dataclass
class Checkpoint:
    """A source of tensors under their Hugging Face names.

    origin: what identifies it, a path or org/name@commit.  name: a short name for output directories.
    kind: safetensors, hub or gguf.  config: config.json.  directory: a local folder with config and tokenizer.
    specs: every tensor, sorted by name, with the shape and dtype in which `read` returns it.
    block_types: of a GGUF file, weight -> (its type such as q4_k, bytes), where it is quantized.
    fetch_blocks: of a GGUF file, its blocks as they are stored: uint8 [rows, bytes of a row].
    """

    origin: str
    name: str
    kind: str
    config: dict[str, Any]
    directory: Path
    specs: dict[str, TensorSpec]
    fetch: Callable[[str, int | None, int | None], torch.Tensor]  # name, first row, row after the last; None: all rows
    hash_files: Callable[[], dict[str, str]]
    release: Callable[[], None] | None = None
    block_types: dict[str, tuple[str, int]] = field(default_factory=dict)
    fetch_blocks: Callable[[str], torch.Tensor] | None = None
    _hashes: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, contiguous on the CPU, in its stored dtype; from any thread. Raises CheckpointError."""
        self._spec(name)
        return self.fetch(name, None, None)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop (exclusive) of a tensor; the others are not read where that is possible."""
        spec = self._spec(name)
        if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
            raise CheckpointError(f"{self.origin}: tensor '{name}' {list(spec.shape)} has no rows {start} to {stop}")
        return self.fetch(name, start, stop)

    @property
    def published(self) -> str | None:
        """org/name@commit of a Hub repository; None for local files, as where these lie is no part of their bytes."""
        return self.origin if self.kind == "hub" else None

    def companions(self) -> list[Path]:
        """The small files that go with the model into every copy of it, sorted by name."""
        names = companion_names(sorted(path.name for path in files_in(self.directory)))
        return [path for path in (self.directory / name for name in names)
                if path.stat().st_size <= MAX_COMPANION_BYTES]

    def hashes(self) -> dict[str, str]:
        """File name -> sha256 of the weights, their index and the config; computed once."""
        if not self._hashes:
            self._hashes = self.hash_files()
        return self._hashes

    def close(self) -> None:
        """Remove temporary files. The checkpoint cannot be read afterwards."""
        if self.release is not None:
            self.release()

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise CheckpointError(f"{self.origin}: there is no tensor '{name}' in this checkpoint")
        return self.specs[name]


def refuse_non_finite(origin: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself. Raises CheckpointError where a value of it is NaN or infinite."""
    if tensor.dtype in FLOATING and not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{origin}: {name}: {bad} of {tensor.numel()} values are NaN or infinite; download the "
                              "file again")
    return tensor


@dataclass(frozen=True)
class Stored:
    """Where the bytes of one tensor lie: a file name and the absolute offset in that file."""

    spec: TensorSpec
    file: str
    offset: int


def open_directory(directory: Path) -> Checkpoint:
    """A directory of safetensors files, with or without index. Reads every header; raises CheckpointError."""
    present = sorted(path.name for path in files_in(directory))
    refuse_links_outside(directory, [name for name in present if name in ("config.json", INDEX)])
    config = read_config(directory)
    index = read_json(directory / INDEX) if INDEX in present else None
    files = shard_names(present, index, str(directory))
    refuse_links_outside(directory, [*files, *companion_names(present)])
    stamps = {name: _stamp(directory / name) for name in files}
    headers = {name: read_header(directory / name) for name in files}
    stored = place(headers, index, str(directory))
    refuse_unlisted(present, files, index, lambda name: read_header(directory / name), str(directory))
    hashed = {name: directory / name for name in [*files, "config.json", *([INDEX] if index else [])]}
    return Checkpoint(
        origin=str(directory), name=short_name(directory), kind="safetensors", config=config, directory=directory,
        specs={name: place.spec for name, place in stored.items()},
        fetch=fetcher(stored, stamps, lambda name: directory / name),
        hash_files=lambda: sha256_files(hashed),
    )


def files_in(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_file()]
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from None


def refuse_links_outside(directory: Path, names: Iterable[str]) -> None:
    """A file of a checkpoint may be a link within its directory, or into the blobs of the Hugging Face cache.

    Others could bring any file of this machine into the output, and from there to the Hub. Raises CheckpointError.
    """
    inside = directory.resolve()
    for name in names:
        target = (directory / name).resolve()
        cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not cached and not target.is_relative_to(inside):
            raise CheckpointError(f"{directory / printable(name)}: is a link that leads out of this directory, to "
                                  f"{printable(str(target))}; put the file itself there (cp -L) if you want it")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises CheckpointError."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: there is no config.json; give the folder that holds config.json and the "
                              ".safetensors files, a .gguf file, or a Hub id such as org/name")
    return checked(read_json(path, MAX_CONFIG_BYTES), str(path))


def is_pickle(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PICKLES)


def companion_names(names: Iterable[str]) -> list[str]:
    """Those names that are tokenizer, template, generation and licence files."""
    return [name for name in names if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in COMPANIONS)
            and not any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in NO_COMPANION)]


def shard_names(present: list[str], index: dict[str, Any] | None, where: str) -> list[str]:
    """The model's weight files among the file names `present`, sorted. Raises CheckpointError if one is missing."""
    if index is not None:
        listed = sorted(set(weight_map(index, where).values()))
        missing = [name for name in listed if name not in present]
        if missing:
            raise CheckpointError(f"{where}: {len(missing)} of {len(listed)} weight files in {INDEX} are missing: "
                                  f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; download them")
        return listed
    tensors = [name for name in present if name.endswith(".safetensors")]
    chosen = ([name for name in tensors if name == "model.safetensors"]
              or [name for name in tensors if fnmatch.fnmatchcase(name, "model*")]
              or [name for name in tensors if not any(fnmatch.fnmatchcase(name, other) for other in NOT_THE_MODEL)])
    if not chosen:
        raise CheckpointError(f"{where}: {_why_no_weights(present)}")
    _refuse_incomplete_series(chosen, where)
    return chosen


def weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """tensor name -> file name of an index, every file a plain name in the directory. Raises CheckpointError."""
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{where}/{INDEX}: has no weight_map; download the file again")
    for tensor, name in mapping.items():
        if (not isinstance(name, str) or not name.endswith(".safetensors") or name.startswith(".")
                or re.search(r"[/\\:\x00]", name)):
            raise CheckpointError(f"{where}/{INDEX}: tensor '{printable(tensor)}' lies in '{printable(str(name))}', "
                                  "which is not the name of a .safetensors file in this directory")
    return mapping


def place(headers: Mapping[str, Placed], index: dict[str, Any] | None, where: str) -> dict[str, Stored]:
    """Join the headers of all shards, sorted by tensor name; the index must agree. Raises CheckpointError."""
    stored: dict[str, Stored] = {}
    for file in sorted(headers):
        for name, (spec, offset) in headers[file].items():
            if name in stored:
                raise CheckpointError(f"{where}: tensor '{name}' is in two files, {stored[name].file} and {file}; "
                                      "remove the file that does not belong to this model")
            stored[name] = Stored(spec, file, offset)
    for name, file in (weight_map(index, where) if index is not None else {}).items():
        if name not in stored:
            raise CheckpointError(f"{where}/{INDEX}: tensor '{printable(name)}' should be in {file}, but is not; "
                                  "download the index and that file again")
        if stored[name].file != file:
            raise CheckpointError(f"{where}/{INDEX}: tensor '{name}' should be in {file}, but is in "
                                  f"{stored[name].file}; download the index and these files again")
    if not stored:
        raise CheckpointError(f"{where}: the weight files hold no tensors: {', '.join(sorted(headers))}")
    return dict(sorted(stored.items()))


def refuse_unlisted(present: list[str], files: list[str], index: dict[str, Any] | None,
                    header: Callable[[str], Placed], where: str) -> None:
    """With an index, a model*.safetensors with tensors that it does not list makes the checkpoint ambiguous."""
    if index is None:
        return
    for name in present:
        if fnmatch.fnmatchcase(name, "model*.safetensors") and name not in files and header(name):
            raise CheckpointError(f"{where}: {name} holds tensors, but {INDEX} does not list it; remove the file, or "
                                  "the index if it is out of date")


def fetcher(stored: Mapping[str, Stored], stamps: Mapping[str, tuple[int, int]],
            locate: Callable[[str], Path]) -> Callable[[str, int | None, int | None], torch.Tensor]:
    """A function (name, first row, row after the last) -> tensor. `locate` gives the local path of a weight file.

    stamps: size and modification time of files as their headers were read; a file that has changed since is refused.
    """
    def fetch(name: str, start: int | None, stop: int | None) -> torch.Tensor:
        spec, file, offset = stored[name].spec, stored[name].file, stored[name].offset
        if start is not None and stop is not None:
            offset += start * (spec.nbytes // max(1, spec.shape[0]))
            spec = TensorSpec(name, spec.dtype, (stop - start, *spec.shape[1:]))
        path = locate(file)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if file in stamps and stamps[file] != _stamp_of(os.fstat(descriptor)):
                    raise CheckpointError(f"{path}: was changed while the checkpoint was open; run the command again")
                tensor = read_tensor(descriptor, spec, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path}: tensor '{name}' cannot be read: {error.strerror}") from None
        if tensor is None:
            raise CheckpointError(f"{path}: ends inside tensor '{name}'; download the file again")
        return tensor
    return fetch


def short_name(directory: Path) -> str:
    """The folder's own name, but the repository's name for a folder of the Hugging Face cache."""
    path = directory.resolve()
    cached = re.fullmatch(r"models--.*?--(.+)", path.parent.parent.name) if path.parent.name == "snapshots" else None
    return cached[1] if cached else path.name or "model"


def _stamp(path: Path) -> tuple[int, int]:
    try:
        return _stamp_of(path.stat())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; download the file again") from None


def _stamp_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _refuse_incomplete_series(names: list[str], where: str) -> None:
    """Names such as model-00002-of-00003.safetensors tell how many files there should be."""
    series = [match for match in map(SHARD_OF.fullmatch, names) if match]
    for stem, count in sorted({(match[1], match[3]) for match in series}):
        wanted = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise CheckpointError(f"{where}: {len(missing)} of {len(wanted)} weight files are missing: "
                                  f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; download them")


def _why_no_weights(present: list[str]) -> str:
    pickles = [name for name in present if is_pickle(name)]
    if pickles:
        return f"only holds pickled weights ({pickles[0]}), and {WHY_NO_PICKLE}"
    if any(name.startswith("adapter_model") for name in present):
        return ("holds a LoRA adapter, not a model; merge it first, with peft: model.merge_and_unload(), then "
                "save_pretrained(folder)")
    gguf = [name for name in present if name.endswith(".gguf")]
    if gguf:
        return f"holds no .safetensors file; to use {gguf[0]}, give the path of that file"
    return "holds no .safetensors file; give a folder with the weights"
