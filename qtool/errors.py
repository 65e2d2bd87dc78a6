"""Every error that qtool raises on purpose.

QtoolError
├── InputError            what the user gave cannot be used (exit status 2)
│   ├── RecipeError       a recipe, a flag or a --set value
│   ├── CheckpointError   a source checkpoint: missing, truncated, inconsistent, hostile
│   ├── ModelError        an architecture that cannot be built, or that does not match its weights
│   ├── CalibrationError  calibration text: absent, empty, too short
│   ├── PlanError         a plan that cannot be carried out: group sizes, format pairs, memory, disk
│   └── OutputError       an output directory: not empty, not writable, in use, from another run
└── RunError              the work itself failed (exit status 1)
    ├── NumericalError    a non-finite value, a Hessian beyond repair
    ├── StorageError      the disk is full or a write failed
    └── VerificationError what was written is not what was meant (exit status 3)

A message says what was wrong, where (file, tensor, key, line), and what to do about it.
"""

from __future__ import annotations

import re

ENDLESS = re.compile(r"(\S{1000})\S+")  # a value of a file in a message; paths are shorter


class QtoolError(Exception):
    """Base of all deliberate errors; `exit_status` is what the command line returns.

    Names in a message come from files: what a terminal would obey is ? in it, and no word is endless.
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        shown = "".join(char if char.isprintable() or char == "\n" else "?" for char in message)
        super().__init__(ENDLESS.sub(r"\1...", shown))


class InputError(QtoolError):
    """What the user gave cannot be used."""

    exit_status = 2


class RecipeError(InputError):
    """A recipe, a flag or a --set value is wrong."""


class CheckpointError(InputError):
    """A source checkpoint is missing, truncated, inconsistent or hostile."""


class ModelError(InputError):
    """The architecture cannot be built, or its weights do not fit it."""


class CalibrationError(InputError):
    """The calibration text is absent, empty or too short."""


class PlanError(InputError):
    """The plan cannot be carried out."""


class OutputError(InputError):
    """The output directory cannot be used."""


class RunError(QtoolError):
    """The work itself failed."""


class NumericalError(RunError):
    """A value is not finite, or a Hessian cannot be repaired."""


class StorageError(RunError):
    """A write failed; what was finished before stays."""


class VerificationError(RunError):
    """What was written is not what was meant."""

    exit_status = 3


def printable(name: str, limit: int = 200) -> str:
    """The name as a message may show it: no control characters, no lone surrogates, not endless."""
    if len(name) <= limit and name.isprintable():
        return name
    shown = "".join(char if char.isprintable() else "?" for char in name[:limit])
    return shown if len(name) <= limit else shown + "..."
