"""Which device a name means, and whether it is there."""

from __future__ import annotations

import re

import torch

from qtool.errors import InputError


def named(name: str) -> torch.device:
    """The device called auto, cpu, cuda or cuda:1, there or not (one may plan for it). Raises InputError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
        raise InputError(f"device '{name}' is not known; use auto, cpu, cuda or cuda:1")
    return torch.device(name)


def refuse_missing(device: torch.device) -> torch.device:
    """The device, if it is here. Raises InputError."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device} is not there ({torch.cuda.device_count()} CUDA devices are visible); "
                         "use --device cpu")
    return device
