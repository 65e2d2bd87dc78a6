"""One record per linear, from the headers and the manifest."""

from __future__ import annotations

from typing import Any

from qtool.decode import Source
from qtool.inspect.files import dtype_name, linear_bytes, rotation_of
from qtool.tensors import any_number

FIRST = ("name", "stored", "block", "scheme_label", "bits", "group_size", "symmetric", "shape", "bytes",
         "bits_per_weight", "relative_error", "weight_error", "weight_sqnr_db", "sqnr_db", "output_error",
         "output_sqnr_db", "absmax", "std", "kurtosis", "zeros", "tokens", "damping", "repaired", "pooled", "rescaled",
         "outlier_features")


def layers(source: Source, record: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One record per quantized linear; of a checkpoint without any, one per matrix. With the manifest's figures.

    In the manifest's order, which is that of execution; else by name, numbers by their value.
    """
    expected = _expected(record)
    recorded = {layer["stored"]: {**layer, **expected.get(layer["name"], {})}
                for layer in (record or {}).get("layers", [])}
    types = {name.removesuffix(".weight"): kind for name, (kind, _) in source.checkpoint.block_types.items()}
    names = list(source.schemes) or list(types) or [
        name.removesuffix(".weight") for name, spec in source.specs.items()
        if len(spec.shape) == 2 and name.endswith(".weight")]
    sizes, place = linear_bytes(source), {name: index for index, name in enumerate(recorded)}
    rotated = rotation_of(record)["tensors"]
    rows = []
    for name in sorted(names, key=lambda name: (place.get(name, len(place)), _natural(name))):
        known = {**({"rescaled": True} if any_number(name + ".weight") in rotated else {}), **recorded.get(name, {})}
        shape = source.specs[name + ".weight"].shape
        scheme = source.schemes.get(name)
        count = sizes.get(name) or source.checkpoint.specs[name + ".weight"].nbytes
        rows.append({
            "name": name, "stored": name, **known, "shape": list(shape),
            "scheme": scheme.model_dump() if scheme else None,
            "scheme_label": (scheme.label if scheme else types.get(name)
                             or dtype_name(source.specs[name + ".weight"].dtype)),
            "bits": scheme.bits if scheme else None, "group_size": scheme.group_size if scheme else None,
            "symmetric": scheme.symmetric if scheme else None, "bytes": count,
            "bits_per_weight": round(8 * count / max(shape[0] * shape[1], 1), 4),
            "relative_error": known.get("relative_error"), "weight_error": known.get("weight_error"),
            "sqnr_db": known.get("sqnr_db"),
        })
    return [{**{key: row[key] for key in FIRST if key in row}, **row} for row in rows]


def _expected(record: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Of linears that a budget chose the scheme of: the KL divergence expected of it, and with the other schemes."""
    return {one["name"]: {"expected_kl": one["losses"][one["scheme"]], "losses": one["losses"]}
            for one in ((record or {}).get("allocation") or {}).get("linears", [])}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.9 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
