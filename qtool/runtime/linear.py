"""Linears that hold a weight as it is stored. Their arithmetic is float32; the result has the dtype of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qtool import ops
from qtool.activations import input_codes, mixed_product, round_inputs
from qtool.grids import vectorwise_int8
from qtool.ops.packed import PackedWeight, multiply_packed
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE, QuantizedTensor


class _Stored(nn.Module):
    """A linear [N, K] whose subclass gives `product(x [T, K]) -> float32 [T, N]`; it stays where it was made."""

    def __init__(self, rows: int, columns: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.product(x.reshape(-1, self.in_features))
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(_Stored):
    """Weights only, or with inputs that are rounded as `scheme` says before the product."""

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None, scheme: Scheme | None = None,
                 static: torch.Tensor | None = None) -> None:
        super().__init__(weight.rows, weight.columns, bias)
        self.weight, self.scheme, self.static = weight, scheme, static

    @property
    def rounds(self) -> bool:
        return self.scheme is not None and self.scheme.activations is not None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme is not None and self.rounds:
            x = round_inputs(x.float(), self.scheme, self.static)
        return multiply_packed(x, self.weight)


class IntegerLinear(_Stored):
    """Inputs and weights as 8-bit integers with a scale per token (or `static` [1]) and per row (W8A8)."""

    def __init__(self, tensor: QuantizedTensor, bias: torch.Tensor | None, scheme: Scheme) -> None:
        super().__init__(tensor.codes.shape[0], tensor.codes.shape[1], bias)
        self.codes = (tensor.codes.to(torch.int16) - 128).to(torch.int8)
        self.scale, self.scheme, self.static = tensor.scale.float()[:, 0], scheme, tensor.extra.get(INPUT_SCALE)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = input_codes(x.float(), self.scheme, self.static)
        return ops.multiply_int8(codes.to(torch.int8), self.codes, scale.expand(len(x), 1)[:, 0], self.scale)


class MixedLinear(_Stored):
    """LLM.int8(): outlier columns apart, the rest as 8-bit integers."""

    def __init__(self, tensor: QuantizedTensor, bias: torch.Tensor | None, scheme: Scheme) -> None:
        super().__init__(tensor.codes.shape[0], tensor.codes.shape[1], bias)
        self.codes, self.absmax = vectorwise_int8.signed_codes(tensor), tensor.extra["absmax"]
        self.scheme = scheme

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return mixed_product(x, self.codes, self.absmax, self.scheme.outlier_threshold)


def is_integer(tensor: QuantizedTensor, scheme: Scheme) -> bool:
    """Whether inputs and weights of a linear can be multiplied as 8-bit integers."""
    return (scheme.activations in ("token", "tensor") and scheme.grid == "affine" and scheme.bits == 8
            and tensor.symmetric and tensor.scale.shape[1] == 1 and tensor.codes.shape[1] < ops.MAX_PRODUCTS)


def stored_linear(tensor: QuantizedTensor, bias: torch.Tensor | None, scheme: Scheme, pack: Any) -> _Stored:
    """The linear that computes with this tensor as its scheme says; pack: QuantizedTensor -> PackedWeight."""
    if scheme.activations == "outliers":
        return MixedLinear(tensor, bias, scheme)
    if is_integer(tensor, scheme):
        return IntegerLinear(tensor, bias, scheme)
    return PackedLinear(pack(tensor), bias, scheme, tensor.extra.get(INPUT_SCALE))
