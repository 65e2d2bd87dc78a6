"""Residual k-means: codebooks and codes for vectors of 8 columns, one codebook after the other.

The error of a group of columns is (t - value) B (t - value)ᵀ with a matrix B [8, 8] of its own, such as a block on
the diagonal of H; so the mean of a cluster is (Σ s² B)⁻¹ Σ s² B x, with s the scale of each row. Source: AQLM,
arXiv 2401.06118, section 3.4, which has plain k-means.
"""

from __future__ import annotations

import torch

from qtool.ops import codebooks as ops

VECTOR = ops.VECTOR
BLOCK = 128  # columns of one call
POINTS = 64  # for each codeword, at least, that k-means looks at
LARGEST_TABLE = 1 << 22  # of weights by codeword and group


def start(target: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, books: int, words: int, rounds: int,
          seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int32 [N, K / 8, M] and codebooks float32 [M, words, 8] for target [N, K], scale float32 [N].

    blocks: B of each group, float32 [K / 8, 8, 8], positive definite.  rounds: of means and new clusters, on some rows
    where there are many.
    """
    left = target / scale[:, None]
    codes, made = [], []
    for book in range(books):
        codebook = _codebook(left, scale, blocks, words, rounds, seed + book)
        chosen = torch.zeros(*left.shape[:1], len(blocks), 1, dtype=torch.int32, device=left.device)
        chosen = nearest(left * scale[:, None], scale, blocks, chosen, codebook, 1)
        left = left - ops.dequantize_codebooks(chosen, codebook, torch.ones_like(scale))
        codes.append(chosen)
        made.append(codebook)
    return torch.cat(codes, -1), torch.cat(made)


def curvature(codes: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, words: int) -> torch.Tensor:
    """Σ s² B over the groups that have each codeword: float32 [M, words, 8, 8]."""
    groups, square = len(blocks), scale.square()[:, None]
    device = codes.device
    if words * groups > LARGEST_TABLE:
        rows = [ops.sum_codewords(square * blocks[:, j].reshape(1, -1), codes, words) for j in range(VECTOR)]
        return torch.stack(rows, 2)
    place = codes.cpu().long() * groups + torch.arange(groups)[:, None]  # a GPU adds in any order
    each = square.cpu().double().expand(-1, groups).flatten()
    mass = torch.stack([torch.bincount(place[..., book].flatten(), each, words * groups)
                        for book in range(codes.shape[2])])
    return (mass.float().reshape(-1, words, groups).to(device) @ blocks.flatten(1)).reshape(-1, words, VECTOR, VECTOR)


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
    diagonal = blocks.diagonal(dim1=-2, dim2=-1).double().clamp_min(torch.finfo(torch.float32).tiny)
    plain = torch.diag_embed(diagonal.sqrt())
    return torch.where((failed == 0)[:, None, None], lower, plain).float()


def nearest(target: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, codes: torch.Tensor,
            codebooks: torch.Tensor, beam: int) -> torch.Tensor:
    """The codes, of a beam search for each group alone, where they are nearer to target [N, K] than those given."""
    found, roots = codes.clone(), roots_of(blocks)
    gradient = weighted(target - ops.dequantize_codebooks(codes, codebooks, scale), blocks)
    for first in range(0, target.shape[1], BLOCK):
        columns = slice(first, min(first + BLOCK, target.shape[1]))
        groups = slice(columns.start // VECTOR, columns.stop // VECTOR)
        found[:, groups], _ = ops.refine_codebooks(gradient[:, columns], torch.block_diag(*blocks[groups]),
                                                   codes[:, groups], scale, codebooks, roots[groups], beam)
    return found


def weighted(vectors: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Each group of 8 columns of [N, K] times its own matrix [K / 8, 8, 8]."""
    each = vectors.reshape(len(vectors), -1, VECTOR).transpose(0, 1) @ blocks
    return each.transpose(0, 1).reshape(vectors.shape)


def _codebook(points: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, words: int, rounds: int,
              seed: int) -> torch.Tensor:
    """One codebook [1, words, 8] for points [N, K] in units of the scales."""
    codebook = torch.zeros(1, words, VECTOR, device=points.device)
    if points.numel() <= words * VECTOR:  # a codeword for each
        codebook[0, :points.numel() // VECTOR] = points.reshape(-1, VECTOR)
        return codebook
    chance = torch.Generator().manual_seed(seed)
    some = -(-POINTS * words // len(blocks))
    if some < len(points):
        rows = torch.randperm(len(points), generator=chance)[:some].sort().values.to(points.device)
        points, scale = points[rows], scale[rows]
    vectors = points.reshape(-1, VECTOR)
    chosen = torch.randperm(len(vectors), generator=chance)[:words]
    codebook[0] = vectors[chosen.sort().values.to(points.device)]
    codes = torch.zeros(len(points), len(blocks), 1, dtype=torch.int32, device=points.device)
    right = weighted(points, blocks) * scale.square()[:, None]
    for _ in range(rounds):
        codes = nearest(points * scale[:, None], scale, blocks, codes, codebook, 1)
        factors = factor_words(curvature(codes, scale, blocks, words))
        codebook = solve_words(factors, ops.sum_codewords(right, codes, words))
        _revive(codebook, codes, points, scale, blocks)
    return codebook


def _revive(codebook: torch.Tensor, codes: torch.Tensor, points: torch.Tensor, scale: torch.Tensor,
            blocks: torch.Tensor) -> None:
    """Put codewords that no group has where the error is largest."""
    used = torch.zeros(codebook.shape[1], dtype=torch.bool, device=codebook.device)
    used[codes.reshape(-1).long()] = True
    free = (~used).nonzero()[:, 0]
    if len(free):
        off = (points - ops.dequantize_codebooks(codes, codebook, torch.ones_like(scale))) * scale[:, None]
        error = (weighted(off, blocks) * off).reshape(-1, VECTOR).sum(1)
        worst = error.argsort(descending=True, stable=True)[:len(free)]
        codebook[0, free[:len(worst)]] = points.reshape(-1, VECTOR)[worst]
