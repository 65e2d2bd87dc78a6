"""The predictions of a model, window by window: with the whole model in memory, or one block of it at a time.

Both are the same computation on the same tensors, one window at a time; only its order differs. A model that others
are held against is kept as its *exits*, the hidden states after its last block: with them and the weights around the
blocks, any window's logits can be had again, exactly, for a few megabytes a window.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool import estimate, heap, preflight
from qtool.decode import Source
from qtool.models import blocks, skeleton
from qtool.models.statistics import run_block
from qtool.models.streams import StreamStore
from qtool.models.whole import load_model, load_rounding_block

Step = Callable[[int, int, str], None]
Logits = Callable[[int], torch.Tensor]  # window -> [T - 1, vocabulary], what is predicted for tokens 2 .. T
MEMORY = 2 << 30  # bytes of hidden states past which they go to a file
LOGIT_BYTES = 4
SPARE = 0.8  # of the free memory that a whole model may take; the rest is for what it computes


@dataclass(frozen=True)
class Setting:
    """What all models of an evaluation share. ids: int64 [windows, T].  stream: None decides by the free memory."""

    ids: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    stream: bool | None
    step: Step


@dataclass(frozen=True)
class Exits:
    """Hidden states [windows, T, hidden] after the last block.  as_tuple: how the blocks of this family return them."""

    store: StreamStore
    as_tuple: bool


class _Reached(Exception):  # noqa: N818 - no error: what comes after the last block is not wanted
    pass


def logits(source: Source, bones: skeleton.Skeleton, setting: Setting, streamed: bool) -> Logits:
    """The model's predictions; `bones` may be used up. Raises ModelError, CheckpointError."""
    if streamed:
        return after(bones, source, exits_by_block(source, bones, setting), setting)
    return _whole(_load(source, bones, setting), setting)


def reference(source: Source, bones: skeleton.Skeleton, setting: Setting,
              kept: Callable[[Callable[[], Exits | None]], Exits | None]) -> Logits:
    """The same for a model whose predictions are asked for more than once.

    kept: gives the exits of an earlier run, or those of the function that it is given, which it may keep.
    """
    resident: list[nn.Module] = []

    def run() -> Exits | None:
        if streams(source, setting):
            return exits_by_block(source, bones, setting)
        resident.append(_load(source, skeleton.build(source.directory, source.config, source.specs), setting))
        return exits_of_whole(resident[0], bones, source.name, setting)

    exits = kept(run)
    if exits is None:
        return _whole(resident[0], setting)
    resident.clear()
    heap.give_back()
    return after(bones, source, exits, setting)


def streams(source: Source, setting: Setting) -> bool:
    """Whether the model is run block by block: as asked for, else where the whole of it would not fit."""
    if setting.stream is not None:
        return setting.stream
    return not fits(source, setting.device, setting.dtype, setting.ids.shape[1])


def fits(source: Source, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the whole model has room on `device`, beside the logits of `tokens` tokens, of it and of a reference."""
    weights = sum(math.prod(spec.shape) for spec in source.specs.values()) * dtype.itemsize
    vocabulary = max((spec.shape[0] for spec in source.specs.values() if len(spec.shape) == 2), default=0)
    return weights + tokens * vocabulary * 2 * LOGIT_BYTES <= SPARE * _free(device)


def exits_by_block(source: Source, bones: skeleton.Skeleton, setting: Setting) -> Exits:
    """All windows through one block at a time; `bones` stays as it is."""
    store = new_store(bones, setting)
    batches = [slice(index, index + 1) for index in range(len(setting.ids))]
    setting.step(0, len(bones.blocks), f"{source.name}: before the blocks")
    arguments = blocks.capture(bones, source.read, setting.ids, store, setting.device, setting.dtype, batches)
    cached = source.cache_scales()
    for index in range(len(bones.blocks)):
        setting.step(index, len(bones.blocks), f"{source.name}: block {index + 1} of {len(bones.blocks)}")
        block = load_rounding_block(bones, index, source.read, setting.device, setting.dtype, source.schemes,
                                    source.read_quantized, cached)
        with torch.inference_mode():
            for batch in batches:
                store.write(batch, run_block(block, arguments, index, store, batch, setting.device, setting.dtype))
        del block
        heap.give_back()
    return Exits(store, arguments.as_tuple)


def exits_of_whole(model: nn.Module, bones: skeleton.Skeleton, name: str, setting: Setting) -> Exits | None:
    """The exits of a model in memory; None where more than hidden states [1, T, hidden] leaves its last block."""
    store, strange, as_tuple, now = new_store(bones, setting), False, False, 0

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal strange, as_tuple
        as_tuple = isinstance(output, tuple)
        hidden = output[0] if as_tuple else output
        strange = not isinstance(hidden, torch.Tensor) or hidden.shape != (1, *store.shape[1:])
        if not strange:
            store.write(slice(now, now + 1), hidden)
        raise _Reached

    handle = model.get_submodule(bones.blocks[-1]).register_forward_hook(keep)
    try:
        for now, window in enumerate(setting.ids):
            setting.step(now, len(setting.ids), f"{name}: window {now + 1}")
            with contextlib.suppress(_Reached), torch.inference_mode():
                model(window[None].to(setting.device), use_cache=False)
            if strange:
                return None
    finally:
        handle.remove()
    return Exits(store, as_tuple)


def after(bones: skeleton.Skeleton, source: Source, exits: Exits, setting: Setting) -> Logits:
    """What the model makes of its exits. The weights around the blocks are read and kept."""
    state: dict[str, torch.Tensor] = {}

    def visit(_index: int, _hidden: torch.Tensor, _args: Any, _kwargs: Any) -> Any:
        return (state["hidden"],) if exits.as_tuple else state["hidden"]

    with torch.no_grad():
        model = blocks.without_blocks(bones, "", visit, source.read, setting.device, setting.dtype)
    whole = _whole(model, setting)

    def predicted(index: int) -> torch.Tensor:
        state["hidden"] = exits.store.read(slice(index, index + 1)).to(setting.device, copy=True)
        return whole(index)

    return predicted


def new_store(bones: skeleton.Skeleton, setting: Setting) -> StreamStore:
    windows, length = setting.ids.shape
    return StreamStore(windows, length, bones.hidden, setting.dtype, MEMORY)


def _load(source: Source, bones: skeleton.Skeleton, setting: Setting) -> nn.Module:
    setting.step(0, len(setting.ids), f"loading {source.name}")
    return load_model(bones, source.read, setting.device, setting.dtype, source.schemes, source.read_quantized,
                      source.cache_scales())


def _whole(model: nn.Module, setting: Setting) -> Logits:
    @torch.inference_mode()
    def predicted(index: int) -> torch.Tensor:
        ids = setting.ids[index:index + 1].to(setting.device)
        found: torch.Tensor = model(ids, use_cache=False).logits[0, :-1]
        return found

    return predicted


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = preflight.available_memory()  # within the limit of a container; None: the system does not tell
    return 1 << 62 if available is None else available - estimate.resident()
