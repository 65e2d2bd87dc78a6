"""Which values can be stored, and with which scales: one file per grid, found by its name.

A grid module has `check(scheme)`, `fit(weight, scheme, scale_dtype, importance, ...)`, `encode(...)` and `decode(...)`.
WHOLE_SCALE: its matrices have one scale more, over all their groups.
"""

from qtool import found
from qtool.recipe import Scheme


def has_whole_scale(scheme: Scheme) -> bool:
    """Whether one scale goes over a whole matrix, so that linears which engines run as one matrix must share it."""
    return scheme.strategy == "tensor" or getattr(found.load("grids", scheme.grid), "WHOLE_SCALE", False)
