"""Uploads a finished output, with its model card, to a repository of the Hugging Face Hub.

Only files that the manifest knows, and only as it knows them: their hashes are checked first. huggingface_hub skips
what the repository has already, so the same command goes on after an interruption. The token is its own setting.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from qtool import manifest
from qtool.checkpoint import HUB_ID
from qtool.checkpoint.hub import UNREACHABLE
from qtool.errors import InputError, RunError, VerificationError
from qtool.workspace import SCRATCH

CARD = "README.md"


def refuse_bad_name(repository: str) -> None:
    """Raise InputError for what is no NAMESPACE/NAME."""
    try:
        validate_repo_id(repository)
    except errors.HFValidationError as error:
        raise InputError(f"--push-to {repository}: {' '.join(str(error).split())}") from None
    if not HUB_ID.fullmatch(repository):
        raise InputError(f"--push-to {repository}: write it as NAMESPACE/NAME, your user name or organization first")


def verified(folder: Path) -> list[str]:
    """The names of the files of a finished output, each as its manifest has it.

    Raises InputError where qtool has finished nothing, VerificationError where a file is not what was written.
    """
    unfinished = folder.with_name(folder.name + ".partial")
    if any((folder / name).exists() for name in SCRATCH) or (unfinished.is_dir() and not folder.is_dir()):
        raise InputError(f"{folder} is not finished; give the command that makes it again, it goes on where it stopped")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --push-to uploads a directory that qtool wrote")
    record = manifest.load(folder)
    if record.get("several"):
        raise InputError(f"{folder} holds several outputs; push one of them: {folder / record['several'][0]}")
    changed = manifest.wrong_seal(folder)
    if changed:
        raise VerificationError(f"{changed}; nothing was uploaded")
    known: Mapping[str, str] = record["outputs"]
    wrong = [name for name in sorted(known) if not _is(folder / name, known[name])]
    if wrong:
        raise VerificationError(f"{folder}: {', '.join(wrong)} is missing, or not what was written; "
                                f"nothing was uploaded; see: qtool inspect {folder} --verify")
    return sorted({*known, manifest.NAME})


def push(folder: Path, repository: str, private: bool, quiet: bool = True) -> dict[str, Any]:
    """Upload a finished output; the repository is made if it is not there. Returns what `--json` prints.

    Raises InputError and VerificationError as above, RunError for what the Hub or the network says. Progress is
    huggingface_hub's own, none if quiet.
    """
    refuse_bad_name(repository)
    names = verified(folder)
    if quiet:
        disable_progress_bars()
    api = huggingface_hub.HfApi()
    with _explained(folder, repository):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise InputError(f"{repository} is there and public; leave --private out, make it private in its settings, "
                             "or choose another name")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with qtool",
                                   allow_patterns=[glob.escape(name) for name in names])
    return {"repository": repository, "url": str(url), "commit": commit.oid, "private": private, "files": names}


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and manifest.file_hash(path) == digest


@contextmanager
def _explained(folder: Path, repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a RunError that says what to do."""
    again = f"then: qtool export {folder} --push-to {repository}, which uploads what is missing"
    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise RunError(f"{repository}: no token of the Hub is set; log in with 'hf auth login', {again}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = {401: "log in with 'hf auth login' and a token that may write",
                  403: f"use a token that may write to {repository.partition('/')[0]}"}.get(status, "try again later")
        raise RunError(f"{repository}: the Hub refused ({status}: {_short(error)}); {remedy}, {again}") from None
    except UNREACHABLE as error:
        raise RunError(f"{repository}: the Hub cannot be reached: {_short(error)}; check the network, "
                       f"{again}") from None
    except OSError as error:
        raise RunError(f"{repository}: the upload failed: {_short(error)}; {again}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
