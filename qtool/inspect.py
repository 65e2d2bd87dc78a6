"""What is in a checkpoint: schemes, sizes and errors, measured from its files and told by its manifest.

The manifest knows the errors on held-out text; everything about storage is taken from the files themselves.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qtool
from qtool import footprint, manifest, ops, quality
from qtool.decode import Source
from qtool.errors import CheckpointError, InputError, ModelError
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, NAMES_OF_DTYPES, TensorSpec, all_finite, any_number

SCHEMA = 1
Step = Callable[[int, int, str], None]  # done, total, what is at hand
TOLERANCE = 1e-3  # of a recorded error against the measured one: sums may be taken in other orders
FIRST = ("name", "stored", "block", "scheme_label", "bits", "group_size", "symmetric", "shape", "bytes",
         "bits_per_weight", "relative_error", "weight_error", "weight_sqnr_db", "sqnr_db", "tokens",
         "outlier_features")


def no_steps(done: int, total: int, text: str) -> None:
    """For callers that show no progress."""


def system() -> dict[str, Any]:
    """What of this machine matters for speed."""
    memory = _meminfo()
    devices = [{"name": f"cuda:{index} {torch.cuda.get_device_name(index)}",
                "memory": torch.cuda.get_device_properties(index).total_memory}
               for index in range(torch.cuda.device_count())]
    return {
        "schema": SCHEMA, "qtool": qtool.__version__, "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}", "torch": torch.__version__,
        "threads": torch.get_num_threads(), "transformers": importlib.metadata.version("transformers"),
        "ops": ops.backend(), "cores": len(os.sched_getaffinity(0)), "cpu": torch.backends.cpu.get_cpu_capability(),
        "memory": memory.get("MemTotal", 0), "memory_free": memory.get("MemAvailable", 0), "devices": devices,
    }


def record_of(source: Source) -> dict[str, Any] | None:
    """The manifest beside the weights; None where qtool did not write them. Raises CheckpointError for a bad one."""
    folder = _folder(source)
    if not (folder / manifest.NAME).is_file():
        return None
    record = manifest.load(folder)
    return record if source.kind != "gguf" or Path(source.origin).name in record.get("outputs", {}) else None


def _folder(source: Source) -> Path:
    """Where the files lie; the config and tokenizer of a GGUF file are elsewhere."""
    return Path(source.origin).parent if source.kind == "gguf" else source.directory


def summary(source: Source) -> dict[str, Any]:
    """Architecture, sizes and schemes (see docs/json.md); nothing but headers and the manifest is read."""
    record = record_of(source)
    parameters = sum(spec.elements for spec in source.specs.values())
    stored = footprint.stored_bytes(source)
    rows = layers(source, record) if source.schemes or source.checkpoint.block_types else []
    kind_and_error = manifest.errors(rows)
    return {
        "schema": SCHEMA, "path": source.origin, "kind": source.kind,
        "architecture": (source.config.get("architectures") or [source.config.get("model_type", "unknown")])[0],
        "format": stored_name(source), "dtype": dtype_name(source.dtype),
        "parameters": parameters, "weight_bytes": stored,
        "bits_per_parameter": round(8 * stored / max(parameters, 1), 4),
        "bits_per_weight": bits_per_weight(source), "schemes": _schemes(rows),
        "not_quantized": _not_quantized(source, record), "error": kind_and_error,
        "kv_cache": "fp8" if source.cache_scales() else None, "outliers": _outliers(rows), "made_by": _made_by(record),
        "allocation": {key: value for key, value in ((record or {}).get("allocation") or {}).items()
                       if key != "linears"} or None,
    }


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
    sizes, place = _linear_bytes(source), {name: index for index, name in enumerate(recorded)}
    rotated = _rotation(record)["tensors"]
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


def compare(source: Source, base: Source, rows: list[dict[str, Any]], step: Step = no_steps) -> dict[str, Any]:
    """Measure |W - Q|² / |W|² of every row against the same tensor of `base`, one tensor at a time, into the rows.

    Returns which of the other tensors differ. Raises InputError when the two are not the same architecture.
    """
    untied = _rotation(record_of(source))["untied"]
    _refuse_other_model(source, base, untied)
    names = {row["stored"] + ".weight": row for row in rows}
    changed, equal = [], 0
    for done, name in enumerate(source.specs):
        step(done, len(source.specs), name)
        if name in untied:  # the original has it in its embedding
            continue
        original = base.read(name)
        if name not in names:
            same = torch.equal(original.to(source.specs[name].dtype), source.read(name))
            equal += same
            changed += [] if same else [name]
            continue
        row, weight = names[name], original.float()
        if row.get("rescaled"):  # scaled or rotated, the inverse lies in another tensor: no like for like
            continue
        error = quality.weight_error(weight, weight - source.decoded(row["stored"]))
        row["recorded_weight_error"] = row["weight_error"]
        row["weight_error"] = float(f"{error:.6g}")
        row["weight_sqnr_db"] = quality.sqnr_db(error)
        if row["sqnr_db"] is None:
            row["sqnr_db"] = row["weight_sqnr_db"]
    return {"against": base.origin, "equal_tensors": equal, "changed_tensors": changed}


def verify(source: Source, rows: list[dict[str, Any]], step: Step = no_steps) -> list[str]:
    """Everything that is wrong with the files, one sentence each; empty when nothing is.

    Hashes against the manifest, tensor names, dtypes and shapes against the format and the architecture, every tensor
    decoded and finite, and, after compare(), the measured errors against the recorded ones.
    """
    record = record_of(source)
    problems = _wrong_hashes(source, record, step) if record else []
    problems += _wrong_layout(source, record, step)
    for done, (name, spec) in enumerate(source.specs.items()):
        step(done, len(source.specs), name)
        try:
            tensor = source.read(name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if spec.dtype in FLOATING and not all_finite(tensor):
            problems.append(f"{name}: {int((~torch.isfinite(tensor)).sum())} values are NaN or infinite")
    for row in rows:
        before, now = row.get("recorded_weight_error"), row["weight_error"]
        if before is not None and abs(before - now) > TOLERANCE * max(before, 1e-9):
            problems.append(f"{row['stored']}: its weight error is {now:g}, but the manifest says {before:g}; the "
                            "original is another model, or the file was changed")
    return problems


def bits_per_weight(source: Source) -> float:
    """Bits of a quantized weight, its share of scales and zero points included; without any, of a parameter."""
    sizes = _linear_bytes(source)
    if sizes:
        weights = sum(spec.elements for name, spec in source.specs.items() if name.removesuffix(".weight") in sizes)
        return round(8 * sum(sizes.values()) / max(weights, 1), 4)
    parameters = sum(spec.elements for spec in source.specs.values())
    return round(8 * footprint.stored_bytes(source) / max(parameters, 1), 4)


def _linear_bytes(source: Source) -> dict[str, int]:
    """Bytes of every quantized linear, its scales and zero points included."""
    if source.checkpoint.block_types:
        return {name.removesuffix(".weight"): size for name, (_, size) in source.checkpoint.block_types.items()}
    suffixes = source.format.SUFFIXES if source.format else ()
    return {linear: sum(source.checkpoint.specs[name].nbytes for suffix in suffixes
                        if (name := f"{linear}.{suffix}") in source.checkpoint.specs) for linear in source.schemes}


def stored_name(source: Source) -> str | None:
    """The format of the files: compressed-tensors, gguf with its block types, ...; None for plain weights."""
    if source.kind == "gguf":
        sizes = footprint.gguf_bytes(source)
        return "gguf " + ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))
    return source.format.NAME if source.format else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.9 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _schemes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
    reasons, quantized = {one["name"]: one["reason"] for one in (record or {}).get("kept", [])}, _linear_bytes(source)
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


def _made_by(record: dict[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    recipe, used = record["recipe"], record["calibration"] or {}
    method = " + ".join(next(iter(step)) for step in recipe["steps"]) if recipe else "export"
    return {"qtool": record["qtool"], "source": record["source"].get("name", record["source"].get("origin")),
            "method": method, "calibration": used.get("source"),
            "tokens": used.get("samples", 0) * used.get("sequence_length", 0)}


def _rotation(record: dict[str, Any] | None) -> dict[str, list[str]]:
    """What a manifest says of rotated tensors; empty lists where none were."""
    return (record or {}).get("rotation") or {"tensors": [], "untied": []}


def _refuse_other_model(source: Source, base: Source, untied: list[str]) -> None:
    missing = sorted((set(source.specs) ^ set(base.specs)) - set(untied))
    if missing:
        where = base.origin if missing[0] not in base.specs else source.origin
        raise InputError(f"{source.origin} and {base.origin} are not the same architecture: {missing[0]} "
                         f"({len(missing)} tensors in all) is not in {where}; give the model that it was made from")
    for name, spec in source.specs.items():
        if name in base.specs and spec.shape != base.specs[name].shape:
            raise InputError(f"{name} has shape {list(spec.shape)} in {source.origin}, but "
                             f"{list(base.specs[name].shape)} in {base.origin}; give the model that it was made from")


def _wrong_hashes(source: Source, record: dict[str, Any], step: Step) -> list[str]:
    problems = []
    for done, (name, digest) in enumerate(record["outputs"].items()):
        step(done, len(record["outputs"]), name)
        path = _folder(source) / name
        if not path.is_file():
            problems.append(f"{path}: is in the manifest, but not there")
        elif manifest.file_hash(path) != digest:
            problems.append(f"{path}: is not as it was written (its sha256 differs from the manifest's)")
    return problems


def _wrong_layout(source: Source, record: dict[str, Any] | None, step: Step) -> list[str]:
    """Names, dtypes and shapes of the packed tensors as the format lays them out, of the others as the model wants."""
    problems = []
    if record is not None and source.format is not None:
        for layer in record["layers"]:
            expected = Scheme.model_validate(layer["scheme"])
            if source.schemes.get(layer["stored"]) != expected:
                problems.append(f"{layer['stored']}: the manifest says {expected.label}, config.json does not")
                continue
            for spec in source.format.layout(layer["stored"], tuple(layer["shape"]), expected, source.dtype):
                if source.checkpoint.specs.get(spec.name) != spec:
                    problems.append(f"{spec.name}: missing, or not {NAMES_OF_DTYPES[spec.dtype]} {list(spec.shape)}")
        extra = sorted(set(source.schemes) - {layer["stored"] for layer in record["layers"]})
        problems += [f"{name}: is quantized, but not in the manifest" for name in extra]
    if record is not None and source.checkpoint.block_types:
        wanted = {f"{layer['stored']}.weight": layer["scheme"]["grid"] for layer in record["layers"]}
        found_types = {name: kind for name, (kind, _) in source.checkpoint.block_types.items()}
        problems += [f"{name}: the manifest says {wanted.get(name)}, the file {found_types.get(name)}"
                     for name in sorted({*wanted, *found_types}) if wanted.get(name) != found_types.get(name)]
    step(0, 1, "building the architecture")
    try:
        from qtool.models import skeleton

        skeleton.build(source.directory, source.config, source.specs)
    except ModelError as error:
        problems.append(str(error))
    return problems


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _meminfo() -> dict[str, int]:
    """Bytes by name, where the system tells (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}
