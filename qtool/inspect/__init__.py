"""What is in a checkpoint: schemes, sizes and errors, measured from its files and told by its manifest.

The manifest knows the errors on held-out text; everything about storage is taken from the files themselves.
"""

from __future__ import annotations

from qtool.inspect.compare import compare
from qtool.inspect.damage import damage
from qtool.inspect.difference import difference
from qtool.inspect.files import SCHEMA, Step, bits_per_weight, dtype_name, no_steps, record_of, stored_name
from qtool.inspect.layers import FIRST, layers
from qtool.inspect.machine import system
from qtool.inspect.memory import memory
from qtool.inspect.ordering import arranged
from qtool.inspect.summary import summary
from qtool.inspect.verify import verify

__all__ = [
    "FIRST", "SCHEMA", "Step", "arranged", "bits_per_weight", "compare", "damage", "difference",
    "dtype_name", "layers", "memory", "no_steps", "record_of", "stored_name", "summary", "system", "verify",
]
