"""MatMulNBits, from onnxruntime's ContribOperators.md."""

from __future__ import annotations

import numpy as np

from qtool.errors import CheckpointError


def matmul_nbits(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, rows: int, columns: int, bits: int,
                 block: int) -> np.ndarray:
    """The float32 [N, K] that it multiplies by. packed, zeros: uint8, whatever their shape.  scales: floating."""
    groups = -(-columns // block)
    if (packed.size, scales.size) != (rows * groups * block * bits // 8, rows * groups) or 8 % bits:
        raise CheckpointError(f"{packed.size} bytes and {scales.size} scales are no {rows} x {columns} of {bits} bits")
    codes = _fields(packed.reshape(rows, -1), bits)[:, :groups * block].astype(np.float32)
    middle = np.full((rows, groups), 1 << (bits - 1), np.float32)
    zero = middle if zeros is None else _fields(zeros.reshape(rows, -1), bits)[:, :groups].astype(np.float32)
    values = (codes.reshape(rows, groups, block) - zero[..., None]) * scales.reshape(rows, groups, 1).astype(np.float32)
    return values.reshape(rows, -1)[:, :columns]


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [R, 8 / bits · B] of uint8 [R, B], the lowest first."""
    parts = [packed >> place & ((1 << bits) - 1) for place in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(packed), -1)
