"""Which values can be stored, and with which scales: one file per grid, found by its name.

A grid module has `check(scheme)`, `fit(weight, scheme, scale_dtype, importance, ...)`, `encode(...)` and `decode(...)`.
"""
