"""A whole model with its weights, for evaluation. Quantizing never needs it: it goes block by block (blocks.py)."""

from __future__ import annotations

import torch
from torch import nn

from qtool.models.blocks import Read, fill
from qtool.models.skeleton import Skeleton


def load_model(skeleton: Skeleton, read: Read, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of `skeleton`, which is used up, with weights in `dtype` on `device`, read one by one."""
    with torch.no_grad():
        fill(skeleton, skeleton.model, "", read, device, dtype)
    return skeleton.model
