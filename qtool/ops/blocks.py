"""Decoder blocks that run a token in one op."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.ops import checks_packed, reference_packed


@dataclass(frozen=True)
class DecoderBlock:
    """RMSNorm, q/k/v, rotary embedding, causal attention, output, RMSNorm, silu(gate) * up, down; both parts added.

    weights: norm [H], those of query and key heads [size] or empty, second norm [H]; then of each of PRODUCTS words,
    scale, offset, levels (packed.py) and bias [N] or empty.  layout: kind, group and rows of each.
    keys, values: float32 [key heads, capacity, size], filled as tokens come.  window: positions that a token sees.
    scaling: of the products of queries and keys.  rounded: inputs of products are rounded to 8 bits (packed.py).
    All is checked here, once (ValueError).
    """

    weights: tuple[torch.Tensor, ...]
    layout: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    window: int
    epsilon: float
    scaling: float
    rounded: bool = False

    def __post_init__(self) -> None:
        checks_packed.block(len(self.weights[0]), self.weights, self.layout, self.keys, self.values, self.window)

    def __call__(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: int) -> torch.Tensor:
        """The next tokens: hidden float32 [T, H] -> [T, H]. cos, sin: [T, size / 2], of positions from `position` on.

        One token runs in the op; more of them in its reference, whose products are fast.
        """
        checks_packed.tokens(hidden, len(self.weights[0]), cos, sin, self.keys, position)
        run = torch.ops.qtool.decode_block if len(hidden) == 1 else reference_packed.decode_block
        return run(hidden, self.weights, self.layout, cos, sin, self.keys, self.values, position, self.window,
                   self.epsilon, self.scaling, self.rounded)
