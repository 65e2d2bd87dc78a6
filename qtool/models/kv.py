"""Keys and values as attention hands them to a cache (rotated, after any norm): how large they are; kept in FP8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qtool.activations import FP8_TOP, to_fp8
from qtool.errors import ModelError
from qtool.models.blocks import BlockArguments
from qtool.models.streams import StreamStore


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


class _Rounding:
    """Stands before a cache, or in the place of one: hands on what E4M3 keeps, with scales [1] of keys and values."""

    def __init__(self, key_scale: torch.Tensor, value_scale: torch.Tensor, cache: Any) -> None:
        self.scales, self.cache = (key_scale, value_scale), cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        first, second = self.scales
        kept = (to_fp8(keys / first) * first).to(keys.dtype), (to_fp8(values / second) * second).to(values.dtype)
        return kept if self.cache is None else self.cache.update(*kept, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


def round_cache(model: nn.Module, scales: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """From now on these attention modules of `model`, by path, see their keys and values as a cache in FP8 has them.

    Whether they are given a cache or not: without one, nothing is kept from one call to the next.
    """
    for path, (keys, values) in scales.items():
        device = next(model.get_submodule(path).parameters()).device

        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], keys: torch.Tensor = keys.float().to(device),
                 values: torch.Tensor = values.float().to(device)) -> Any:
            return args, {**kwargs, "past_key_values": _Rounding(keys, values, kwargs.get("past_key_values"))}

        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
