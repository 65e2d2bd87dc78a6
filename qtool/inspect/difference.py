"""Two checkpoints beside each other: schemes, bytes and errors of linears, tensors byte for byte, configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import footprint
from qtool.decode import Source
from qtool.inspect.files import SCHEMA, Step, bits_per_weight, linear_bytes, no_steps, record_of, stored_name
from qtool.inspect.layers import layers
from qtool.tensors import same_bits

ERRORS = {"relative_error": "outputs", "weight_error": "weights"}


def difference(first: Source, second: Source, step: Step = no_steps) -> dict[str, Any]:
    """What docs/json.md has under --diff. Tensors are read in pairs, one at a time; errors are the manifests'."""
    records = record_of(first), record_of(second)
    tensors = _tensors(first, second, step)
    linears = _linears(first, second, records, {*tensors["different"], *tensors["only_a"], *tensors["only_b"]})
    config = changes(first.checkpoint.config, second.checkpoint.config)
    recipes = [(record or {}).get("recipe") or {} for record in records]
    return {
        "schema": SCHEMA, "a": _side(first), "b": _side(second),
        "identical": not (linears or config or any(tensors[key] for key in ("different", "only_a", "only_b"))),
        "linears": linears, "tensors": tensors, "config": config, "recipe": changes(recipes[0], recipes[1]),
    }


def changes(before: Any, now: Any, key: str = "") -> list[dict[str, Any]]:
    """The fields in which two documents differ, each as {key, a, b}; keys of mappings in mappings with dots."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [one for name in sorted({*before, *now})
                for one in changes(before.get(name), now.get(name), f"{key}.{name}" if key else name)]
    return [] if before == now else [{"key": key, "a": before, "b": now}]


def _side(source: Source) -> dict[str, Any]:
    return {"path": source.origin, "format": stored_name(source), "weight_bytes": footprint.stored_bytes(source),
            "bits_per_weight": bits_per_weight(source)}


def _tensors(first: Source, second: Source, step: Step) -> dict[str, Any]:
    """Names as stored, each expert by itself: how many are equal byte for byte (name, dtype, shape, data), which are
    not."""
    left, right = first.checkpoint.specs, second.checkpoint.specs
    shared = [name for name in left if name in right]
    different = []
    for done, name in enumerate(shared):
        step(done, len(shared), name)
        kinds = [(one[name].dtype, one[name].shape) for one in (left, right)]
        if kinds[0] != kinds[1] or not same_bits(first.checkpoint.read(name), second.checkpoint.read(name)):
            different.append(name)
    return {"equal": len(shared) - len(different), "different": different,
            "only_a": [name for name in left if name not in right],
            "only_b": [name for name in right if name not in left]}


def _linears(first: Source, second: Source, records: tuple[dict[str, Any] | None, dict[str, Any] | None],
             unequal: set[str]) -> list[dict[str, Any]]:
    """One entry for each linear that differs, pairs of figures as [a, b]; None where it is not quantized."""
    sides = [{row["stored"]: row for row in layers(source, record)} if linear_bytes(source) else {}
             for source, record in zip((first, second), records, strict=True)]
    owners = {name.rpartition(".")[0] for name in unequal}
    found = []
    for name in dict.fromkeys(name for side in sides for name in side):
        pair = [side.get(name) for side in sides]
        of, errors = _errors([row or {} for row in pair])
        figures = {"scheme": [row["scheme_label"] if row else None for row in pair],
                   "bytes": [row["bytes"] if row else None for row in pair], "error": errors}
        equal = name not in owners
        if not equal or any(one != other for one, other in figures.values()):
            shown = next(row for row in pair if row)
            found.append({"name": shown["name"], "stored": name, "equal_tensors": equal, **figures,
                          "error_of": of})
    return found


def _errors(pair: list[dict[str, Any]]) -> tuple[str | None, list[float | None]]:
    """Of what, and both; of the outputs where both know that, else of the weights: never one beside the other."""
    for key, of in ERRORS.items():
        errors = [row.get(key) for row in pair]
        if None not in errors:
            return of, errors
    return None, [None, None]
