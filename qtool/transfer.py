"""Whether another format can hold exactly what a quantized checkpoint holds: codes, zero points and scales.

Everything is decided before anything is written, from headers and from the small tensors of each linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from qtool import formats, found
from qtool.decode import Source
from qtool.errors import InputError
from qtool.models import outline, skeleton
from qtool.models.skeleton import Skeleton
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE

OTHERWISE = "(or --to hf, which keeps dense weights, or --requantize RECIPE, which rounds them again)"


@dataclass(frozen=True)
class Transfer:
    """How the target holds the source.

    schemes: of every quantized linear.  skipped: the other linears.  told: what a config calls these.
    dtype: for layout and pack, the model's, or float32 where the scales need it.  scale_dtype: of the scales that are
    packed.  attentions: whose scales of cached keys and values go over.
    """

    schemes: dict[str, Scheme]
    skipped: tuple[str, ...]
    told: tuple[str, ...]
    dtype: torch.dtype
    scale_dtype: torch.dtype
    attentions: tuple[str, ...] = ()


def plan(source: Source, target: ModuleType) -> Transfer:
    """Raises InputError, which names a linear, when the target cannot hold it without any change."""
    linears = _linears(source)
    outside = [linear for linear in source.schemes if linear not in linears.inside]
    if outside:
        raise InputError(f"{outside[0]} is quantized, but {target.NAME} as qtool writes it has only the linears of the "
                         f"blocks quantized {OTHERWISE}")
    for linear, scheme in source.schemes.items():
        reason = target.check(scheme, linear, source.specs[linear + ".weight"].shape)
        reason = reason or _in_the_way(source, linear)
        if reason:
            raise InputError(f"{reason} {OTHERWISE}")
    skipped = tuple(name for name in linears.modules if name not in source.schemes)
    reason = target.check_together(source.schemes, skipped)
    reason = reason or formats.check_model(target, str(source.config.get("model_type")), source.schemes)
    if reason:
        raise InputError(f"{reason} {OTHERWISE}")
    wide = _needs_float32(source, target)
    dtype = torch.float32 if wide else source.dtype
    told = linears.bones.both_names(linears.modules[name] for name in skipped)
    return Transfer(dict(source.schemes), skipped, tuple(told), dtype,
                    torch.float32 if wide else target.scale_dtype(source.dtype),
                    tuple(source.cache_scales()) if hasattr(target, "kv_scales") else ())


@dataclass(frozen=True)
class Linears:
    """modules: stored name -> path in the model, of all linears of the architecture.  inside: stored names of those
    inside the blocks (routers left out).  bones: the model."""

    modules: dict[str, str]
    inside: frozenset[str]
    bones: Skeleton


def _linears(source: Source) -> Linears:
    described = source.directory, source.config, source.specs
    bones = outline.build(*described) or skeleton.build(*described)
    inside = [name for index in range(len(bones.blocks)) for name in bones.block_linears(index)]
    names = [*inside, *([bones.head] if bones.head else []), *bones.routers]
    return Linears({bones.stored(name): name for name in names}, frozenset(map(bones.stored, inside)), bones)


def _in_the_way(source: Source, linear: str) -> str | None:
    reason = source.obstacle(linear)
    return f"{linear}: {reason}" if reason else None


def _needs_float32(source: Source, target: ModuleType) -> bool:
    """Whether the target must keep scales as float32; InputError when it cannot keep them at all."""
    usual = target.scale_dtype(source.dtype)
    inexact: list[tuple[str, float]] = []
    wide = False
    for linear, scale in _free_scales(source):
        wider = getattr(target, "WIDER", {}).get(source.schemes[linear].grid, ())
        lost = _changed(scale, usual)
        if lost is not None and any(_changed(scale, dtype) is None for dtype in wider):
            wide = True
        elif lost is not None:
            inexact.append((linear, lost))
    _refuse(source, inexact, usual, f"{target.NAME} for this model",
            f"quantize the original with --format {target.NAME} {OTHERWISE}")
    return wide


def refuse_inexact(source: Source, dtype: torch.dtype, where: str, remedy: str) -> None:
    """InputError when there are scales that `dtype`, in which `where` keeps scales, cannot hold exactly."""
    changed = [(linear, _changed(scale, dtype)) for linear, scale in _free_scales(source)]
    _refuse(source, [(linear, value) for linear, value in changed if value is not None], dtype, where, remedy)


def _refuse(source: Source, inexact: list[tuple[str, float]], dtype: torch.dtype, where: str, remedy: str) -> None:
    if inexact:
        linear, value = inexact[0]
        stored, wanted = (str(one).removeprefix("torch.") for one in (source.stored_scale(linear).dtype, dtype))
        raise InputError(
            f"{len(inexact)} of {len(source.schemes)} linears have {stored} scales that {wanted}, the scale type of "
            f"{where}, cannot hold exactly (first: {value:.9g} in {linear}), so the export would change the weights; "
            f"{remedy}")


def _changed(scale: torch.Tensor, dtype: torch.dtype) -> float | None:
    """The first scale that `dtype` cannot hold, or None."""
    if dtype is scale.dtype:
        return None
    changed = scale.to(dtype).double() != scale.double()
    return float(scale[changed][0]) if bool(changed.any()) else None


def _free_scales(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """The scales of the linears whose grid has any value of a dtype as scale; nothing else is read."""
    for linear, scheme in source.schemes.items():
        if found.load("grids", scheme.grid).FREE_SCALES:  # others are stored as the grid has them, in every format
            yield linear, source.stored_scale(linear)
            if scheme.activations == "tensor":
                yield linear, source.read_quantized(linear).extra[INPUT_SCALE]
