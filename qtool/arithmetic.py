"""What the last bits of a product depend on beside its inputs: how many threads share its sums, and the instructions.

A run that computes on text notes both. An unfinished one is continued with the threads that it began with, so that it
ends in the bytes that it would have had without the interruption; other instructions cannot be taken up again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qtool import manifest, workspace
from qtool.errors import OutputError


def described(device: torch.device) -> dict[str, Any]:
    """For the identity of a run. gpu: only on one."""
    here = {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return {**here, "gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else here


def resume(out: Path) -> str | None:
    """Take as many threads as the unfinished run of this output has, if there is one; returns what people are told."""
    try:
        before = (workspace.unfinished(out) or {}).get(manifest.ARITHMETIC)
    except OutputError:  # the workspace says so when it is opened
        return None
    count, now = before.get("threads") if isinstance(before, dict) else None, torch.get_num_threads()
    if type(count) is not int or count == now or not 0 < count <= 1024:
        return None
    torch.set_num_threads(count)
    return (f"the unfinished run began with {count} thread{'s' if count > 1 else ''}, so it goes on with as many and "
            f"not with {now}, on which the last bits of sums depend; --restart begins again with {now}")
