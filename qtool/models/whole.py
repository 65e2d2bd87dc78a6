"""A whole model with its weights, for evaluation. Quantizing never needs it: it goes block by block (blocks.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from qtool.models.blocks import Read, fill
from qtool.models.inputs import multiply_codes, round_inputs
from qtool.models.skeleton import Skeleton
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE, QuantizedTensor


def load_model(skeleton: Skeleton, read: Read, device: torch.device, dtype: torch.dtype,
               schemes: Mapping[str, Scheme] | None = None,
               quantized: Callable[[str], QuantizedTensor] | None = None) -> nn.Module:
    """The model of `skeleton`, which is used up, with weights in `dtype` on `device`, read one by one.

    schemes: of quantized linears by their name in the checkpoint; those that say so round their inputs.
    quantized: gives one of them with its codes (which LLM.int8() multiplies) and the scale of its inputs, if static.
    """
    with torch.no_grad():
        fill(skeleton, skeleton.model, "", read, device, dtype)
    if schemes:
        names = (name for index in range(len(skeleton.blocks)) for name in skeleton.block_linears(index))
        stored = {name: skeleton.source(name + ".weight").removesuffix(".weight") for name in names}
        here = {name: schemes[linear] for name, linear in stored.items() if linear in schemes}
        static = {name: quantized(stored[name]).extra[INPUT_SCALE].to(device) for name, scheme in here.items()
                  if quantized is not None and scheme.activations == "tensor"}
        round_inputs(skeleton.model, here, static)
        if quantized is not None:
            multiply_codes(skeleton.model, here, lambda name: quantized(stored[name]).to(device))
    return skeleton.model
