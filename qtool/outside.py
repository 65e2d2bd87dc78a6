"""Quantizes what lies outside of the blocks, embeddings and head, in chunks of rows and without text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from qtool import digests, found, quality, records, repairs
from qtool.checkpoint.reader import Checkpoint
from qtool.container import Writer
from qtool.errors import CheckpointError, VerificationError
from qtool.methods import rtn
from qtool.plan import Plan
from qtool.recipe import Scheme
from qtool.stages import LinearPlan
from qtool.tensors import CHUNK_ELEMENTS, QuantizedTensor, all_finite


@dataclass(frozen=True)
class Chunk:
    """Rows start .. stop of a weight: as they are (float32), quantized, and packed."""

    start: int
    stop: int
    weight: torch.Tensor
    quantized: QuantizedTensor
    packed: torch.Tensor


def rounded(format_: ModuleType, linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype,
            read: Callable[[int, int], torch.Tensor], options: rtn.Options,
            importance: torch.Tensor | None = None) -> Iterator[Chunk]:
    """A linear [N, K] fitted, rounded and packed some rows at a time, for formats with one tensor per linear.

    read: (start, stop) -> those rows.  dtype: the model's.  importance: float32 [K], else large weights count more.
    Raises CheckpointError.
    """
    grid, name, (rows, columns) = found.load("grids", scheme.grid), f"{linear}.weight", shape
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = read(start, stop).float()
        if not all_finite(weight):
            bad = int((~torch.isfinite(weight)).sum())
            raise CheckpointError(f"{name}: {bad} values in rows {start} to {stop} are NaN or infinite; download the "
                                  "file again")
        repairs.refuse_too_large(linear, weight, scheme, format_.scale_dtype(dtype))
        fitted = grid.fit(weight, scheme, format_.scale_dtype(dtype), importance, options.shrink_steps,
                          options.signed, options.rounds)
        quantized = grid.encode(weight, fitted)
        yield Chunk(start, stop, weight, quantized, format_.pack(linear, quantized, dtype)[name])


def quantize(checkpoint: Checkpoint, plan: Plan, writer: Writer, linear: LinearPlan) -> dict[str, Any]:
    """Write one embedding or head [N, K]; returns its record."""
    grid, name = found.load("grids", linear.scheme.grid), f"{linear.stored}.weight"
    spec, = plan.format.layout(linear.stored, linear.shape, linear.scheme, plan.model_dtype)
    packed = torch.empty(spec.shape, dtype=spec.dtype)
    off, energy, values = 0.0, 0.0, digests.Values()
    lost = groups = 0
    for chunk in rounded(plan.format, linear.stored, linear.shape, linear.scheme, plan.model_dtype,
                         lambda start, stop: checkpoint.read_rows(name, start, stop), rtn.Options()):
        dense, shape = grid.decode(chunk.quantized), (chunk.stop - chunk.start, linear.shape[1])
        stored = plan.format.unpack(linear.stored, {name: chunk.packed}.__getitem__, linear.scheme, shape)
        again = grid.decode(stored)
        if not torch.equal(again, dense):
            raise VerificationError(f"{linear.stored}: {linear.scheme.grid} does not give back what was packed; this "
                                    f"is a bug in format {plan.format.NAME}")
        packed[chunk.start:chunk.stop] = chunk.packed
        values.add(again)
        off += quality.square_sum(chunk.weight - dense)
        energy += quality.square_sum(chunk.weight)
        zeroed, seen = repairs.lost_groups(chunk.weight, chunk.quantized.group_size, dense)
        lost, groups = lost + zeroed, groups + seen
    writer.write(name, packed)
    if not torch.equal(writer.read_back(name), packed):
        raise VerificationError(f"{linear.stored}: what was read back differs from what was written; the disk or the "
                                "memory of this machine may be faulty")
    record = records.of_matrix(plan, linear, off / energy if energy else 0.0, lost, groups)
    return {**record, "values_sha256": values.sha256}
