"""The types of GGUF tensors that are quantized, by their lower-case names. The bytes: formats/gguf.py."""

from __future__ import annotations

import torch

from qtool.grids._blocks import BlockGrid

# IQ4's 16 levels, ggml-common.h
IQ4 = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def _whole(low: int, high: int) -> torch.Tensor:
    return torch.arange(low, high + 1).float()


MEMBERS = {grid.name: grid for grid in (
    BlockGrid("q4_0", 4, _whole(-8, 7), 32, 32),
    BlockGrid("q4_1", 4, _whole(0, 15), 32, 32, mins=1),
    BlockGrid("q5_0", 5, _whole(-16, 15), 32, 32),
    BlockGrid("q5_1", 5, _whole(0, 31), 32, 32, mins=1),
    BlockGrid("q8_0", 8, _whole(-128, 127), 32, 32),
    BlockGrid("q2_k", 2, _whole(0, 3), 256, 16, (0, 15), 15),
    BlockGrid("q3_k", 3, _whole(-4, 3), 256, 16, (-32, 31)),
    BlockGrid("q4_k", 4, _whole(0, 15), 256, 32, (0, 63), 63),
    BlockGrid("q5_k", 5, _whole(0, 31), 256, 32, (0, 63), 63),
    BlockGrid("q6_k", 6, _whole(-32, 31), 256, 16, (-128, 127)),
    BlockGrid("iq4_nl", 4, IQ4, 32, 32),
    BlockGrid("iq4_xs", 4, IQ4, 256, 32, (-32, 31)),
    BlockGrid("tq1_0", 2, _whole(-1, 1), 256, 256),
    BlockGrid("tq2_0", 2, _whole(-1, 1), 256, 256),
)}
