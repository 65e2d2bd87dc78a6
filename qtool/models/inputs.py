"""Linears whose inputs are rounded at run time, as engines do beside 8-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qtool.activations import mixed_product
from qtool.activations import round_inputs as rounded
from qtool.grids import vectorwise_int8
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor


class _Rounding:
    """A pre-hook shared by linears of one scheme. Those that receive the same tensor get the same result again, so that
    they are still seen to share their input."""

    def __init__(self, scheme: Scheme, static: torch.Tensor | None) -> None:
        self.scheme, self.static = scheme, static
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if self._last is None or self._last[0] is not x:
            self._last = x, rounded(x, self.scheme, self.static)
        return (self._last[1], *inputs[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rounding:
        return _Rounding(self.scheme, self.static)  # what it remembers belongs to one pass


def round_inputs(model: nn.Module, schemes: Mapping[str, Scheme], static: Callable[[str], torch.Tensor]) -> None:
    """From now on the linears of `model` named in `schemes` round their inputs, where their scheme says so.

    static: gives the scale [1] of one, by its path, where that is calibrated.
    """
    hooks: dict[tuple[Scheme, float], _Rounding] = {}
    for path, scheme in schemes.items():
        if scheme.activations in ("token", "group", "tensor"):
            scale = static(path) if scheme.activations == "tensor" else None
            key = scheme, 0.0 if scale is None else float(scale)
            hook = hooks.setdefault(key, _Rounding(scheme, scale))
            model.get_submodule(path).register_forward_pre_hook(hook)


def multiply_codes(model: nn.Module, schemes: Mapping[str, Scheme],
                   quantized: Callable[[str], QuantizedTensor]) -> None:
    """From now on the linears of `model` named in `schemes`, where their scheme says so, compute as LLM.int8() does:
    outlier columns apart, the rest in integers. quantized: gives the codes of one."""
    for path, scheme in schemes.items():
        if scheme.activations == "outliers":
            module, tensor = model.get_submodule(path), quantized(path)
            codes, absmax = vectorwise_int8.signed_codes(tensor), tensor.extra["absmax"]
            module.forward = _mixed(module, codes, absmax, scheme.outlier_threshold)  # type: ignore[method-assign]


def _mixed(module: nn.Module, codes: torch.Tensor, absmax: torch.Tensor,
           threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        product = mixed_product(x.reshape(-1, x.shape[-1]), codes, absmax, threshold)
        if isinstance(module.bias, torch.Tensor):
            product = product + module.bias
        return product.to(x.dtype).reshape(*x.shape[:-1], -1)

    return forward
