"""What transformers and tokenizers raise for data that they cannot use, as an error of qtool's own."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from qtool import heap
from qtool.errors import CheckpointError, InputError, printable

UNUSABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RuntimeError, ArithmeticError,
            MemoryError, AssertionError, ImportError)
PANIC = "PanicException"  # of a library in Rust; a BaseException, of a class that cannot be imported
STRICT = "StrictDataclassError"  # huggingface_hub's, whose import takes longer than many a command


class Explained:
    """Use as a context: an error inside becomes "PATH: WHAT: why; REMEDY".

    No except clause could: the tokenizers library raises Exception itself, without a class of its own.
    """

    def __init__(self, path: Path, what: str, remedy: str, raises: type[InputError] = CheckpointError) -> None:
        self.path, self.what, self.remedy, self.raises = path, what, remedy, raises

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            return
        named = {base.__name__ for base in kind.__mro__} & {PANIC, STRICT}
        if not (kind is Exception or named or issubclass(kind, UNUSABLE)):
            return
        if error is not None:
            heap.raise_exhausted(error)
        why = printable(" ".join(str(error).split()), 300) or kind.__name__
        raise self.raises(f"{self.path}: {self.what}: {why}; {self.remedy}") from None
