"""Fuzz one target, guided by coverage: python -m tests.fuzz.run NAME [libFuzzer's options] [folders of inputs].

`make fuzz` runs all of them. Without a name: the names.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["qtool"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.stdout.write("\n".join(TARGETS) + "\n")
    else:
        atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
        atheris.Fuzz()
