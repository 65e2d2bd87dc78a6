"""Gradients that go back block by block against autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtool.models import backward, statistics, streams
from qtool.models.whole import load_model
from tests.models.loaded import CPU, LENGTH, SAMPLES, Loaded, open_tiny

SEED = 3
BATCHES = [slice(0, 2), slice(2, 4), slice(4, 5)]


def change(name: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """A change of a weight."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) * 0.01


def whole_model(loaded: Loaded, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of every linear: Σ squared output gradients, and what Kept.loss says of a change, from the gradients of weights.

    transformers' own model and loss, one plain backward pass per text; of experts, which it fuses, the split ones.
    """
    split = bool(loaded.skeleton.expert_layers)
    fresh = open_tiny(loaded.directory).skeleton
    model = load_model(fresh, loaded.read, CPU, torch.float32) if split else loaded.full_model()
    model.requires_grad_(True)
    sums: dict[str, torch.Tensor] = {}
    losses: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(slope: torch.Tensor) -> None:
            sums[name] = sums.get(name, 0) + slope.reshape(-1, slope.shape[-1]).square().sum(0)

        def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            output.register_hook(add)
        return hook

    names = [name for index in range(len(loaded.skeleton.blocks)) for name in loaded.skeleton.block_linears(index)]
    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    for sample in range(SAMPLES):
        logits = model(ids[sample][None], use_cache=False).logits[0]
        uniform = backward.draws(SEED, sample, LENGTH)
        labels = (logits.detach().softmax(-1).cumsum(-1) < uniform[:, None]).sum(-1).clamp_max(logits.shape[-1] - 1)
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name in names:
            gradient = model.get_submodule(name).weight.grad
            if gradient is not None:
                rise = float((gradient * change(name, gradient.shape)).sum(1).square().sum())
                losses[name] = losses.get(name, 0.0) + rise / (2 * SAMPLES)
    return sums, losses


def streamed(loaded: Loaded, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    skeleton = loaded.skeleton
    store, arguments = loaded.captured(ids, BATCHES)
    entrances = []
    for index, prefix in enumerate(skeleton.blocks):
        entrances.append(loaded.store())
        entrances[-1].copy_from(store, BATCHES)
        statistics.propagate(loaded.block(index), prefix, arguments, index, store, BATCHES, CPU, torch.float32)

    def new(width: int) -> streams.StreamStore:
        return streams.StreamStore(SAMPLES, LENGTH, width, torch.float32, 1 << 30)

    gradient = new(skeleton.hidden)
    backward.head_gradient(skeleton, loaded.read, ids, store, gradient, SEED, CPU, torch.float32, False)
    sums, losses = {}, {}
    for index in reversed(range(len(skeleton.blocks))):
        linears = skeleton.block_linears(index)
        kept = {name: backward.Kept(new(shape[1]), new(shape[0])) for name, shape in linears.items()
                if ".experts." not in name}
        sums |= backward.block_gradient(loaded.block(index), skeleton.blocks[index], list(linears), arguments, index,
                                        entrances[index], gradient, BATCHES, CPU, torch.float32, kept)
        losses |= {name: one.loss(change(name, linears[name])) for name, one in kept.items()}
    return sums, losses


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "qwen3_moe", "mixtral"])
def test_gradients_are_those_of_the_whole_model(family: str, checkpoint: Callable[[str], Loaded],
                                                ids: torch.Tensor) -> None:
    loaded = checkpoint(family)
    (squares, rises), (found, losses) = whole_model(loaded, ids), streamed(loaded, ids)
    assert found.keys() == squares.keys() and len(found) >= 4 * len(loaded.skeleton.blocks)
    for name, sums in squares.items():
        torch.testing.assert_close(found[name], sums, rtol=2e-3, atol=1e-3 * float(sums.mean()))
    assert len(losses) >= 2 * len(loaded.skeleton.blocks)
    for name, loss in losses.items():
        assert loss == pytest.approx(rises[name], rel=1e-3)


def test_labels_follow_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    labels = backward.loss_slope(logits, uniform) - logits.softmax(-1)
    torch.testing.assert_close(labels.mean(0), torch.tensor([-0.1, -0.2, -0.7]), atol=0.03, rtol=0)
    assert ((labels + 1).abs() < 1e-6).sum() == 4000
