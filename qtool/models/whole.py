"""A whole model with its weights, for evaluation. Quantizing never needs it: it goes block by block (blocks.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from qtool.models.blocks import Read, fill
from qtool.models.inputs import multiply_codes, round_inputs
from qtool.models.kv import round_cache
from qtool.models.skeleton import Skeleton
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE, QuantizedTensor


def load_model(skeleton: Skeleton, read: Read, device: torch.device, dtype: torch.dtype,
               schemes: Mapping[str, Scheme] | None = None,
               quantized: Callable[[str], QuantizedTensor] | None = None,
               cached: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None) -> nn.Module:
    """The model of `skeleton`, which is used up, with weights in `dtype` on `device`, read one by one.

    schemes: of quantized linears by their name in the checkpoint; those that say so round their inputs.
    quantized: gives one of them with its codes (which LLM.int8() multiplies) and the scale of its inputs, if static.
    cached: scales of the keys and values that attention modules (by their name in the checkpoint) keep in FP8.
    """
    with torch.no_grad():
        fill(skeleton, skeleton.model, "", read, device, dtype)
    if schemes:
        names = (name for index in range(len(skeleton.blocks)) for name in skeleton.block_linears(index))
        stored = {name: skeleton.source(name + ".weight").removesuffix(".weight") for name in names}
        here = {name: schemes[linear] for name, linear in stored.items() if linear in schemes}
        if quantized is not None:
            round_inputs(skeleton.model, here, lambda name: quantized(stored[name]).extra[INPUT_SCALE].to(device))
            multiply_codes(skeleton.model, here, lambda name: quantized(stored[name]).to(device))
    if cached:
        attentions = filter(None, map(skeleton.attention, range(len(skeleton.blocks))))
        round_cache(skeleton.model, {path: cached[name] for path, name in attentions if name in cached})
    return skeleton.model
