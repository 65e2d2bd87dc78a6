"""What a plan needs for GGUF: the type of each tensor, also of embeddings and head, which lie outside of the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import found
from qtool.checkpoint.reader import Checkpoint
from qtool.decode import Source
from qtool.errors import PlanError
from qtool.mixtures import EMBEDDING, OUTPUT, Shape, choose, role_of
from qtool.models import outline
from qtool.models.skeleton import Skeleton, config_values
from qtool.recipe import Recipe, Scheme
from qtool.stages import LinearPlan

if TYPE_CHECKING:
    from qtool.checkpoint.gguf_writer import GgufModel

NAME = "gguf"
NO_TYPE = "its rows are no multiple of 32, which no GGUF type holds"


def refuse(recipe: Recipe) -> None:
    """Raises PlanError for a recipe that asks for GGUF without a mixture, or for a mixture in another format."""
    if recipe.format == NAME and recipe.mixture is None:
        raise PlanError("format gguf needs a mixture, which says what type each tensor gets: --method q4_k_m, or "
                        "--set mixture=q4_k_m")
    if recipe.mixture is not None and recipe.format != NAME:
        raise PlanError(f"mixture {recipe.mixture} is of GGUF types, which format {recipe.format} does not hold; leave "
                        "--format out")
    if recipe.mixture is not None and recipe.budget is not None:
        raise PlanError(f"mixture {recipe.mixture} and a budget both choose the type of each tensor; give one of them")


def described(checkpoint: Checkpoint | Source, skeleton: Skeleton) -> GgufModel:
    """What the file will say beside its tensors. Raises PlanError for a model that GGUF cannot hold."""
    from qtool.checkpoint.gguf_metadata import describe  # needs gguf and a tokenizer

    values = outline.stated(checkpoint.config) \
        or config_values(checkpoint.directory, checkpoint.config, checkpoint.specs)
    return describe(values, checkpoint.directory, skeleton.vocabulary, checkpoint.name,
                    Path(checkpoint.origin) if checkpoint.kind == NAME else None,
                    {skeleton.source(name): shape for name, shape in skeleton.parameters.items()})


def shape_of(config: Mapping[str, Any], skeleton: Skeleton, calibrated: bool) -> Shape:
    """What the rules of a mixture look at."""
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    heads = int(config.get("num_attention_heads") or 1)
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    return Shape(len(skeleton.blocks), heads, int(config.get("num_key_value_heads") or heads), int(experts), calibrated)


def base_scheme(recipe: Recipe, name: str, layer: int, columns: int, model: Shape) -> Scheme | None:
    """The scheme of a linear of a block before rules; None: no type fits its rows."""
    assert recipe.mixture is not None
    return _scheme(choose(recipe.mixture, role_of(name), layer, columns, model))


def typed(scheme: Scheme) -> Scheme:
    """A rule that names a type means all of it."""
    whole = getattr(found.load("grids", scheme.grid), "scheme", None)
    return whole if isinstance(whole, Scheme) else scheme


def outside(recipe: Recipe, skeleton: Skeleton,
            model: Shape) -> tuple[list[LinearPlan], list[tuple[str, str]], set[int | None]]:
    """Embedding and head, quantized as the mixture says: (they, what is kept and why, the rules that matched)."""
    assert recipe.mixture is not None
    linears, kept, used = [], [], set[int | None]()
    for name in [*skeleton.embeddings, *([f"{skeleton.head}.weight"] if skeleton.head else [])]:
        rows, columns = skeleton.parameters[name]
        linear = name.removesuffix(".weight")
        role = OUTPUT if linear == skeleton.head or skeleton.head is None else EMBEDDING
        base = _scheme(choose(recipe.mixture, role, 0, columns, model))
        scheme, rule = recipe.scheme_for(linear, base) if base else (None, None)
        used.add(rule)
        if scheme is None:
            kept.append((linear, NO_TYPE if rule is None else f"rule {recipe.rules[rule].match} leaves it as it is"))
            continue
        linears.append(LinearPlan(linear, skeleton.stored(linear), (rows, columns), typed(scheme), -1))
    return linears, kept, used


def _scheme(type_: str | None) -> Scheme | None:
    found_scheme: Scheme | None = None if type_ is None else found.load("grids", type_).scheme
    return found_scheme
