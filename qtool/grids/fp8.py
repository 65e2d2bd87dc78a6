"""FP8, E4M3 without infinities: 4 bits of exponent, 3 of mantissa, up to ±448; one scale per output channel or group.

Source: arXiv 2209.05433 (FP8 formats for deep learning); stored bits are torch.float8_e4m3fn's.
"""

from __future__ import annotations

from qtool.grids._levels import LevelGrid, small_float

GRID = LevelGrid("fp8", 8, *small_float(4, 3, 448.0))
JOINT, FREE_SCALES = True, True
check, width, fit, encode, decode = GRID.check, GRID.width, GRID.fit, GRID.encode, GRID.decode
steps, solve_columns, refine_columns = GRID.steps, GRID.solve_columns, GRID.refine_columns
