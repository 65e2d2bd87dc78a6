"""A whole model with its weights, or one of its blocks, computing as engines do, for evaluation.

Quantizing needs neither: it rounds as it goes, block by block (blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from qtool.errors import ModelError
from qtool.models.blocks import Read, fill, load_block
from qtool.models.inputs import multiply_codes, round_inputs
from qtool.models.kv import round_cache
from qtool.models.skeleton import Skeleton
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE, QuantizedTensor

Schemes = Mapping[str, Scheme]
Quantized = Callable[[str], QuantizedTensor]
CacheScales = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def load_model(skeleton: Skeleton, read: Read, device: torch.device, dtype: torch.dtype, schemes: Schemes | None = None,
               quantized: Quantized | None = None, cached: CacheScales | None = None) -> nn.Module:
    """The model of `skeleton`, which is used up, with weights in `dtype` on `device`, read one by one.

    schemes: of quantized linears by their name in the checkpoint; those that say so round their inputs.
    quantized: gives one of them with its codes (which LLM.int8() multiplies) and the scale of its inputs, if static.
    cached: scales of the keys and values that attention modules (by their name in the checkpoint) keep in FP8.
    """
    with torch.no_grad():
        fill(skeleton, skeleton.model, "", read, device, dtype)
    _round(skeleton, skeleton.model, "", range(len(skeleton.blocks)), device, schemes, quantized, cached)
    return skeleton.model


def load_rounding_block(skeleton: Skeleton, index: int, read: Read, device: torch.device, dtype: torch.dtype,
                        schemes: Schemes | None = None, quantized: Quantized | None = None,
                        cached: CacheScales | None = None) -> nn.Module:
    """Block `index` as it is in load_model's model; `skeleton` stays as it is."""
    block = load_block(skeleton, index, read, device, dtype)
    _round(skeleton, block, skeleton.blocks[index] + ".", [index], device, schemes, quantized, cached)
    return block


def _round(skeleton: Skeleton, module: nn.Module, prefix: str, blocks: Iterable[int], device: torch.device,
           schemes: Schemes | None, quantized: Quantized | None, cached: CacheScales | None) -> None:
    """What the linears and attentions of these blocks round, in `module`, which lies at `prefix` of the model."""
    indices = list(blocks)
    if schemes:
        names = (name for index in indices for name in skeleton.block_linears(index))
        stored = {name.removeprefix(prefix): skeleton.stored(name) for name in names}
        here = {path: schemes[linear] for path, linear in stored.items() if linear in schemes}
        if quantized is not None:
            round_inputs(module, here, lambda path: quantized(stored[path]).extra[INPUT_SCALE].to(device))
            multiply_codes(module, here, lambda path: quantized(stored[path]).to(device))
    if cached:
        attentions = filter(None, map(skeleton.attention, indices))
        round_cache(module, {path.removeprefix(prefix): cached[name] for path, name in attentions if name in cached})


def generation_defaults(model: nn.Module, directory: Path) -> None:
    """What generation_config.json says, if there is one: which tokens end a text, and how to sample. ModelError."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)  # type: ignore[assignment]
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory}/generation_config.json: transformers cannot read it: {error}") from None
