"""The parameters of one block, differentiable in what is learned of them.

What is learned is a set of *moves*, float32 tensors that begin at zero: a parameter is its value at the start plus its
unit times its move. Units make one learning rate serve all: of a scale, its own size; of a gain, the root mean square
of all gains of its norm; of a latent weight, the scale of its group, so that a move of one is one step of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qtool import found
from qtool.learning import fake
from qtool.tensors import FLOATING, QuantizedTensor

Moves = dict[str, torch.Tensor]
LATENT = "latent"


@dataclass(frozen=True)
class Start:
    """Where learning begins. tensors: quantized weights, by the path of their parameter in the block.  gains: other
    parameters that are learned, float32, by path; dtypes: in which they are stored.  latent: float32 [N, K] weights
    whose roundings are learned, of some of the tensors."""

    tensors: Mapping[str, QuantizedTensor]
    gains: Mapping[str, torch.Tensor]
    dtypes: Mapping[str, torch.dtype]
    latent: Mapping[str, torch.Tensor]


def gains_of(block: torch.nn.Module, tensors: Mapping[str, QuantizedTensor]) -> list[str]:
    """Paths of the parameters of a block that are one value per channel: gains of norms, biases."""
    return [path for path, parameter in block.named_parameters()
            if path not in tensors and parameter.dim() == 1 and parameter.dtype in FLOATING]


def start(tensors: Mapping[str, QuantizedTensor], gains: Mapping[str, torch.Tensor],
          weights: Mapping[str, torch.Tensor] | None = None) -> Start:
    """gains: as stored.  weights: float32 [N, K], by path, where roundings are learned: what was quantized."""
    latent = {path: fake.latent(weight, tensors[path], found.load("grids", tensors[path].grid))
              for path, weight in (weights or {}).items()}
    return Start(tensors, {path: gain.float() for path, gain in gains.items()},
                 {path: gain.dtype for path, gain in gains.items()}, latent)


def moves(begin: Start, scales: bool = True) -> Moves:
    """Of everything that is learned, by "path" or "path|what"; zeros that autograd follows."""
    shapes = dict(begin.gains)
    for path, tensor in begin.tensors.items():
        if scales:
            shapes |= {f"{path}|{what}": value for what, value in fake.learnable(tensor).items()}
    shapes |= {f"{path}|{LATENT}": weight for path, weight in begin.latent.items()}
    return {name: torch.zeros_like(value, requires_grad=True) for name, value in shapes.items()}


def parameters(begin: Start, move: Moves) -> dict[str, torch.Tensor]:
    """The parameters of the block after these moves, float32, by path."""
    made = {path: fake.rounded(_gain(begin, path, move), begin.dtypes[path]) for path in begin.gains}
    for path, tensor in begin.tensors.items():
        values = _values(tensor, path, move)
        if path in begin.latent and f"{path}|{LATENT}" in move:
            scale = values.get(fake.SCALE, tensor.scale.float())
            made[path] = fake.Rounded.apply(scale, _latent(begin, path, move), tensor, found.load("grids", tensor.grid))
        else:
            made[path] = fake.dense(tensor, values)
    return made


def answer(begin: Start, move: Moves) -> tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]:
    """What is stored after these moves: quantized weights and the other parameters, by path. The former decode to the
    very values of `parameters`."""
    with torch.no_grad():
        tensors = {}
        for path, tensor in begin.tensors.items():
            values = _values(tensor, path, move)
            if path in begin.latent and f"{path}|{LATENT}" in move:
                scale = values.get(fake.SCALE, tensor.scale.float())
                tensors[path] = fake.encoded(scale, _latent(begin, path, move), tensor,
                                             found.load("grids", tensor.grid))
            else:
                tensors[path] = fake.stored(tensor, values)
        return tensors, {path: _gain(begin, path, move).to(begin.dtypes[path]) for path in begin.gains}


def _gain(begin: Start, path: str, move: Moves) -> torch.Tensor:
    return _moved(begin.gains[path], move[path]) if path in move else begin.gains[path]


def _moved(value: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    size = value.square().mean().sqrt()
    return value + torch.where(size > 0, size, 1.0) * move


def _values(tensor: QuantizedTensor, path: str, move: Moves) -> dict[str, torch.Tensor]:
    """A scale keeps its sign: its move stops at -0.9. What else a grid has (a codebook) moves as gains do."""
    made = {}
    for what, value in fake.learnable(tensor).items():
        if (name := f"{path}|{what}") in move:
            made[what] = value * (1 + move[name].clamp_min(-0.9)) if what in fake.SCALES else _moved(value, move[name])
    return made


def _latent(begin: Start, path: str, move: Moves) -> torch.Tensor:
    tensor = begin.tensors[path]
    unit = tensor.scale.float().abs().repeat_interleave(tensor.group_size, 1)
    return begin.latent[path] + unit * move[f"{path}|{LATENT}"]
