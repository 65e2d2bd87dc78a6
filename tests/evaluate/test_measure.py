"""Means, quantiles and their errors, on logits and numbers of which the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.evaluate import measure


def test_kl_of_impossible_tokens_is_finite() -> None:
    figures = measure.Figures()
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.5, 0.0, -math.inf]])
    measure.add(figures, torch.tensor([0, 1]), logits * 2, logits)
    probability = torch.tensor([[0.0, 1.0], [0.5, 0.0]]).softmax(-1)
    other = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).softmax(-1)
    expected = (probability * (probability / other).log()).sum(-1)
    assert torch.allclose(figures.kl[0], expected) and figures.same == [1.0]


def test_chunks_do_not_change_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(300, 50, generator=generator) for _ in range(2)]
    targets = torch.randint(0, 50, (300,), generator=generator)
    results = []
    for rows in (7, 1000):
        monkeypatch.setattr(measure, "ROWS", rows)
        figures = measure.Figures()
        measure.add(figures, targets, *logits)
        results.append((figures.nll, measure.divergence(figures)))
    assert results[0][0][0] == pytest.approx(results[1][0][0])
    assert results[0][1]["kl"]["mean"] == pytest.approx(results[1][1]["kl"]["mean"])


@pytest.mark.parametrize(("freedom", "expected"), [
    (1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (19, 2.09302), (59, 2.00100), (1000, 1.96234)])
def test_student_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert measure.student(freedom) == pytest.approx(expected, rel=1e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    truth, covered, runs = 2.0, 0, 2000
    for values in (truth + 0.3 * torch.randn(runs, 6, generator=generator, dtype=torch.float64)).tolist():
        low, high = measure.perplexity(values)["perplexity_interval"]
        covered += low < math.exp(truth) < high
    assert covered / runs == pytest.approx(0.95, abs=0.015)  # 3 standard errors


def test_a_single_window_has_no_interval() -> None:
    one = measure.perplexity([2.0])
    assert one["perplexity_interval"] is None and one["nll_error"] == 0.0


def test_quantiles_and_their_errors() -> None:
    """Against the spread of the quantile over fresh draws of all windows."""
    generator = torch.Generator().manual_seed(2)

    def draw() -> list[torch.Tensor]:
        level = torch.rand(40, 1, generator=generator)
        return list(level + torch.rand(40, 100, generator=generator))

    found = measure._quantiles(first := draw())
    ordered = torch.cat(first).sort().values
    for name, share in measure.QUANTILES:
        assert found[name] == float(ordered[round(share * (len(ordered) - 1))])
        spread = torch.stack([torch.cat(draw()).quantile(share) for _ in range(200)]).std()
        assert 0.5 * spread < found[f"{name}_error"] < 2 * spread
