"""Pure-torch versions of the ops on additive codebooks; see reference.py."""

from __future__ import annotations

import torch

from qtool.ops.checks_codebooks import VECTOR
from qtool.ops.reference import Pair

CHUNK = 1 << 22  # scores that are held at one time


def dequantize_codebooks(codes: torch.Tensor, codebooks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    total = _words(codes, codebooks) * scale[:, None, None]
    return total.reshape(len(codes), codes.shape[1] * VECTOR)


def sum_codewords(values: torch.Tensor, codes: torch.Tensor, words: int) -> torch.Tensor:
    books = codes.shape[2]
    sums = torch.zeros(books, words * VECTOR, dtype=torch.float64, device="meta" if values.is_meta else "cpu")
    vectors, places = values.to(sums.device).double().reshape(-1), codes.to(sums.device)  # a GPU adds in any order
    for book in range(books):
        place = places[..., book].reshape(-1, 1).long() * VECTOR + torch.arange(VECTOR, device=sums.device)
        sums[book].index_add_(0, place.reshape(-1), vectors)
    return sums.float().reshape(books, words, VECTOR).to(values.device)


def refine_codebooks(gradient: torch.Tensor, hessian: torch.Tensor, old_codes: torch.Tensor, scale: torch.Tensor,
                     codebooks: torch.Tensor, roots: torch.Tensor, beam: int) -> Pair:
    slope, codes, delta = gradient.clone(), old_codes.clone(), torch.zeros_like(gradient)
    step = scale[:, None]
    for group in range(codes.shape[1]):
        here, root = slice(group * VECTOR, (group + 1) * VECTOR), roots[group]
        table = _times(codebooks, root)
        old = _words(codes[:, group], codebooks)
        target = _times(old, root) + _solved(root, slope[:, here]) / step
        rows = max(1, CHUNK // (table.shape[1] * beam))
        found = torch.cat([_search(part, table, beam) for part in target.split(rows)]) if len(target) else \
            codes[:, group]
        move = step * _words(found, codebooks) - step * old
        taken = (_gain(move, slope[:, here], hessian[here, here]) > 0)[:, None]
        codes[:, group] = torch.where(taken, found, codes[:, group])
        delta[:, here] = change = torch.where(taken, move, 0.0)
        for j in range(VECTOR):
            slope[:, here.stop:] -= change[:, j:j + 1] * hessian[here.start + j, here.stop:]
    return codes, delta


def _words(codes: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """The sums of the codewords of codes [..., M], [..., 8]."""
    total = codebooks[0][codes[..., 0].long()]
    for book in range(1, len(codebooks)):
        total = total + codebooks[book][codes[..., book].long()]
    return total


def _times(vectors: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Vectors [..., 8] times L [8, 8], added up in order."""
    product = vectors[..., :1] * root[0]
    for j in range(1, VECTOR):
        product = product + vectors[..., j:j + 1] * root[j]
    return product


def _solved(root: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """y with L y = e for each row e of slope [N, 8]."""
    solved = torch.empty_like(slope)
    for i in range(VECTOR):
        left = slope[:, i]
        for j in range(i):
            left = left - root[i, j] * solved[:, j]
        solved[:, i] = left / root[i, i]
    return solved


def _gain(move: torch.Tensor, slope: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    gain = torch.zeros_like(move[:, 0])
    for i in range(VECTOR):
        product = square[i, 0] * move[:, 0]
        for j in range(1, VECTOR):
            product = product + square[i, j] * move[:, j]
        gain = gain + move[:, i] * (2.0 * slope[:, i] - product)
    return gain


def _search(target: torch.Tensor, table: torch.Tensor, beam: int) -> torch.Tensor:
    """Codes int32 [N, M] for targets [N, 8], with codewords [M, C, 8]: a beam over the codebooks in turn."""
    books, words, _ = table.shape
    left, score = target[:, None], torch.zeros(len(target), 1, device=target.device)
    codes = torch.empty(len(target), 1, 0, dtype=torch.int32, device=target.device)
    for book in range(books):
        here = table[book]
        half = 0.5 * _in_order(here, here)
        scores = (score[..., None] + (half - _in_order(left[:, :, None], here))).flatten(1)
        scores = torch.where(scores.isnan(), torch.inf, scores)  # never better than anything
        keep = beam if book + 1 < books else 1
        short = max(0, keep - scores.shape[1])
        scores = torch.nn.functional.pad(scores, (0, short), value=torch.inf)
        score, place = (part[:, :keep] for part in scores.sort(dim=1, stable=True))
        place = torch.where(score.isinf() & (score > 0), 0, place)
        which, word = place // words, place % words
        left = left.gather(1, which[..., None].expand(-1, -1, VECTOR)) - here[word]
        before = codes.gather(1, which[..., None].expand(-1, -1, book))
        codes = torch.cat([before, word[..., None].to(torch.int32)], -1)
    return codes[:, 0]


def _in_order(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Products of vectors of 8, added up in order."""
    total = left[..., 0] * right[..., 0]
    for k in range(1, VECTOR):
        total = total + left[..., k] * right[..., k]
    return total
