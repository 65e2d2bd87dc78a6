"""Residual k-means: codebooks and codes for vectors of 8 columns, one codebook after the other.

The error of a group of columns is (t - value) B (t - value)ᵀ with a matrix B [8, 8] of its own, such as a block on the
diagonal of H; so the mean of a cluster is (Σ s² B)⁻¹ Σ s² B x, with s the scale of each row. Source: AQLM,
arXiv 2401.06118, section 3.4, which has plain k-means.
"""

from __future__ import annotations

import torch

from qtool.ops import codebooks as ops

VECTOR = ops.VECTOR
BLOCK = 128  # columns of one call


def start(target: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, books: int, words: int, rounds: int,
          seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int32 [N, K / 8, M] and codebooks float32 [M, words, 8] for target [N, K], scale float32 [N].

    blocks: B of each group, float32 [K / 8, 8, 8], positive definite.  rounds: of means and new clusters.
    """
    left = target / scale[:, None]
    codes, made = [], []
    for book in range(books):
        chosen, codebook = _cluster(left, scale, blocks, words, rounds, seed + book)
        left = left - ops.dequantize_codebooks(chosen, codebook, torch.ones_like(scale))
        codes.append(chosen)
        made.append(codebook)
    return torch.cat(codes, -1), torch.cat(made)


def curvature(codes: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, words: int) -> torch.Tensor:
    """Σ s² B over the groups that have each codeword: float32 [M, words, 8, 8]."""
    square = scale.square()[:, None]
    rows = [ops.sum_codewords(square * blocks[:, j].reshape(1, -1), codes, words) for j in range(VECTOR)]
    return torch.stack(rows, 2)


def factor_words(curved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower triangular factors of curved [M, words, 8, 8], and of which codewords there is one, bool [M, words]."""
    size = curved.diagonal(dim1=-2, dim2=-1).mean(-1)
    used, one = size > 0, torch.eye(VECTOR, device=curved.device)
    lower, failed = torch.linalg.cholesky_ex(curved + one * torch.where(used, 1e-6 * size, 1.0)[..., None, None])
    good = used & (failed == 0)
    return torch.where(good[..., None, None], lower, one), good


def solve_words(factors: tuple[torch.Tensor, torch.Tensor], right: torch.Tensor) -> torch.Tensor:
    """x with curved x = right for every codeword, [M, words, 8]; zeros where there is no factor."""
    lower, good = factors
    return torch.where(good[..., None], torch.cholesky_solve(right[..., None], lower)[..., 0], 0.0)


def roots_of(blocks: torch.Tensor) -> torch.Tensor:
    """Lower triangular L with L Lᵀ = B, float32 [G, 8, 8]; where that fails, of the diagonal of B alone."""
    lower, failed = torch.linalg.cholesky_ex(blocks.double())
    plain = torch.diag_embed(blocks.diagonal(dim1=-2, dim2=-1).double().clamp_min(torch.finfo(torch.float32).tiny).sqrt())
    return torch.where((failed == 0)[:, None, None], lower, plain).float()


def nearest(target: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, codes: torch.Tensor,
            codebooks: torch.Tensor, beam: int) -> torch.Tensor:
    """The codes, of a beam search for each group alone, where they are nearer to target [N, K] than those given."""
    found, roots = codes.clone(), roots_of(blocks)
    for first in range(0, target.shape[1], BLOCK):
        columns = slice(first, min(first + BLOCK, target.shape[1]))
        groups = slice(columns.start // VECTOR, columns.stop // VECTOR)
        off = target[:, columns] - ops.dequantize_codebooks(codes[:, groups], codebooks, scale)
        some = blocks[groups]
        gradient = torch.einsum("ngj,gjk->ngk", off.reshape(len(off), -1, VECTOR), some).reshape(off.shape)
        found[:, groups], _ = ops.refine_codebooks(gradient, torch.block_diag(*some), codes[:, groups], scale,
                                                   codebooks, roots[groups], beam)
    return found


def _cluster(points: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, words: int, rounds: int,
             seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One codebook [1, words, 8] and its codes [N, G, 1] for points [N, K] in units of the scales."""
    rows, groups, device = len(points), points.shape[1] // VECTOR, points.device
    vectors = points.reshape(-1, VECTOR)
    codebook = torch.zeros(1, words, VECTOR, device=device)
    if len(vectors) <= words:  # a codeword for each
        codebook[0, :len(vectors)] = vectors
        return torch.arange(len(vectors), dtype=torch.int32, device=device).reshape(rows, groups, 1), codebook
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:words]
    codebook[0] = vectors[chosen.sort().values.to(device)]
    codes = torch.zeros(rows, groups, 1, dtype=torch.int32, device=device)
    target = points * scale[:, None]
    weighted = torch.einsum("ngj,gjk->ngk", points.reshape(rows, groups, VECTOR), blocks)
    weighted = (weighted * scale.square()[:, None, None]).reshape(points.shape)
    for _ in range(rounds):
        codes = nearest(target, scale, blocks, codes, codebook, 1)
        factors = factor_words(curvature(codes, scale, blocks, words))
        codebook = solve_words(factors, ops.sum_codewords(weighted, codes, words))
        _revive(codebook, codes, points, scale, blocks)
    return nearest(target, scale, blocks, codes, codebook, 1), codebook


def _revive(codebook: torch.Tensor, codes: torch.Tensor, points: torch.Tensor, scale: torch.Tensor,
            blocks: torch.Tensor) -> None:
    """Put codewords that no group has where the error is largest."""
    used = torch.zeros(codebook.shape[1], dtype=torch.bool, device=codebook.device)
    used[codes.reshape(-1).long()] = True
    free = (~used).nonzero()[:, 0]
    if len(free):
        off = (points - ops.dequantize_codebooks(codes, codebook, torch.ones_like(scale))).reshape(len(points), -1, VECTOR)
        error = ((torch.einsum("ngj,gjk->ngk", off, blocks) * off).sum(-1) * scale.square()[:, None]).flatten()
        worst = error.argsort(descending=True, stable=True)[:len(free)]
        codebook[0, free[:len(worst)]] = points.reshape(-1, VECTOR)[worst]
