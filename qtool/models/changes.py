"""What a rotation makes of one tensor, and of all tensors of one block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from qtool.hadamard import Rotation
from qtool.models.blocks import Read
from qtool.models.skeleton import Skeleton

PIECE = 1 << 17  # elements that are in float64 at one time; more would leave the caches


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor [N, K] or [K]; the names are those of tensors in the checkpoint.

    source: the tensor that it is made from.  rows, columns: R acting on N (R^T W) and on K (W R), in runs of its size.
    gain: the norm whose (added + weight) multiplies the columns first.  constant: every value becomes this one.
    """

    source: str
    rows: Rotation | None = None
    columns: Rotation | None = None
    gain: str | None = None
    added: float = 0.0
    constant: float | None = None


def apply(change: Change, read: Read) -> torch.Tensor:
    """The changed tensor, in its own dtype and memory, computed piece by piece in float64 and rounded once."""
    tensor = read(change.source)
    if change.constant is not None:
        return tensor.fill_(change.constant)
    gain = None if change.gain is None else read(change.gain).double() + change.added
    rows, columns = change.rows, change.columns
    matrix = tensor if tensor.dim() == 2 else tensor[None]
    cut = int(rows is not None and (columns is None or rows.size > columns.size))  # along the shorter runs, or none
    inner = columns if cut else rows
    run = inner.size if inner else 1
    step = max(1, PIECE // (matrix.shape[1 - cut] * run)) * run
    for start in range(0, matrix.shape[cut], step):
        piece = matrix.narrow(cut, start, min(step, matrix.shape[cut] - start))
        work = piece.double() if gain is None else piece.double() * gain
        work = work if columns is None else columns.turn(work)
        piece.copy_(work if rows is None else rows.turn(work.T).T)
    return tensor


def in_block(skeleton: Skeleton, index: int, changes: Mapping[str, Change]) -> dict[str, Change]:
    """The changes of a block of some make, under the names of the tensors of this one."""
    named = {}
    prefix = skeleton.blocks[index] + "."
    for parameter in skeleton.block_parameters(index):
        change = changes.get(pattern(parameter.removeprefix(prefix)))
        if change is not None:
            gain = None if change.gain is None else skeleton.source(prefix + change.gain)
            named[skeleton.source(parameter)] = replace(change, source=skeleton.source(parameter), gain=gain)
    return named


def pattern(path: str) -> str:
    """A path with all experts of a layer as one."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", path)
