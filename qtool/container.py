"""The files that a run writes its tensors to: safetensors, or one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from qtool.checkpoint.writer import ShardWriter, plan_shards
from qtool.mixtures import MIXTURES
from qtool.plan import Plan


class Writer(Protocol):
    """Files whose tensors and sizes are known when they are opened; an unfinished one is continued."""

    folder: Path

    def write(self, name: str, tensor: torch.Tensor) -> None: ...
    def read_back(self, name: str) -> torch.Tensor: ...
    def sync(self) -> None: ...
    def finish(self) -> None: ...


def open_writer(plan: Plan, folder: Path, name: str) -> Writer:
    """For the outputs of a plan, in `folder` (of several outputs, in its own folder there).

    name: of the model, for formats that name their file after it.
    """
    folder = folder / plan.name
    folder.mkdir(exist_ok=True)
    if plan.gguf is None:
        shards = plan_shards(plan.outputs, int(plan.recipe.shard_gb * 1e9))
        return ShardWriter(folder, shards, getattr(plan.format, "METADATA", None))
    from gguf import GGMLQuantizationType, LlamaFileType

    from qtool.checkpoint.gguf_writer import GgufWriter

    mixture = str(plan.recipe.mixture)
    types = {f"{one.stored}.weight": GGMLQuantizationType[one.scheme.grid.upper()]
             for one in (*plan.linears, *plan.outside)}
    path = folder / f"{name}-{mixture.upper()}.gguf"
    return GgufWriter(path, plan.outputs, plan.gguf, types, LlamaFileType(MIXTURES[mixture][0]))
