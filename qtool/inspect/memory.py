"""What a checkpoint needs to run, as it is and with every scheme that it could have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool import footprint, formats, found, plan_gguf, recipe
from qtool.decode import Source
from qtool.errors import ModelError, PlanError
from qtool.inspect.files import stored_name
from qtool.mixtures import MIXTURES
from qtool.models import outline
from qtool.models import skeleton as skeletons
from qtool.models.skeleton import Skeleton
from qtool.recipe import Recipe, Scheme
from qtool.stages import Layout, LinearPlan
from qtool.tensors import FLOATING

GROUPS = (128, 64, 32)  # tried in turn where a group size does not divide every input width
BY_FLAGS = {f"rtn --bits {bits}": Scheme(bits=bits) for bits in (8, 3, 2)}
INT4_FORMATS = {"gptq": Scheme(), "awq": Scheme(symmetric=False), "mlx": Scheme(symmetric=False)}


@dataclass(frozen=True)
class Wanted:
    """A scheme in a format, and what asks for it: --method NAME."""

    method: str
    format: str
    scheme: Scheme


def memory(source: Source, context: int, batch: int, kv_dtype: str | None = None) -> dict[str, Any]:
    """footprint.inference of the checkpoint, and `schemes`: the same with other weights; largest first.

    Bytes are those of the formats' layouts: what quantize writes. Schemes that this architecture or these shapes cannot
    have are in `not_possible`, each with the reason. Raises InputError.
    """
    known = footprint.inference(source, context, batch, kv_dtype)
    rows, refused = [_row(known, stored_name(source) or "as it is", None, [], known["weights"])], []
    rows[0]["this"] = True
    try:
        bones = _skeleton(source)
    except ModelError as error:
        return {**known, "schemes": rows, "not_possible": [{"scheme": "all", "format": None, "why": str(error)}]}
    rows.append(_row(known, "bf16", "hf", [], _dense_bytes(source)))
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for wanted in _wanted():
        linears, why = _linears(source, bones, wanted)
        label = linears[0].scheme.label if linears else wanted.scheme.label
        if why:
            refused.append({"scheme": label, "format": wanted.format, "method": wanted.method, "why": why})
        elif (label, wanted.format) in merged:
            merged[label, wanted.format]["methods"].append(wanted.method)
        else:
            size = _bytes(source, bones, wanted.format, linears)
            merged[label, wanted.format] = _row(known, label, wanted.format, [wanted.method], size)
    rows += merged.values()
    mixed, why = _mixtures(source, bones)
    rows += [_row(known, name, "gguf", [name], size) for name, size in mixed.items()]
    refused += [{"scheme": "mixtures", "format": "gguf", "method": "q4_k_m", "why": why}] if why else []
    rows[1:] = sorted(rows[1:], key=lambda row: (-row["weights"], row["scheme"]))
    return {**known, "schemes": rows, "not_possible": refused}


def _row(known: dict[str, Any], scheme: str, format_: str | None, methods: list[str], weights: int) -> dict[str, Any]:
    total = None if known["total"] is None else known["total"] - known["weights"] + weights
    return {"scheme": scheme, "format": format_, "methods": methods, "weights": weights,
            **{key: known[key] for key in ("kv_cache", "activations", "overhead")}, "total": total, "this": False}


def _skeleton(source: Source) -> Skeleton:
    described = source.directory, source.config, source.specs
    return outline.build(*described) or skeletons.build(*described)


def _dense_bytes(source: Source) -> int:
    return sum(spec.elements * (2 if spec.dtype in FLOATING else spec.dtype.itemsize) for spec in source.specs.values())


def _wanted() -> Iterator[Wanted]:
    """The ready recipes with one scheme, and what flags and formats beside them make."""
    for name in recipe.available():
        made = recipe.load(name)
        if made.preset and not (made.mixture or made.budget or made.outputs or made.format == "hf"):
            yield Wanted(made.preset, made.format, made.scheme)
    for method, scheme in BY_FLAGS.items():
        yield Wanted(method, "compressed-tensors", scheme)
    for format_, scheme in INT4_FORMATS.items():
        yield Wanted(f"rtn --format {format_}", format_, scheme)


def _linears(source: Source, bones: Skeleton, wanted: Wanted) -> tuple[list[LinearPlan], str | None]:
    """All linears of the blocks with a scheme, whose groups are made to fit; or why they cannot have it."""
    format_, grid = formats.load(wanted.format), found.load("grids", wanted.scheme.grid)
    plain = [LinearPlan(name, bones.stored(name), shape, wanted.scheme, index)
             for index in range(len(bones.blocks)) for name, shape in bones.block_linears(index).items()]
    scheme = _fitting(wanted.scheme, {one.shape[1] for one in plain})
    linears = [replace(one, scheme=scheme) for one in plain]
    reason = grid.check(scheme) or next(filter(None, (format_.check(scheme, one.name, one.shape)
                                                      for one in linears)), None)
    return linears, reason or format_.check_together({one.stored: scheme for one in linears})


def _fitting(scheme: Scheme, widths: Iterable[int]) -> Scheme:
    """The scheme with the largest group size up to its own that divides every width; as it is, if none does."""
    size = int(scheme.group_size)
    fits = [group for group in GROUPS if group <= size and all(width % group == 0 for width in widths)]
    if scheme.strategy or size == -1 or not fits:
        return scheme
    return scheme.model_copy(update={"group_size": fits[0]}) if size in GROUPS else scheme


def _bytes(source: Source, bones: Skeleton, format_: str, linears: list[LinearPlan],
           outside: Iterable[LinearPlan] = ()) -> int:
    """Of all tensors that would be written."""
    layout = Layout(bones, source.specs, formats.load(format_), source.dtype, False, ())
    return sum(spec.nbytes for stage in layout.stages(linears, list(outside)) for spec in stage.outputs)


def _mixtures(source: Source, bones: Skeleton) -> tuple[dict[str, int], str | None]:
    """Bytes with each mixture of GGUF types; or why this model cannot be a GGUF file."""
    try:
        plan_gguf.described(source, bones)
    except (PlanError, ModelError) as error:
        return {}, str(error)
    shape = plan_gguf.shape_of(source.config, bones, True)
    sizes = {}
    for name in MIXTURES:
        made = Recipe(mixture=name, format="gguf")
        linears = [LinearPlan(linear, bones.stored(linear), size, scheme, index)
                   for index in range(len(bones.blocks)) for linear, size in bones.block_linears(index).items()
                   if (scheme := plan_gguf.base_scheme(made, linear, index, size[1], shape))]
        outside, _, _ = plan_gguf.outside(made, bones, shape)
        sizes[name] = _bytes(source, bones, "gguf", linears, outside) + _widened(source)
    return sizes, None


def _widened(source: Source) -> int:
    """GGUF keeps vectors in float32."""
    return sum(spec.elements * (torch.float32.itemsize - spec.dtype.itemsize) for spec in source.specs.values()
               if len(spec.shape) == 1)
