"""The steps against textbook loops, and the promises that they make: monotone, exact, independent of order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from qtool import quality
from qtool.errors import NumericalError, RecipeError
from qtool.grids import affine
from qtool.layer import Layer, damped, factor
from qtool.methods import asymmetric, gptq, refine, rtn
from qtool.moments import HeldOut
from qtool.recipe import Scheme
from qtool.tensors import CalibrationStats, QuantizedTensor

SCHEMES = [Scheme(bits=4, group_size=32), Scheme(bits=3, group_size=32, symmetric=False), Scheme(bits=2, group_size=-1),
           Scheme(bits=8, group_size=64)]


def problem(scheme: Scheme, rows: int = 24, columns: int = 128, tokens: int = 600, dtype: torch.dtype = torch.bfloat16,
            seed: int = 0) -> Layer:
    """A layer with correlated inputs of very different sizes, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.exp(torch.randn(columns, generator=generator))
    inputs = (torch.randn(2 * tokens, columns, generator=generator) @ (torch.eye(columns) + mix)) * sizes
    noise = inputs @ (0.1 * torch.randn(columns, columns, generator=generator) / columns**0.5)  # x~ - x
    fit, held = inputs[:tokens], inputs[tokens:]
    weight = torch.randn(rows, columns, generator=generator)
    held_out = HeldOut(columns, False, inputs.device)
    held_out.add(held, held + noise[tokens:])
    stats = CalibrationStats(fit.T @ fit / tokens, held_out.finish(), tokens, noise[:tokens].T @ fit / tokens)
    return Layer("layer", weight, weight, scheme, dtype, stats)


def loss(layer: Layer, grid: ModuleType = affine) -> float:
    assert layer.stats is not None and layer.quantized is not None
    return quality.output_error(layer.weight, layer.target - grid.decode(layer.quantized),
                                quality.energy_under(layer.stats.hessian))


def textbook_gptq(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int,
                  group: int, order: list[int]) -> torch.Tensor:
    """GPTQ as the paper writes it: inverse, its upper Cholesky factor, one column after another. float64."""
    weight, hessian = weight.double()[:, order].clone(), hessian.double()[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    answer = torch.zeros_like(weight)
    for j, column in enumerate(order):
        s, z = scale[:, column // group].double(), zero[:, column // group].double()
        codes = ((weight[:, j] / s).round() + z).clamp(0, 2**bits - 1)
        answer[:, column] = (codes - z) * s
        error = (weight[:, j] - answer[:, column]) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return answer


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("order", ["activation", "none"])
def test_gptq_equals_the_textbook(scheme: Scheme, order: str) -> None:
    layer = problem(scheme, dtype=torch.float32)
    options = gptq.Options(order=order, block=32)
    answer = gptq.run(layer, options).quantized
    assert answer is not None and layer.stats is not None
    columns = list(range(128)) if order == "none" else gptq.column_order(layer.stats.hessian, order).tolist()
    expected = textbook_gptq(layer.weight, damped(layer.stats.hessian, 0.01, "mean"), answer.scale, answer.zero_point,
                             scheme.bits, answer.group_size, columns)
    same = (affine.decode(answer) - expected).abs() < 1e-4
    assert same.float().mean() > 0.98  # float32 against float64: a rare tie may fall the other way


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_every_step_lowers_the_loss(scheme: Scheme) -> None:
    layer = problem(scheme)
    plain = rtn.run(layer, rtn.Options(search=False))
    solved = gptq.run(layer, gptq.Options())
    better = refine.run(solved, refine.Options(damping=0.0, sweeps=3))
    assert loss(solved) < loss(plain)
    assert loss(better) <= loss(solved)


def test_static_order_beats_no_order() -> None:
    layer = problem(SCHEMES[1])
    assert loss(gptq.run(layer, gptq.Options())) < loss(gptq.run(layer, gptq.Options(order="none")))


def test_search_lowers_the_weight_error() -> None:
    layer = problem(Scheme(bits=3, group_size=32)).having(stats=None)
    errors = []
    for search in (False, True):
        answer = rtn.run(layer, rtn.Options(search=search, signed=search)).quantized
        assert answer is not None
        errors.append(quality.weight_error(layer.weight, layer.weight - affine.decode(answer)))
    assert errors[1] < errors[0]


def test_stored_scales_are_the_scales_used() -> None:
    answer = refine.run(gptq.run(problem(SCHEMES[0]), gptq.Options()), refine.Options()).quantized
    assert answer is not None and answer.scale.dtype is torch.bfloat16
    again = (answer.codes.float() - answer.zero_point.float().repeat_interleave(32, 1))
    again = again * answer.scale.float().repeat_interleave(32, 1)
    assert torch.equal(again, affine.decode(answer))


def test_asymmetric_target_lowers_the_distance_to_the_unquantized_model() -> None:
    layer = problem(SCHEMES[0])
    held_out = layer.stats.held_out
    moved = asymmetric.run(layer, asymmetric.Options())
    assert 0 < moved.notes["asymmetric"] <= 1
    assert layer.stats is not None

    def distance(target: torch.Tensor) -> float:  # |T x - W x~|² on held-out tokens, less a constant
        change = target - layer.weight
        return held_out.energy(change) - 2 * held_out.pull(change, layer.weight)

    assert distance(moved.target) < distance(layer.target) == 0
    half = asymmetric.run(problem(SCHEMES[0]), asymmetric.Options(factor=0.5 * moved.notes["asymmetric"]))
    assert distance(moved.target) <= distance(half.target)


def tail(off: float, seed: int = 0) -> tuple[Layer, Callable[[torch.Tensor], float]]:
    """A layer whose outputs are added to something that is off by `off` times what is linear in the inputs, and noise;
    and how far the sum is from the unquantized model's, on held-out tokens."""
    generator = torch.Generator().manual_seed(seed)
    layer, tokens = problem(SCHEMES[0], seed=seed), 600
    x = torch.randn(2 * tokens, 128, generator=generator)
    clean = x + 0.1 * torch.randn(2 * tokens, 128, generator=generator) + 0.05 * x.roll(1, 1)
    residual = off * x @ torch.randn(128, 24, generator=generator) + torch.randn(2 * tokens, 24, generator=generator)
    held_out = HeldOut(128, False, x.device)
    held_out.add(x[tokens:], clean[tokens:], residual[tokens:])
    fit, moves = x[:tokens], (clean - x)[:tokens]
    stats = CalibrationStats(fit.T @ fit / tokens, held_out.finish(), tokens, moves.T @ fit / tokens,
                             residual=residual[:tokens].T @ fit / tokens)

    def distance(target: torch.Tensor) -> float:
        return float((x[tokens:] @ target.T - clean[tokens:] @ layer.weight.T - residual[tokens:]).square().mean())

    return layer.having(stats=stats), distance


def test_what_outputs_are_added_to_is_made_up_for() -> None:
    layer, distance = tail(0.3)
    alone = asymmetric.run(replace(layer, stats=replace(layer.stats)), asymmetric.Options(residual=False))
    assert alone.notes.keys() == {"asymmetric"}
    moved = asymmetric.run(layer, asymmetric.Options())
    assert 0.8 < moved.notes["residual"] <= 1 and 0 < moved.notes["asymmetric"] <= 1
    assert distance(moved.target) < 0.7 * distance(alone.target) < 0.7 * distance(layer.weight)
    assert layer.stats.residual is None and layer.stats.cross is None  # large, and no longer needed


@settings(max_examples=20, deadline=None)
@drawn(off=st.sampled_from([0.0, 0.01, 0.3]), seed=st.integers(0, 50), limit=st.sampled_from([0.0, 0.4, 1.0]))
def test_the_factors_are_the_best_of_the_box(off: float, seed: int, limit: float) -> None:
    layer, distance = tail(off, seed)
    moved = asymmetric.run(replace(layer, stats=replace(layer.stats)), asymmetric.Options(limit=limit))
    best = distance(moved.target)
    assert all(0 <= moved.notes[which] <= limit for which in ("asymmetric", "residual"))
    ends = [asymmetric.run(replace(layer, stats=replace(layer.stats, **without)), asymmetric.Options(factor=1.0)).target
            - layer.weight for without in ({"residual": None}, {"cross": layer.stats.cross * 0})]
    for first in torch.linspace(0, limit, 5):
        for second in torch.linspace(0, limit, 5):
            assert best <= distance(layer.weight + first * ends[0] + second * ends[1]) * (1 + 1e-4)


@pytest.mark.parametrize("mode", ["mean", "relative"])
def test_factor_is_the_cholesky_in_the_order_asked_for(mode: str) -> None:
    hessian = problem(SCHEMES[0]).stats.hessian
    before = hessian.clone()
    order = torch.randperm(len(hessian), generator=torch.Generator().manual_seed(1))
    for index, wanted in ((None, slice(None)), (order, order)):
        lower, damping, repaired = factor("x", hessian, 0.01, mode, index)
        assert torch.equal(lower, lower.tril())
        expected = damped(hessian, 0.01, mode)[wanted][:, wanted]
        assert torch.allclose(lower @ lower.T, expected, rtol=1e-3, atol=1e-3)
        assert (damping, repaired) == (0.01, {})
    assert torch.equal(hessian, before)


def test_indefinite_hessian_is_repaired_and_told() -> None:
    indefinite = torch.eye(16)
    indefinite[0, 1] = indefinite[1, 0] = 1.02
    _, damping, repaired = factor("x", indefinite, 0.001, "mean")
    assert damping > 0.001 and f"at damping {damping:g}, not 0.001" in repaired["hessian"]
    hopeless = torch.eye(16)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    with pytest.raises(NumericalError, match="layer.7"):
        factor("layer.7", hopeless, 0.01, "mean")
    with pytest.raises(NumericalError, match="not finite"):
        factor("x", torch.full((4, 4), float("nan")), 0.01, "mean")


def test_dead_inputs_are_rounded_not_zeroed() -> None:
    layer = problem(SCHEMES[0])
    layer.stats.hessian[5] = layer.stats.hessian[:, 5] = 0
    answer = gptq.run(layer, gptq.Options()).quantized
    step = answer.scale.float()[:, 0].abs()
    assert ((affine.decode(answer)[:, 5] - layer.weight[:, 5]).abs() <= step * 1.01).float().mean() > 0.5


@pytest.mark.parametrize("group", [32, 64, 48, 96, -1])
@pytest.mark.parametrize("block", [32, 64])
def test_refine_never_raises_the_loss_and_its_bookkeeping_is_exact(group: int, block: int) -> None:
    columns = 192
    layer = problem(Scheme(bits=3, group_size=group), columns=columns)
    layer = rtn.run(layer, rtn.Options())
    hessian = damped(layer.stats.hessian, 0.01, "mean")

    def damped_loss(answer: QuantizedTensor) -> float:
        return quality.output_error(layer.weight, layer.target - affine.decode(answer),
                                    quality.energy_under(hessian))

    answer, last = layer.quantized, damped_loss(layer.quantized)
    error = (layer.target - affine.decode(answer)) @ hessian
    for _ in range(3):
        answer = refine.sweep(affine, answer, error, hessian, block, scales=True)
        assert torch.allclose(error, (layer.target - affine.decode(answer)) @ hessian, rtol=1e-2, atol=1e-3)
        assert damped_loss(answer) <= last * (1 + 1e-6)
        last = damped_loss(answer)
    assert last < 0.9 * damped_loss(layer.quantized)


def test_refine_needs_codes() -> None:
    with pytest.raises(RecipeError, match="after gptq"):
        refine.run(problem(SCHEMES[0]), refine.Options())
