"""What this machine has."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import qtool
from qtool import estimate, ops
from qtool.inspect.files import SCHEMA


def system() -> dict[str, Any]:
    """What of this machine matters for speed."""
    memory = estimate.meminfo()
    devices = [{"name": f"cuda:{index} {torch.cuda.get_device_name(index)}",
                "memory": torch.cuda.get_device_properties(index).total_memory}
               for index in range(torch.cuda.device_count())]
    return {
        "schema": SCHEMA, "qtool": qtool.__version__, "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}", "torch": torch.__version__,
        "threads": torch.get_num_threads(), "transformers": importlib.metadata.version("transformers"),
        "ops": ops.backend(), "cores": len(os.sched_getaffinity(0)), "cpu": torch.backends.cpu.get_cpu_capability(),
        "memory": memory.get("MemTotal", 0), "memory_free": memory.get("MemAvailable", 0), "devices": devices,
    }
