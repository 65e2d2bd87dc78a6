"""Every quantized weight, decoded twice: as always, and by code that shares nothing with it (qtool/independent)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qtool import found, independent
from qtool.decode import Source
from qtool.errors import CheckpointError
from qtool.formats import gguf as blocks
from qtool.independent.store import Reader
from qtool.tensors import all_finite


class SecondReading:
    """skipped: linears that the pages do not describe, with the reason.  problems: where config.json and the tensors
    contradict each other.  recorded: the digests of the manifest, by linear."""

    def __init__(self, source: Source, recorded: Mapping[str, str]) -> None:
        self.source, self.recorded = source, recorded
        self.problems: list[str] = []
        readers: dict[str, Reader] = {}
        try:
            if source.kind == "gguf":
                from qtool.independent import gguf

                names = [name.removesuffix(".weight") for name in source.checkpoint.block_types]
                readers = gguf.linears(Path(source.origin), names)
            elif source.kind == "safetensors" and source.format is not None:
                readers = independent.linears(source.directory, source.quantization(), source.format.NAME)
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            self.problems.append(f"{source.origin}: cannot be read from the description of its format: {error}")
        self.readers = {name: one for name, one in readers.items() if not isinstance(one, str)}
        self.skipped = {name: one for name, one in readers.items() if isinstance(one, str)}

    def wrong(self, linear: str) -> list[str]:
        """What is wrong with one quantized linear."""
        try:
            weight = self._weight(linear)
        except CheckpointError as error:
            return [str(error)]
        if not all_finite(weight):
            return [f"{linear}.weight: {int((~torch.isfinite(weight)).sum())} values are NaN or infinite"]
        if not all_finite(weight.to(self.source.dtype)):
            return [f"{linear}.weight: has values beyond those of the model's {self.source.dtype}"]
        return [*self._differs(linear, weight), *self._unlike(linear, weight)]

    def _weight(self, linear: str) -> torch.Tensor:
        """float32 [N, K], by the decoder that everything else uses."""
        held = self.source.checkpoint.block_types.get(f"{linear}.weight")
        if held is None or self.source.checkpoint.fetch_blocks is None or held[0] not in blocks.TYPES:
            return self.source.decoded(linear)
        rows, columns = self.source.specs[f"{linear}.weight"].shape
        return blocks.dequantize(linear, self.source.checkpoint.fetch_blocks, found.load("grids", held[0]).scheme,
                                 (rows, columns))

    def _differs(self, linear: str, weight: torch.Tensor) -> list[str]:
        """From what the description of the format says."""
        if linear not in self.readers:
            return [] if linear in self.skipped or not self.readers else [
                f"{linear}: is quantized, but its format's description knows no such linear"]
        try:
            again = torch.from_numpy(self.readers[linear]())
        except (CheckpointError, ValueError, KeyError, TypeError, IndexError) as error:
            return [f"{linear}: cannot be decoded as its format is described: {error}"]
        if torch.equal(weight, again):
            return []
        where = f"{list(again.shape)}, not {list(weight.shape)}" if weight.shape != again.shape else \
            f"{int((weight != again).sum())} of {weight.numel()} values differ"
        return [f"{linear}: decoded as its format is described it is another weight ({where}); this is a bug in qtool, "
                "or config.json belongs to another file"]

    def _unlike(self, linear: str, weight: torch.Tensor) -> list[str]:
        """From what was solved."""
        known = self.recorded.get(linear)
        if known is None or independent.values_sha256(weight.numpy()) == known:
            return []
        return [f"{linear}: its values are not those that were solved (their sha256 differs from the manifest's)"]
