"""Whether the files hold what they say: layout, architecture, every tensor decoded, in two ways."""

from __future__ import annotations

from typing import Any

import torch

from qtool.decode import Source
from qtool.errors import CheckpointError, ModelError
from qtool.inspect.files import Step, no_steps, record_of
from qtool.inspect.second_reading import SecondReading
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, NAMES_OF_DTYPES, all_finite

TOLERANCE = 1e-3  # of a recorded error against the measured one: sums may be taken in other orders


def verify(source: Source, rows: list[dict[str, Any]], step: Step = no_steps,
           once: dict[str, str] | None = None) -> list[str]:
    """Everything that is wrong with what the files hold, one sentence each; empty when nothing is.

    Tensor names, dtypes and shapes against the format and the architecture, every tensor decoded and finite, quantized
    ones by a second decoder too (second_reading.py) and with the digest of what was solved; after compare(), the
    measured errors against the recorded ones. damage() has compared the files before. once: filled with the linears
    that only one decoder knows, and why.
    """
    record = record_of(source)
    problems = _wrong_layout(source, record, step)
    dense = record is not None and record.get("format") == "hf"
    recorded = {} if dense or record is None else {
        layer["stored"]: layer["values_sha256"] for layer in record["layers"] if "values_sha256" in layer}
    second = SecondReading(source, recorded)
    problems += second.problems
    if once is not None:
        once.update(second.skipped)
    for done, (name, spec) in enumerate(source.specs.items()):
        step(done, len(source.specs), name)
        linear = name.removesuffix(".weight")
        if linear != name and (linear in source.schemes or name in source.checkpoint.block_types):
            problems += second.wrong(linear)
            continue
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
