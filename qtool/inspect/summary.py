"""The summary of a checkpoint: architecture, sizes, schemes, what is not quantized and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import footprint, learned, manifest
from qtool.decode import Source
from qtool.inspect.files import SCHEMA, bits_per_weight, dtype_name, linear_bytes, record_of, stored_name
from qtool.inspect.layers import layers
from qtool.tensors import TensorSpec, any_number


def summary(source: Source) -> dict[str, Any]:
    """Architecture, sizes and schemes (see docs/json.md); nothing but headers and the manifest is read."""
    record = record_of(source)
    parameters = sum(spec.elements for spec in source.specs.values())
    stored = footprint.stored_bytes(source)
    rows = layers(source, record) if source.schemes or source.checkpoint.block_types else []
    kind_and_error = manifest.errors(rows)
    return {
        "schema": SCHEMA, "path": source.origin, "kind": source.kind,
        "architecture": architecture(source.config),
        "format": stored_name(source), "dtype": dtype_name(source.dtype),
        "blocks": source.config.get("num_hidden_layers"), "parameters": parameters, "weight_bytes": stored,
        "bits_per_parameter": round(8 * stored / max(parameters, 1), 4),
        "bits_per_weight": bits_per_weight(source), "schemes": schemes_of(rows),
        "not_quantized": _not_quantized(source, record), "error": kind_and_error,
        "kv_cache": "fp8" if source.cache_scales() else None, "outliers": _outliers(rows), "made_by": made_by(record),
        "allocation": {key: value for key, value in ((record or {}).get("allocation") or {}).items()
                       if key != "linears"} or None,
        "learned": _learned(record or {}),
    }


def _learned(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the steps that learn; None where none did."""
    told = {"tuned": learned.blocks(record.get("layers", [])), "distilled": record.get("learned")}
    return told if any(told.values()) else None


def architecture(config: Mapping[str, Any]) -> str:
    """The first of config.json's architectures, else its model type."""
    named = config.get("architectures")
    return str(named[0] if isinstance(named, list) and named else config.get("model_type", "unknown"))


def schemes_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the summary says of each scheme."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["scheme_label"], []).append(row)
    result = []
    for name, members in groups.items():
        weights = sum(row["shape"][0] * row["shape"][1] for row in members)
        count = sum(row["bytes"] for row in members)
        result.append({"scheme": name, "linears": len(members), "weights": weights, "bytes": count,
                       "bits_per_weight": round(8 * count / max(weights, 1), 4)})
    return result


def _not_quantized(source: Source, record: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The other tensors, those that differ only in their numbers as one line."""
    reasons, quantized = {one["name"]: one["reason"] for one in (record or {}).get("kept", [])}, linear_bytes(source)
    groups: dict[tuple[str, str, str], list[TensorSpec]] = {}
    for name, spec in source.specs.items():
        if name.removesuffix(".weight") not in quantized:
            vector = len(spec.shape) < 2
            pattern = any_number(name.removesuffix(".weight"))
            if vector:
                pattern = "biases" if name.endswith("bias") else "norms"
            groups.setdefault((pattern, _reason(source, spec, reasons), dtype_name(spec.dtype)), []).append(spec)
    lines = [{"name": pattern, "reason": reason, "dtype": dtype, "tensors": len(specs),
              "elements": sum(spec.elements for spec in specs), "bytes": sum(spec.nbytes for spec in specs)}
             for (pattern, reason, dtype), specs in groups.items()]
    return sorted(lines, key=lambda line: (-line["bytes"], line["name"]))


def _reason(source: Source, spec: TensorSpec, reasons: dict[str, str]) -> str:
    told = reasons.get(spec.name.rpartition(".")[0])
    if told and spec.name.endswith(".weight"):
        return told
    if len(spec.shape) < 2:
        return "not a matrix"
    if "embed" in spec.name or spec.name.endswith("wte.weight"):
        return "embedding and output head" if source.config.get("tie_word_embeddings") else "embedding"
    return "left out of the quantization_config" if source.schemes else "matrix"


def _outliers(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What is known of outlier features, of LLM.int8() and wherever the step `outliers` looked for them."""
    known = [row for row in rows if row.get("outlier_features") is not None]
    concerned = known or [row for row in rows if row["scheme"] and row["scheme"]["activations"] == "outliers"]
    if not concerned:
        return None
    return {"threshold": concerned[0]["scheme"]["outlier_threshold"],
            "linears": sum(row["outlier_features"] > 0 for row in known) if known else None,
            "features": sum(row["outlier_features"] for row in known) if known else None}


def made_by(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where a manifest says that the files come from."""
    if record is None:
        return None
    recipe, used = record["recipe"], record["calibration"] or {}
    method = " + ".join(next(iter(step)) for step in recipe["steps"]) if recipe else "export"
    return {"qtool": record["qtool"], "source": record["source"].get("name", record["source"].get("origin")),
            "method": method, "calibration": used.get("source"),
            "tokens": used.get("samples", 0) * used.get("sequence_length", 0)}
