"""Which values can be stored, and with which scales: one file per grid, found by its name.

A grid module has `check(scheme)`, `fit(weight, scheme, scale_dtype, importance, ...)`, `encode(...)` and `decode(...)`.
JOINT, FREE_SCALES: docs/design.md.  WHOLE_SCALE: its matrices have one scale more, over all their groups.
"""

from types import ModuleType

from qtool import found
from qtool.recipe import Scheme


def has_whole_scale(scheme: Scheme) -> bool:
    """Whether one scale goes over a whole matrix, so that linears which engines run as one matrix must share it."""
    return scheme.strategy == "tensor" or getattr(found.load("grids", scheme.grid), "WHOLE_SCALE", False)


def refuses_step(scheme: Scheme, step: ModuleType) -> str | None:
    """Why a method step cannot work on a linear's grid, or None: most know grids with a code for each column only."""
    if hasattr(found.load("grids", scheme.grid), "solve_columns") or getattr(step, "CODEBOOKS", False):
        return None
    name = step.__name__.rpartition(".")[2].replace("_", "-")
    return (f"the {name} step works on single columns, and {scheme.grid} codes {scheme.group_size} at once; take the "
            "step aqlm for it (--method aqlm), or another grid")
