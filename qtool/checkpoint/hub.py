"""Repositories of the Hugging Face Hub as a source.

The revision is resolved to a commit, so that nothing can change underneath a run. Config, tokenizer and the headers of
the shards come first; a shard is downloaded when its first tensor is read. Tokens, cache folder and offline mode are
huggingface_hub's own settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors

from qtool.checkpoint.header import Placed, check_entries, read_header, read_json
from qtool.checkpoint.reader import (
    INDEX,
    MAX_COMPANION_BYTES,
    Checkpoint,
    Stored,
    companion_names,
    fetcher,
    open_directory,
    place,
    read_config,
    refuse_unlisted,
    shard_names,
)
from qtool.checkpoint.tensor_io import sha256_file
from qtool.errors import CheckpointError, printable

MALFORMED = (errors.SafetensorsParsingError, errors.NotASafetensorsRepoError, TypeError, AttributeError, ValueError,
             KeyError, RecursionError)
UNREACHABLE = (errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Repository:
    """A repository at one commit. files: name -> (bytes, sha256 where the Hub knows it), top folder only."""

    name: str
    commit: str
    files: dict[str, tuple[int, str | None]]

    @property
    def origin(self) -> str:
        return f"{self.name}@{self.commit}"

    def download(self, file: str) -> Path:
        """The local path of a file; downloaded into the cache if it is not there. Raises CheckpointError."""
        with _explained(self.name, self.commit, file):
            return Path(huggingface_hub.hf_hub_download(self.name, file, revision=self.commit))


def open_repository(name: str, revision: str | None) -> Checkpoint:
    """Open org/name at a branch, tag or commit; without network, as it is in the cache. Raises CheckpointError."""
    with _explained(name, revision, None):
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        except errors.HfHubHTTPError:
            raise  # an answer, though a refusal
        except UNREACHABLE as error:
            return _open_cached(name, revision, _short(error))
    files = {one.rfilename: (one.size or 0, one.lfs.sha256 if one.lfs else None) for one in info.siblings or []
             if "/" not in one.rfilename}
    repository = Repository(name, str(info.sha), files)
    if "config.json" not in files:
        raise CheckpointError(f"{repository.origin}: has no config.json in its top folder; choose a repository that "
                              "holds the model in transformers' format")
    folder = repository.download("config.json").parent
    config = read_config(folder)
    index = read_json(repository.download(INDEX)) if INDEX in files else None
    shards = shard_names(sorted(files), index, repository.origin)
    for file in companion_names(sorted(files)):
        if files[file][0] <= MAX_COMPANION_BYTES:
            repository.download(file)
    headers = {file: _header(repository, file) for file in shards}
    stored = place(headers, index, repository.origin)
    refuse_unlisted(sorted(files), shards, index, lambda file: _header(repository, file), repository.origin)
    hashed = [*shards, "config.json", *([INDEX] if index else [])]
    return Checkpoint(
        origin=repository.origin, name=name.split("/")[-1], kind="hub", config=config, directory=folder,
        specs={tensor: where.spec for tensor, where in stored.items()}, fetch=_fetcher(repository, stored),
        hash_files=lambda: {file: files[file][1] or sha256_file(repository.download(file)) for file in hashed},
    )


def _header(repository: Repository, file: str) -> Placed:
    """The tensors of a shard, from the cache or from the first bytes of the remote file (then without offsets)."""
    cached = huggingface_hub.try_to_load_from_cache(repository.name, file, revision=repository.commit)
    if isinstance(cached, str):
        return read_header(Path(cached))
    where = f"{repository.origin}/{file}"
    with _explained(repository.name, repository.commit, file):
        try:
            remote = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                repository.name, file, revision=repository.commit)
        except MALFORMED as error:
            raise CheckpointError(f"{where}: has no valid safetensors header: {printable(str(error))}; choose another "
                                  "revision") from None
    entries: dict[str, Any] = {tensor: {"dtype": one.dtype, "shape": one.shape, "data_offsets": list(one.data_offsets)}
                               for tensor, one in remote.tensors.items()}
    end = max((entry["data_offsets"][-1] for entry in entries.values() if entry["data_offsets"]), default=0)
    return check_entries(entries, end, where)


def _fetcher(repository: Repository, announced: dict[str, Stored]) -> Callable[..., torch.Tensor]:
    """Reads from local shards; a shard comes into the cache, and is checked, when its first tensor is asked for."""
    readers: dict[str, Callable[..., torch.Tensor]] = {}

    def fetch(name: str, start: int | None, stop: int | None) -> torch.Tensor:
        file = announced[name].file
        if file not in readers:
            path = repository.download(file)
            found = read_header(path)
            if {tensor: spec for tensor, (spec, _) in found.items()} != {
                    tensor: where.spec for tensor, where in announced.items() if where.file == file}:
                raise CheckpointError(f"{path}: holds other tensors than the Hub announced for {repository.origin}; "
                                      "remove it from the cache, so that it is downloaded again")
            stored = {tensor: Stored(spec, file, offset) for tensor, (spec, offset) in found.items()}
            readers[file] = fetcher(stored, {}, lambda _: path)
        return readers[file](name, start, stop)
    return fetch


def _open_cached(name: str, revision: str | None, why: str) -> Checkpoint:
    """What an earlier download left in the cache for this revision."""
    try:
        path = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, local_files_only=True)
    except (OSError, errors.HFValidationError):
        raise CheckpointError(f"{name}: the Hub cannot be reached ({why}), and the cache does not hold "
                              f"{revision or 'this repository'}; check the network, or give a local folder") from None
    folder = Path(path).parent
    return dataclasses.replace(open_directory(folder), origin=f"{name}@{folder.name}", name=name.split("/")[-1],
                               kind="hub")


@contextmanager
def _explained(name: str, revision: str | None, file: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a CheckpointError that says what to do."""
    where = f"{name}{f'@{revision}' if revision else ''}{f'/{file}' if file else ''}"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(f"{where}: this model is gated; accept its conditions at https://huggingface.co/{name}, "
                              "then log in with: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{where}: the repository has no revision '{revision}'; see its branches and tags at "
                              f"https://huggingface.co/{name}/tree/main") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{where}: no such folder here, and no such repository on the Hub; check the name, or "
                              "log in with 'hf auth login' if it is private") from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{where}: the file is not in the repository, or not in the cache while offline; go "
                              "online, or choose another revision") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{where}: not a Hub id: {printable(str(error))}; write it as org/name") from None
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{where}: the Hub refused: {_short(error)}; try again later, or give a local "
                              "folder") from None
    except UNREACHABLE as error:
        raise CheckpointError(f"{where}: the Hub cannot be reached: {_short(error)}; check the network, or give a "
                              "local folder") from None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be downloaded: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return printable(" ".join(str(error).split()), 300) or type(error).__name__
