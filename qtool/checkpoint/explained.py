"""What transformers and tokenizers raise for data that they cannot use, as a CheckpointError."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from huggingface_hub.errors import StrictDataclassError

from qtool.checkpoint.header import printable
from qtool.errors import CheckpointError

UNUSABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RuntimeError, OverflowError,
            MemoryError, AssertionError, ImportError, StrictDataclassError)


class Explained:
    """Use as a context: an error inside becomes "PATH: WHAT: why; REMEDY".

    No except clause could: the tokenizers library raises Exception itself, without a class of its own.
    """

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        self.path, self.what, self.remedy = path, what, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and (kind is Exception or isinstance(error, UNUSABLE)):
            why = printable(" ".join(str(error).split()), 300) or type(error).__name__
            raise CheckpointError(f"{self.path}: {self.what}: {why}; {self.remedy}") from None
