"""What a row of an evaluation says beside its figures: what is stored, how large it is, and what to use it for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtool import inspect
from qtool.decode import Source

FP16_BYTES = 2
SHOWN = 2  # schemes of a mixture that are named

# What to use it for: the first rule that fits says where it runs well. (what is asked, its answer, the sentence)
WHERE: tuple[tuple[str, str, str], ...] = (
    ("format", "gguf", "llama.cpp and programs built on it, on CPUs and small GPUs"),
    ("format", "mlx", "Apple silicon, with mlx-lm"),
    ("activations", "outliers", "bitsandbytes in transformers, where 8 bits must not need calibration"),
    ("grid", "nf4", "bitsandbytes in transformers, and QLoRA fine-tuning"),
    ("grid", "fp4", "bitsandbytes in transformers"),
    ("format", "aqlm", "transformers with the package aqlm, where bytes count for more than speed"),
    ("grid", "fp8", "GPUs with FP8 units: long prompts, many requests at once"),
    ("rounds inputs", "yes", "engines that multiply int8: long prompts, many requests at once"),
    ("grid", "nvfp4", "engines with NVFP4 kernels: few requests at once"),
    ("grid", "mxfp4", "engines with MXFP4 kernels: few requests at once"),
    ("quantized", "yes", "few requests at once, where reading the weights takes the time"),
    ("quantized", "no", "training, and as the base of the others"),
)
# How near it is to the base: the first whose KL divergence, in nats per token, is not exceeded.
NEARNESS: tuple[tuple[float, str], ...] = (
    (0.005, "hardly to be told from the base"),
    (0.02, "very close to the base"),
    (0.1, "close to the base"),
    (0.5, "visibly worse than the base"),
    (float("inf"), "too far from the base: more bits, or a calibrated method"),
)


def storage(source: Source, parameters: int | None = None) -> dict[str, Any]:
    """Scheme, format, method and sizes from headers and manifest (docs/json.md); no weight is read.

    parameters: of the base, whose size in 16 bits of_fp16 is a share of; None: the checkpoint's own.
    """
    known = inspect.summary(source)
    made = known["made_by"] or {}
    return {"path": source.origin, "name": source.name, "format": known["format"],
            "scheme": label(known["schemes"]) or known["dtype"], "method": made.get("method"),
            "weight_bytes": known["weight_bytes"], "bits_per_weight": known["bits_per_weight"],
            "of_fp16": known["weight_bytes"] / (FP16_BYTES * (parameters or known["parameters"]))}


def parameters_of(source: Source) -> int:
    return sum(spec.elements for spec in source.specs.values())


def tell_apart(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of one name, such as the same folder name in two places, get their path for it."""
    names = [row["name"] for row in rows]
    for row in rows:
        if names.count(row["name"]) > 1:
            row["name"] = row["path"]


def label(schemes: Sequence[Mapping[str, Any]]) -> str:
    """The schemes with most weights: int4-g128, or q4_k + q6_k + 2 more; empty where there is none."""
    ordered = [one["scheme"] for one in sorted(schemes, key=lambda one: (-one["weights"], one["scheme"]))]
    more = len(ordered) - SHOWN
    return " + ".join(ordered[:SHOWN]) + (f" + {more} more" if more > 0 else "")


def use_for(source: Source, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One short sentence on a row: where it runs well, how near it came to the base, and what of `rows` beats it."""
    parts = [_where(source, row)]
    if "kl" in row:
        parts.append(next(words for limit, words in NEARNESS if row["kl"]["mean"] <= limit))
        better = [one for one in rows if _beats(one, row)]
        if better:
            nearest = min(better, key=lambda one: (one["kl"]["mean"], one["weight_bytes"], one["name"]))
            parts.append(f"{nearest['name']} is no larger and closer")
    return "; ".join(parts)


def _where(source: Source, row: Mapping[str, Any]) -> str:
    schemes = list(source.schemes.values())
    quantized = bool(schemes or source.checkpoint.block_types)
    facts: dict[str, set[Any]] = {
        "format": {str(row["format"]).partition(" ")[0]} if quantized else set(),
        "grid": {one.grid for one in schemes}, "activations": {one.activations for one in schemes},
        "rounds inputs": {"yes" if one.activations else "no" for one in schemes},
        "quantized": {"yes" if quantized else "no"},
    }
    return next(words for question, answer, words in WHERE if answer in facts[question])


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether it is no larger, closer to the base by more than chance, and runs in the same way."""
    if one is other or one["weight_bytes"] > other["weight_bytes"]:
        return False
    gap = other["kl"]["mean"] - one["kl"]["mean"]
    return bool(gap > 2 * (one["kl"]["error"] ** 2 + other["kl"]["error"] ** 2) ** 0.5)
