"""Sums of products against direct computation; both ways to keep held-out tokens give the same answers."""

from __future__ import annotations

import pytest
import torch

from qtool import moments
from qtool.moments import HeldOut

CPU = torch.device("cpu")
TOKENS, COLUMNS, ROWS = 24, 17, 5


@pytest.mark.parametrize("columns", [1, 64, 129, 700, 1300])
def test_triangle_and_mirror(columns: int) -> None:
    x = torch.randn(50, columns)
    total = moments.zeros(columns, CPU)
    moments.add_gram(total, x)
    moments.add_gram(total, x)
    found = moments.mirror(total)
    torch.testing.assert_close(found, 2 * x.T @ x, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)


def test_bf16_products_are_summed_in_float32() -> None:
    x = torch.randn(4096, 8).bfloat16()
    total = moments.zeros(8, CPU)
    moments.add_gram(total, x)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(moments.mirror(total).double(), exact, rtol=1e-5, atol=1e-3)


def held(keep: bool, x: torch.Tensor, x_float: torch.Tensor | None, cuts: tuple[int, ...] = (7,),
         residual: torch.Tensor | None = None) -> HeldOut:
    found = HeldOut(x.shape[1], keep, CPU)
    edges = [0, *cuts, len(x)]
    for start, stop in zip(edges, edges[1:], strict=False):
        found.add(x[start:stop], *(None if one is None else one[start:stop] for one in (x_float, residual)))
    return found


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_and_pull(keep: bool, dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, COLUMNS).to(dtype)
    x_float = (x + 0.1 * torch.randn_like(x)).to(dtype)
    weight, change = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    off = torch.randn(TOKENS, ROWS).to(dtype)
    found = held(keep, x, x_float, residual=off).finish()
    again = HeldOut.restored(TOKENS, True, COLUMNS, found.state(), CPU)
    assert (found.tokens, found.paired, found.finite(), found.knows_residual) == (TOKENS, True, True, True)
    assert not held(keep, x, x_float).finish().knows_residual
    for one in (found, again):
        assert one.product(weight, change) == pytest.approx(
            float(((x.float() @ weight.T) * (x.float() @ change.T)).sum() / TOKENS), rel=1e-3)
        assert one.pull_back(change) == pytest.approx(
            float(((x.float() @ change.T) * off.float()).sum() / TOKENS), rel=1e-3)
    assert found.energy(weight) == pytest.approx(float((x.float() @ weight.T).square().sum() / TOKENS), rel=1e-4)
    moves = (x_float - x).float()
    assert found.pull(change, weight) == pytest.approx(
        float(((x.float() @ change.T) * (moves @ weight.T)).sum() / TOKENS), rel=1e-3)


@pytest.mark.parametrize("keep", [True, False])
def test_pooled_tokens_count_as_if_added(keep: bool) -> None:
    first, second, weight = torch.randn(TOKENS, COLUMNS), torch.randn(3, COLUMNS), torch.randn(ROWS, COLUMNS)
    one = held(keep, first, None)
    pool = one.like()
    for part in (one, held(keep, second, None, ()), HeldOut(COLUMNS, keep, CPU)):
        pool.absorb(part)
    together = held(keep, torch.cat([first, second]), None).finish()
    assert pool.tokens == TOKENS + 3 and not pool.paired
    assert pool.finish().energy(weight) == pytest.approx(together.energy(weight), rel=1e-5)
    assert one.finish().tokens == TOKENS and one.energy(weight) == pytest.approx(
        held(keep, first, None).finish().energy(weight), rel=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_no_tokens_and_bad_ones(keep: bool) -> None:
    empty = HeldOut(COLUMNS, keep, CPU).finish()
    assert empty.energy(torch.ones(1, COLUMNS)) == 0 and empty.finite() and not empty.paired
    bad = torch.ones(4, COLUMNS)
    bad[2, 3] = float("nan")
    assert not held(keep, bad, None, ()).finish().finite()
    assert not held(keep, torch.ones(4, COLUMNS), bad, ()).finish().finite()
    assert not held(keep, torch.ones(4, COLUMNS), None, (), bad).finish().finite()
