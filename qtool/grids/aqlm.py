"""AQLM's codebooks, by their names: aqlm-MxB has M codebooks of 2^B codewords. The bytes: formats/aqlm.py.

Source: arXiv 2401.06118.
"""

from __future__ import annotations

from qtool.grids._codebooks import CodebookGrid

MEMBERS = {grid.name: grid for grid in (
    CodebookGrid("aqlm-1x16", 1, 16),
    CodebookGrid("aqlm-2x8", 2, 8),
    CodebookGrid("aqlm-3x8", 3, 8),
    CodebookGrid("aqlm-4x8", 4, 8),
)}
