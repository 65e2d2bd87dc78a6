"""The activation stream: the hidden states of all calibration sequences between two blocks."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qtool import storage
from qtool.errors import NumericalError, OutputError, StorageError
from qtool.tensors import NAMES_OF_DTYPES, all_finite

CHUNK = 64 << 20  # bytes copied at a time when saving
# what to do about activations that are not finite; True: where the type that they are computed in is float16
LOOK = {True: "use --set dtype=bfloat16 or dtype=float32",
        False: "find it with qtool inspect MODEL --layers --sort absmax, and mend it or start from another checkpoint"}


def batches_for(samples: int, length: int, batch_tokens: int, held_out: float) -> tuple[list[slice], frozenset[int]]:
    """Cut `samples` sequences of `length` tokens into batches of about `batch_tokens`, none of them of both kinds.

    Returns the batches and the held-out samples: the last ones, their share rounded up, never all.
    """
    size = max(1, batch_tokens // length)
    last = min(samples - 1, -(-round(samples * held_out * 1e6) // 1_000_000))  # 1e6: no ceil of 8.000000001
    cuts = [*range(0, samples - last, size), *range(samples - last, samples, size), samples]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)], \
        frozenset(range(samples - last, samples))


def refuse_overflow(what: str, hidden: torch.Tensor, stored: torch.dtype, batch: slice) -> None:
    """Raise NumericalError where activations are not finite, or not in the type that they are stored in.

    what: the beginning of the message, such as "model.layers.3: its output".
    """
    if all_finite(hidden.to(stored)):
        return
    where = f"on calibration samples {batch.start}..{batch.stop - 1}"
    if all_finite(hidden):
        kind, largest = str(stored).removeprefix("torch."), max(abs(float(end)) for end in hidden.aminmax())
        raise NumericalError(f"{what} reaches {largest:.4g} {where}, more than {kind} holds; use --set dtype=bfloat16 "
                             "or dtype=float32")
    kind = str(hidden.dtype).removeprefix("torch.")
    raise NumericalError(f"{what} is not finite {where}, though what enters the block is: a weight before it is too "
                         f"large for {kind}; " + LOOK[hidden.dtype == torch.float16])


class StreamStore:
    """Hidden states [samples, length, hidden] in `dtype`, in memory, or past `budget_bytes` in an unnamed file.

    The file is read and written a batch at a time, not mapped: mapped pages would count as the process's memory.
    """

    def __init__(self, samples: int, length: int, hidden: int, dtype: torch.dtype, budget_bytes: int,
                 folder: Path | None = None) -> None:
        self.shape = (samples, length, hidden)
        self.dtype = dtype
        self.row_bytes = length * hidden * dtype.itemsize
        self.spilled = samples * self.row_bytes > budget_bytes
        if self.spilled:
            self.folder = folder or Path(tempfile.gettempdir())
            try:
                self._file = tempfile.TemporaryFile(dir=self.folder, prefix="stream-")  # noqa: SIM115 - lives with the store
                os.posix_fallocate(self._file.fileno(), 0, samples * self.row_bytes)
            except OSError as error:
                raise self._failed(error, samples * self.row_bytes) from None
        else:
            self._memory = torch.zeros(self.shape, dtype=dtype)

    def read(self, batch: slice) -> torch.Tensor:
        """Hidden states [B, T, hidden] of the samples in `batch`; a copy when they lie in a file."""
        if not self.spilled:
            return self._memory[batch]
        tensor = torch.empty((batch.stop - batch.start, *self.shape[1:]), dtype=self.dtype)
        self._transfer(os.preadv, tensor, batch.start)
        return tensor

    def write(self, batch: slice, hidden: torch.Tensor) -> None:
        """Replace the hidden states of the samples in `batch`, converted to the stored type."""
        hidden = hidden.detach().to(device="cpu", dtype=self.dtype).contiguous()
        if not self.spilled:
            self._memory[batch] = hidden
            return
        self._transfer(os.pwritev, hidden, batch.start)

    def _transfer(self, call: Any, tensor: torch.Tensor, first: int) -> None:
        data = _bytes(tensor)
        done = 0
        while done < len(data):
            try:
                count = call(self._file.fileno(), [data[done:done + CHUNK]], first * self.row_bytes + done)
            except OSError as error:
                raise self._failed(error, len(data)) from None
            if count == 0:
                raise StorageError(f"{self.folder}: the file of the activations ends early; it was changed by another "
                                   "program")
            done += count

    def _failed(self, error: OSError, needed: int) -> StorageError:
        return storage.failed(error, self.folder, "the file of the activations", needed)

    def copy_from(self, other: StreamStore, batches: Iterable[slice]) -> None:
        """Take over the samples in `batches` from another store of the same shape and type."""
        for batch in batches:
            self.write(batch, other.read(batch))

    def close(self) -> None:
        """Free the memory or the file."""
        if self.spilled:
            self._file.close()
        else:
            del self._memory

    def save(self, path: Path) -> None:
        """Write the stream durably as a safetensors file with one tensor; `path` appears only when complete."""
        header = self._header()
        part = path.with_name(path.name + storage.PART)
        try:
            with part.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for sample in range(self.shape[0]):
                    file.write(_bytes(self.read(slice(sample, sample + 1)).contiguous()))
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
            storage.sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)  # what little room there is, is for others
            raise storage.failed(error, path, "the activations", self.shape[0] * self.row_bytes) from None

    def load(self, path: Path) -> None:
        """Fill the store from a file that `save` wrote. Raises OutputError when it is of another run or damaged."""
        header = self._header()
        prefix = len(header).to_bytes(8, "little") + header
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != len(prefix) + self.shape[0] * self.row_bytes \
                        or file.read(len(prefix)) != prefix:
                    raise OutputError(f"{path}: these saved activations are damaged or belong to another run; "
                                      "start over with --restart")
                for sample in range(self.shape[0]):
                    tensor = torch.empty((1, *self.shape[1:]), dtype=self.dtype)
                    file.readinto(_bytes(tensor))
                    self.write(slice(sample, sample + 1), tensor)
        except OSError as error:
            raise OutputError(f"{path}: the saved activations cannot be read ({error}); start over with --restart") \
                from None

    def _header(self) -> bytes:
        entry = {"dtype": NAMES_OF_DTYPES[self.dtype], "shape": list(self.shape),
                 "data_offsets": [0, self.shape[0] * self.row_bytes]}
        return json.dumps({"stream": entry}, separators=(",", ":")).encode()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
