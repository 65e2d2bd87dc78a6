"""NF4: the 16 levels of QLoRA for normally distributed weights, groups of 64 by default, one absmax scale per group.

The table is the literal one of QLoRA and bitsandbytes: asymmetric, 8 positive levels, 7 negative and an exact zero.
(The often quoted formula Φ⁻¹((2i + 1) / 32) is another table, without a zero and up to 0.04 away.)
Source: QLoRA, arXiv 2305.14314, appendix E.
"""

from __future__ import annotations

import torch

from qtool.grids._absmax import AbsmaxGrid, dynamic_table
from qtool.grids._levels import midpoints

LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
GRID = AbsmaxGrid("nf4", 4, LEVELS, midpoints(LEVELS), groups=(32, 64, 128, 256, 512, 1024, 2048, 4096),
                  nests=True)
JOINT, FREE_SCALES = False, False
check, width, fit, encode, decode = GRID.check, GRID.width, GRID.fit, GRID.encode, GRID.decode
reach, steps, solve_columns, refine_columns = GRID.reach, GRID.steps, GRID.solve_columns, GRID.refine_columns
__all__ = ["FREE_SCALES", "GRID", "JOINT", "check", "decode", "dynamic_table", "encode", "fit", "reach",
           "refine_columns", "solve_columns", "steps", "width"]
