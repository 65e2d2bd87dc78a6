"""Mean squares of what linears receive: what llama.cpp's importance matrices hold.

Unlike Hessians they need only sums over columns, so a block is run once for its statistics and its output together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qtool.models import blocks
from qtool.models.blocks import BlockArguments, Read
from qtool.models.skeleton import Skeleton
from qtool.models.statistics import propagate
from qtool.models.streams import StreamStore


class Squares:
    """Of each linear: the sum of x² over tokens, float64 [K], and how many tokens it was given."""

    def __init__(self, columns: Mapping[str, int]) -> None:
        self.sums = {name: torch.zeros(count, dtype=torch.float64) for name, count in columns.items()}
        self.tokens = dict.fromkeys(columns, 0)

    @contextlib.contextmanager
    def watching(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Add what these modules receive. linears: by name."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self.sums[name] += x.float().square().sum(0).cpu().double()
            self.tokens[name] += len(x)

        return add


def of_block(skeleton: Skeleton, index: int, read: Read, arguments: BlockArguments, store: StreamStore,
             batches: Sequence[slice], device: torch.device, dtype: torch.dtype) -> Squares:
    """Of the linears of a block, experts too; an expert without tokens has zeros. The stream goes through the block.

    Raises NumericalError.
    """
    prefix = skeleton.blocks[index]
    shapes = skeleton.block_linears(index)
    squares = Squares({name: columns for name, (_, columns) in shapes.items()})
    block = blocks.load_block(skeleton, index, read, device, dtype)
    with squares.watching({name: block.get_submodule(name.removeprefix(prefix + ".")) for name in shapes}):
        propagate(block, prefix, arguments, index, store, batches, device, dtype)
    return squares


def of_head(skeleton: Skeleton, read: Read, arguments: BlockArguments, ids: torch.Tensor, store: StreamStore,
            batches: Sequence[slice], device: torch.device, dtype: torch.dtype) -> Squares:
    """Of the output head, which the last norm feeds. ids: int64 [S, T].  store: what the last block gave."""
    assert skeleton.head is not None
    state: dict[str, torch.Tensor] = {}

    def visit(_index: int, _hidden: torch.Tensor, _args: Any, _kwargs: Any) -> Any:
        return (state["hidden"],) if arguments.as_tuple else state["hidden"]

    model = blocks.without_blocks(skeleton, "", visit, read, device, dtype)
    head = model.get_submodule(skeleton.head)
    head.forward = lambda x: x  # type: ignore[method-assign] # its product is not needed
    squares = Squares({skeleton.head: skeleton.parameters[f"{skeleton.head}.weight"][1]})
    with squares.watching({skeleton.head: head}):
        for batch in batches:
            state["hidden"] = store.read(batch).to(device=device, dtype=dtype, copy=True)
            model(ids[batch].to(device), use_cache=False)
    return squares
