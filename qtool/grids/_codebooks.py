"""Grids of additive codebooks: 8 columns of a row are its scale times the sum of M codewords, one of each codebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from qtool.grids import _kmeans
from qtool.ops import codebooks as ops
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor

VECTOR = ops.VECTOR
KMEANS_ROUNDS, BEAM = 8, 8


@dataclass(frozen=True)
class CodebookGrid:
    """books: M.  code_bits: of a code, so that a codebook has 2^code_bits codewords.

    A QuantizedTensor has codes int32 [N, K / 8, M], scale [N, 1] and extra["codebooks"] [M, 2^code_bits, 8], the last
    two in the dtype that the format stores.  Every linear has codebooks of its own.
    """

    name: str
    books: int
    code_bits: int

    JOINT = False
    FREE_SCALES = False

    @property
    def bits(self) -> int:
        """Of a weight, without codebooks and scales."""
        return self.books * self.code_bits // VECTOR

    @property
    def words(self) -> int:
        return 1 << self.code_bits

    def check(self, scheme: Scheme) -> str | None:
        """Why the scheme cannot be this grid, or None."""
        if scheme.bits != self.bits or scheme.group_size != VECTOR:
            return (f"the {self.name} grid has {self.bits} bits a weight, coded in groups of {VECTOR}; leave bits and "
                    "group_size out, or say so")
        if not scheme.symmetric or scheme.double_quant or scheme.strategy or scheme.activations:
            return (f"the {self.name} grid is of weights, with one scale per row; leave --asymmetric, --double-quant, "
                    "strategy and activations out")
        return None

    def width(self, scheme: Scheme, columns: int) -> int:
        """Columns per scale: a row."""
        return columns

    def reach(self, scheme: Scheme, scale_dtype: torch.dtype) -> float:
        """The largest |weight| that scales and codewords leave representable."""
        return float(torch.finfo(scale_dtype).max)

    def fitted(self, codes: torch.Tensor, codebooks: torch.Tensor, scale: torch.Tensor) -> QuantizedTensor:
        """Of codes [N, K / 8, M], codebooks [M, words, 8] and scales [N, 1]."""
        return QuantizedTensor(codes, scale, torch.zeros_like(scale, dtype=torch.uint8), self.bits,
                               codes.shape[1] * VECTOR, True, {"codebooks": codebooks}, self.name)

    def fit(self, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype,
            importance: torch.Tensor | None = None, shrink_steps: int = 1, signed: bool = False,
            rounds: int = 0) -> QuantizedTensor:
        """Scales and codebooks of weight [N, K] by residual k-means weighted by importance [K], and their codes.

        The method aqlm does better where there is text.
        """
        scale = row_scales(weight, scale_dtype)
        codes, codebooks = _kmeans.start(weight, scale[:, 0].float(), self._blocks(weight, importance), self.books,
                                         self.words, KMEANS_ROUNDS, 0)
        return self.fitted(codes, codebooks.to(scale_dtype), scale)

    def encode(self, weight: torch.Tensor, fitted: QuantizedTensor) -> QuantizedTensor:
        """The codes of a beam search for each group of weight [N, K] alone, where nearer than those that there are."""
        codes = _kmeans.nearest(weight, fitted.scale[:, 0].float(), self._blocks(weight, None), fitted.codes,
                                fitted.extra["codebooks"].float(), BEAM)
        return replace(fitted, codes=codes)

    def decode(self, tensor: QuantizedTensor) -> torch.Tensor:
        """float32 [N, K]."""
        return ops.dequantize_codebooks(tensor.codes, tensor.extra["codebooks"], tensor.scale[:, 0])

    def learnable(self, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """What the format stores as real numbers: codebooks [M, words, 8] and scales [N, 1], copies in float32."""
        return {"codebooks": tensor.extra["codebooks"].float().clone(), "scales": tensor.scale.float().clone()}

    def smooth(self, tensor: QuantizedTensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 [N, K] of the tensor's codes, differentiable in `values`; added up as decode does it."""
        codebooks, codes = values["codebooks"], tensor.codes.long()
        total = torch.nn.functional.embedding(codes[..., 0], codebooks[0])
        for book in range(1, self.books):
            total = total + torch.nn.functional.embedding(codes[..., book], codebooks[book])
        return (total * values["scales"][..., None]).flatten(1)

    def stored(self, tensor: QuantizedTensor, values: Mapping[str, torch.Tensor]) -> QuantizedTensor:
        """The tensor with these values, rounded to the dtypes that it has."""
        codebooks = values["codebooks"].detach().to(tensor.extra["codebooks"].dtype)
        return replace(tensor, scale=values["scales"].detach().to(tensor.scale.dtype),
                       extra={**tensor.extra, "codebooks": codebooks})

    def _blocks(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """Diagonal matrices [K / 8, 8, 8] of the importance, none of it zero."""
        columns = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
        mean = float(columns.double().mean()) if columns.numel() else 1.0
        columns = columns / mean if mean > 0 else torch.ones_like(columns)
        return torch.diag_embed(columns.clamp_min(1e-6).reshape(-1, VECTOR))


def row_scales(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, 1] in the dtype: the root mean square of each row, so that codewords are near 1; 1 for a row of zeros."""
    size = weight.abs().amax(1, keepdim=True) if weight.shape[1] else weight.new_ones(len(weight), 1)
    whole = torch.where(size > 0, size, 1.0)
    mean = (weight / whole).square().mean(1, keepdim=True).sqrt() * whole
    kind = torch.finfo(dtype)
    return torch.where(size > 0, mean.clamp(kind.tiny, kind.max), 1.0).to(dtype)
