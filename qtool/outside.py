"""Quantizes what lies outside of the blocks, embeddings and head, in chunks of rows and without text."""

from __future__ import annotations

from typing import Any

import torch

from qtool import found, quality
from qtool.checkpoint.reader import Checkpoint
from qtool.container import Writer
from qtool.errors import NumericalError, VerificationError
from qtool.methods import rtn
from qtool.plan import Plan
from qtool.stages import LinearPlan
from qtool.tensors import all_finite

CHUNK_ELEMENTS = 1 << 22  # at a time; bounds the float32 temporaries


def quantize(checkpoint: Checkpoint, plan: Plan, writer: Writer, linear: LinearPlan) -> dict[str, Any]:
    """Fit, round, pack and write one embedding or head [N, K]; returns its record. Of one tensor."""
    grid, name, (rows, columns) = found.load("grids", linear.scheme.grid), f"{linear.stored}.weight", linear.shape
    options, dtype = rtn.Options(), plan.format.scale_dtype(plan.model_dtype)
    spec, = plan.format.layout(linear.stored, linear.shape, linear.scheme, plan.model_dtype)
    packed, step = torch.empty(spec.shape, dtype=spec.dtype), max(1, CHUNK_ELEMENTS // columns)
    lost = energy = 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        chunk = checkpoint.read_rows(name, start, stop).float()
        if not all_finite(chunk):
            bad = int((~torch.isfinite(chunk)).sum())
            raise NumericalError(f"{name}: {bad} values in rows {start} to {stop} are NaN or infinite; the checkpoint "
                                 "is damaged")
        fitted = grid.fit(chunk, linear.scheme, dtype, None, options.shrink_steps, options.signed, options.rounds)
        quantized = grid.encode(chunk, fitted)
        dense = grid.decode(quantized)
        part = plan.format.pack(linear.stored, quantized, plan.model_dtype)[name]
        again = plan.format.unpack(linear.stored, {name: part}.__getitem__, linear.scheme, (stop - start, columns))
        if not torch.equal(grid.decode(again), dense):
            raise VerificationError(f"{linear.stored}: {linear.scheme.grid} does not give back what was packed; this "
                                    f"is a bug in format {plan.format.NAME}")
        packed[start:stop] = part
        lost += float((chunk - dense).double().square().sum())
        energy += float(chunk.double().square().sum())
    writer.write(name, packed)
    if not torch.equal(writer.read_back(name), packed):
        raise VerificationError(f"{linear.stored}: what was read back differs from what was written; the disk or the "
                                "memory of this machine may be faulty")
    return _record(plan, linear, lost / energy if energy else 0.0)


def _record(plan: Plan, linear: LinearPlan, error: float) -> dict[str, Any]:
    ratio = quality.sqnr_db(error)
    return {"name": linear.name, "stored": linear.stored, "block": None, "shape": list(linear.shape),
            "scheme": linear.scheme.model_dump(), "bytes": plan.linear_bytes(linear), "relative_error": None,
            "weight_error": float(f"{error:.6g}"), "sqnr_db": None if ratio is None else float(f"{ratio:.6g}"),
            "tokens": 0, "held_out_tokens": 0, "pooled": False, "solved_together": 1}
