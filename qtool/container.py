"""The files that a run writes its tensors to: safetensors, or one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qtool.checkpoint.writer import ShardWriter, header_bytes, plan_shards
from qtool.mixtures import MIXTURES
from qtool.plan import Plan

if TYPE_CHECKING:
    from qtool.checkpoint.gguf_writer import GgufModel


class Writer(Protocol):
    """Files whose tensors and sizes are known when they are opened; an unfinished one is continued."""

    folder: Path

    @property
    def names(self) -> list[str]: ...
    def write(self, name: str, tensor: torch.Tensor) -> None: ...
    def read_back(self, name: str) -> torch.Tensor: ...
    def sync(self) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


def open_writer(plan: Plan, folder: Path, name: str, resumed: bool = False) -> Writer:
    """For the outputs of a plan, in `folder` (of several outputs, in its own folder there).

    name: of the model, for formats that name their file after it.  resumed: the files must be there.
    """
    folder = folder / plan.name
    folder.mkdir(exist_ok=True)
    if plan.gguf is None:
        shards = plan_shards(plan.outputs, int(plan.recipe.shard_gb * 1e9))
        return ShardWriter(folder, shards, getattr(plan.format, "METADATA", None), resumed)
    from qtool.checkpoint.gguf_writer import GgufWriter

    path, types, kind = _gguf(plan, folder, name)
    return GgufWriter(path, plan.outputs, _described(plan), types, kind, resumed)


def files(plan: Plan, name: str) -> dict[str, int]:
    """Bytes of each file that open_writer would write, by name; exact."""
    if plan.gguf is None:
        shards = plan_shards(plan.outputs, int(plan.recipe.shard_gb * 1e9))
        metadata = getattr(plan.format, "METADATA", None)
        return {shard.file_name: len(header_bytes(shard.specs, metadata)) + sum(spec.nbytes for spec in shard.specs)
                for shard in shards}
    from qtool.checkpoint import gguf_writer

    path, types, kind = _gguf(plan, Path(), name)
    return {path.name: gguf_writer.file_bytes(plan.outputs, _described(plan), types, kind)}


def _described(plan: Plan) -> GgufModel:
    assert plan.gguf is not None
    return plan.gguf


def _gguf(plan: Plan, folder: Path, name: str) -> tuple[Path, dict[str, Any], Any]:
    """The file of a plan, the block types of its tensors and what the file calls their mixture."""
    from gguf import GGMLQuantizationType, LlamaFileType

    mixture = str(plan.recipe.mixture)
    types = {f"{one.stored}.weight": GGMLQuantizationType[one.scheme.grid.upper()]
             for one in (*plan.linears, *plan.outside)}
    return folder / f"{name}-{mixture.upper()}.gguf", types, LlamaFileType(MIXTURES[mixture][0])
