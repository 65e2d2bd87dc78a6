"""The gradient of the model's loss, from the head back through the blocks, one block at a time.

The loss of a sequence is -Σ_t log p(label_t), with labels drawn from the model's own distribution: then the mean of
products of gradients is the Fisher information, and ½ Δᵀ F Δ the KL divergence that a small change Δ causes. Each block
is run again with autograd on its kept input, so that memory is one block and one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtool.errors import ModelError, NumericalError
from qtool.models import blocks
from qtool.models.blocks import BlockArguments, Read
from qtool.models.skeleton import Skeleton
from qtool.models.statistics import block_output
from qtool.models.streams import StreamStore
from qtool.tensors import all_finite

ROWS = 64  # of logits that are in float32 at a time


@dataclass(frozen=True)
class Kept:
    """Of one linear, for all tokens of S sequences: its inputs x [S, T, K], the gradient at its outputs [S, T, N]."""

    inputs: StreamStore
    slopes: StreamStore

    def loss(self, difference: torch.Tensor) -> float:
        """½ of the mean over sequences of Σ_i (D_i · G_i)², G = Σ_t slope_t x_tᵀ the gradient of one sequence's loss.

        That is the second-order rise of a sequence's loss for the change D [N, K] of the weight, float32, where the
        changes of different outputs are independent; those of different tokens need not be.
        """
        total, samples = 0.0, self.inputs.shape[0]
        for sample in range(samples):
            here = slice(sample, sample + 1)
            moved = self.inputs.read(here)[0].to(difference) @ difference.T
            moved *= self.slopes.read(here)[0].to(difference)
            total += float(moved.sum(0).square().sum(dtype=torch.float64))
        return total / (2 * samples)


def head_gradient(skeleton: Skeleton, read: Read, ids: torch.Tensor, hidden: StreamStore, gradient: StreamStore,
                  seed: int, device: torch.device, dtype: torch.dtype, as_tuple: bool, first: int = 0) -> None:
    """Fill `gradient` with ∂loss/∂h at h = `hidden`, the last block's outputs, of the sequences from `first` on.

    ids: int64 [S, T].  as_tuple: whether the blocks return tuples. Labels depend on `seed` and the sequence only.
    Raises NumericalError.
    """
    state: dict[str, torch.Tensor] = {}

    def visit(_index: int, _hidden: torch.Tensor, _args: Any, _kwargs: Any) -> Any:
        return (state["hidden"],) if as_tuple else state["hidden"]

    model = blocks.without_blocks(skeleton, "", visit, read, device, dtype)
    for sample in range(first, len(ids)):
        here = slice(sample, sample + 1)
        state["hidden"] = hidden.read(here).to(device=device, dtype=dtype, copy=True).requires_grad_()
        with torch.enable_grad():
            logits = model(ids[here].to(device), use_cache=False).logits
        slope = torch.empty_like(logits)
        uniform = draws(seed, sample, ids.shape[1])
        for start in range(0, logits.shape[1], ROWS):
            rows = slice(start, start + ROWS)
            slope[0, rows] = loss_slope(logits[0, rows].detach(), uniform[rows].to(device))
        torch.autograd.backward(logits, slope)
        gradient.write(slice(sample - first, sample - first + 1), _gradient_of(state["hidden"], "the output head"))


def draws(seed: int, sample: int, length: int) -> torch.Tensor:
    """Numbers in [0, 1) that decide the labels of one sequence: float32 [T]."""
    return torch.rand(length, generator=torch.Generator().manual_seed((seed * 1_000_003 + sample) % (1 << 63)))


def loss_slope(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """∂(-log p(label))/∂logits of logits [T, V], float32, each label drawn by its number in [0, 1) of uniform [T]."""
    slope = logits.float().softmax(-1)
    label = torch.searchsorted(slope.cumsum(-1), uniform[:, None]).clamp_max(logits.shape[-1] - 1)
    return slope.scatter_add_(1, label, torch.full_like(uniform[:, None], -1.0))


def block_gradient(block: nn.Module, prefix: str, linears: Sequence[str], arguments: BlockArguments, index: int,
                   hidden: StreamStore, gradient: StreamStore, batches: Iterable[slice], device: torch.device,
                   dtype: torch.dtype, kept: Mapping[str, Kept], first: int = 0) -> dict[str, torch.Tensor]:
    """Take `gradient` from the exit of a block to its entrance, where `hidden` is, on the samples in `batches`.

    first: the sample that `gradient` and `kept` begin with.  kept: is filled, by full name; not for experts, which see
    some tokens only.  Returns, by full name, the sum over tokens of the squared gradient of each output of a linear:
    float32 [N]. Experts that no token reached have none. Raises NumericalError.
    """
    sums: dict[str, torch.Tensor] = {}
    now = slice(0, 0)

    def watch(name: str) -> Callable[..., None]:
        def add(slope: torch.Tensor) -> None:
            squares = slope.detach().reshape(-1, slope.shape[-1]).float().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
            if name in kept:
                _write(kept[name].slopes, now, slope, name)

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if name in kept:
                _write(kept[name].inputs, now, inputs[0], name)
            output.register_hook(add)

        return hook

    handles = [block.get_submodule(name.removeprefix(prefix + ".")).register_forward_hook(watch(name))
               for name in linears]
    try:
        for batch in batches:
            now = slice(batch.start - first, batch.stop - first)
            entrance = hidden.read(batch).to(device=device, dtype=dtype, copy=True).requires_grad_()
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others may add in any order on a GPU
                output = block_output(block, arguments, index, entrance)
                torch.autograd.backward(output, gradient.read(now).to(device=device, dtype=dtype))
            gradient.write(now, _gradient_of(entrance, prefix))
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _write(store: StreamStore, here: slice, tokens: torch.Tensor, name: str) -> None:
    """What may have come as [B, T, width] or [B T, width]."""
    shape = (here.stop - here.start, *store.shape[1:])
    if tokens.numel() != math.prod(shape):
        raise ModelError(f"{name} receives {list(tokens.shape)}, not every token of {shape[0]} sequences of {shape[1]} "
                         "once; a budget cannot be used for a model of this kind: give the schemes by rules")
    store.write(here, tokens.reshape(shape))


def _gradient_of(hidden: torch.Tensor, name: str) -> torch.Tensor:
    if hidden.grad is None or not all_finite(hidden.grad):
        raise NumericalError(f"{name}: the gradient of the loss is not finite on calibration text; check the weights, "
                             "or use --set dtype=float32")
    return hidden.grad
