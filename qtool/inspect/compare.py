"""Errors measured from the files: a checkpoint beside the one that it was made from."""

from __future__ import annotations

from typing import Any

import torch

from qtool import quality
from qtool.decode import Source
from qtool.errors import CalibrationError, InputError, ModelError
from qtool.inspect import outputs
from qtool.inspect.files import Step, no_steps, record_of, rotation_of


def compare(source: Source, base: Source, rows: list[dict[str, Any]], step: Step = no_steps,
            tokens: int = 0) -> dict[str, Any]:
    """Measure |W - Q|² / |W|² of every row against the same tensor of `base`, one tensor at a time, into the rows; with
    `tokens` also what quantization does to the outputs (outputs.py).

    Returns which of the other tensors differ, and on what the outputs were measured or why not. Raises InputError when
    the two are not the same architecture.
    """
    untied = rotation_of(record_of(source))["untied"]
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
    return {"against": base.origin, "equal_tensors": equal, "changed_tensors": changed,
            "rescaled": sum(bool(row.get("rescaled")) for row in rows), **_outputs(source, base, rows, step, tokens)}


def _outputs(source: Source, base: Source, rows: list[dict[str, Any]], step: Step, tokens: int) -> dict[str, Any]:
    if not tokens:
        return {"outputs": None, "no_outputs": None}
    try:
        return {"outputs": outputs.add(source, base, rows, tokens, step), "no_outputs": None}
    except (CalibrationError, ModelError) as error:
        return {"outputs": None, "no_outputs": str(error)}


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
