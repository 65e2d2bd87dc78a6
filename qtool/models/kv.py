"""How large the keys and values are that attention keeps, as it hands them to a cache (rotated, after any norm)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qtool.errors import ModelError
from qtool.models.blocks import BlockArguments
from qtool.models.streams import StreamStore

FP8_TOP = 448.0


class _Watcher:
    """Stands in for a cache: notes the largest magnitudes and hands everything back."""

    def __init__(self) -> None:
        self.largest: list[torch.Tensor] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        self.largest.append(torch.stack([keys.abs().amax().float(), values.abs().amax().float()]))
        return keys, values


@torch.inference_mode()
def scales(block: nn.Module, name: str, arguments: BlockArguments, index: int, store: StreamStore,
           batches: Iterable[slice], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """float32 [2], on the CPU: of keys and of values, the largest magnitude over the top of E4M3.

    Raises ModelError when the block called `name` gives nothing to its cache.
    """
    watcher = _Watcher()
    for batch in batches:
        args, kwargs = arguments.for_block(index, batch.stop - batch.start)
        block(store.read(batch).to(device=device, dtype=dtype, copy=True), *args,
              **{**kwargs, "past_key_values": watcher})
    if not watcher.largest:
        raise ModelError(f"{name}: its attention keeps no keys and values in a cache; leave kv_cache out")
    largest = torch.stack(watcher.largest).amax(0).cpu()
    return (largest / FP8_TOP).clamp_min(torch.finfo(torch.float16).tiny)
