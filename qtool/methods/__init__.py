"""Which of the storable values are chosen: steps that compose, one file each, found by name.

A step module has `Options` (pydantic, unknown keys rejected), `CALIBRATED` (does it need statistics of the inputs?)
and `run(layer, options) -> layer`; perhaps `check(scheme)`, why it cannot solve a linear, and `CODEBOOKS`, where it
also knows grids whose codes stand for several columns. A `Layer` is what one step hands to the next.
"""
