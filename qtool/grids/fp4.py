"""FP4 as bitsandbytes has it: magnitudes 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1 with a sign, one absmax per group.

Not E2M1, the FP4 of MXFP4 and NVFP4: its smallest value is far closer to zero.
Source: bitsandbytes (the fp4 type of its 4-bit linears).
"""

from __future__ import annotations

import torch

from qtool.grids._absmax import AbsmaxGrid, dynamic_table
from qtool.grids._levels import midpoints

MAGNITUDES = torch.tensor([0.0052083333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0])
LEVELS = torch.cat([-MAGNITUDES.flip(0), torch.zeros(2), MAGNITUDES])  # both zeros: one for what is above 0, as there
GRID = AbsmaxGrid("fp4", 4, LEVELS, midpoints(LEVELS), groups=(32, 64, 128, 256, 512, 1024, 2048, 4096),
                  nests=True)
JOINT, FREE_SCALES = False, False
check, width, fit, encode, decode = GRID.check, GRID.width, GRID.fit, GRID.encode, GRID.decode
reach, steps, solve_columns, refine_columns = GRID.reach, GRID.steps, GRID.solve_columns, GRID.refine_columns
__all__ = ["FREE_SCALES", "GRID", "JOINT", "check", "decode", "dynamic_table", "encode", "fit", "reach",
           "refine_columns", "solve_columns", "steps", "width"]
