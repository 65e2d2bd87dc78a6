"""MXFP4: groups of 32 four-bit floats (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), scales powers of two.

Source: OCP Microscaling Formats (MX) Specification 1.0. A searched fit chooses between the exponent nearest to
absmax / 6, which cuts off up to a third, and the next one, which cuts off nothing.
"""

from __future__ import annotations

import torch

from qtool.grids._levels import LevelGrid, small_float

GRID = LevelGrid("mxfp4", 4, *small_float(2, 1, 6.0), groups=(32,), scale_dtype=torch.float8_e8m0fnu, shrink=2.0)
JOINT, FREE_SCALES = True, False
check, width, fit, encode, decode = GRID.check, GRID.width, GRID.fit, GRID.encode, GRID.decode
reach, steps, solve_columns, refine_columns = GRID.reach, GRID.steps, GRID.solve_columns, GRID.refine_columns
