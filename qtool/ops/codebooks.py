"""Additive codebooks: 8 columns of a row are its scale times the sum of one codeword from each of M codebooks.

codes: int32 [N, K / 8, M].  codebooks: [M, codewords, 8], up to 8 of up to 65,536.  scale: [N]. Source: AQLM,
arXiv 2401.06118. As the other ops: bits do not depend on the instruction set or the number of threads.
"""

from __future__ import annotations

import torch

from qtool.ops import checks, checks_codebooks
from qtool.ops.checks_codebooks import MAX_BEAM, MAX_CODEBOOKS, MAX_WORDS, VECTOR

__all__ = ["MAX_BEAM", "MAX_CODEBOOKS", "MAX_WORDS", "VECTOR", "dequantize_codebooks", "refine_codebooks",
           "sum_codewords"]
_ops = torch.ops.qtool


def dequantize_codebooks(codes: torch.Tensor, codebooks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: codewords are added in the order of the codebooks, then multiplied by the scale."""
    arguments = (codes.contiguous(), _float("codebooks", codebooks), _float("scale", scale))
    checks_codebooks.dequantize_codebooks(*arguments)
    checks_codebooks.code_values(codes, codebooks.shape[1])
    return _ops.dequantize_codebooks(*arguments)


def sum_codewords(values: torch.Tensor, codes: torch.Tensor, words: int) -> torch.Tensor:
    """float32 [M, words, 8]: for each codeword the sum of the values [N, K] of all groups that have it (the transpose
    of dequantize_codebooks for scales of 1). Added up in float64."""
    arguments = (_float("values", values), codes.contiguous(), words)
    checks_codebooks.sum_codewords(*arguments)
    checks_codebooks.code_values(codes, words)
    return _ops.sum_codewords(*arguments)


def refine_codebooks(gradient: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor,
                     codebooks: torch.Tensor, roots: torch.Tensor, beam: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sweep over the groups of B <= 256 columns: new codes int32 [N, B / 8, M], change of value float32 [N, B].

    gradient: (D H) [N, B] for D = target - value.  hessian: [B, B].  roots: [B / 8, 8, 8], lower triangular L with
    L Lᵀ the 8 x 8 blocks on the diagonal of `hessian`.  A group moves to the best sum of codewords that a beam search
    over the codebooks in turn finds, `beam` (1 to 16) partial sums wide, if that lowers the loss; gradients of the
    groups after it follow. Ties keep the codes, and so does what is not finite.
    """
    arguments = (_float("gradient", gradient), _float("hessian", hessian), codes.contiguous(), _float("scale", scale),
                 _float("codebooks", codebooks), _float("roots", roots), beam)
    checks_codebooks.refine_codebooks(*arguments)
    checks_codebooks.code_values(codes, codebooks.shape[1])
    return _ops.refine_codebooks(*arguments)


def _float(name: str, tensor: torch.Tensor) -> torch.Tensor:
    checks.require(tensor.dtype.is_floating_point, f"{name} is {tensor.dtype}, not floating point")
    return tensor.to(torch.float32).contiguous()
