"""The step equalize: what it foresees, against derivatives and against what the solver then leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import recipe
from qtool.checkpoint import open_checkpoint
from qtool.errors import NumericalError, QtoolError
from qtool.grids import affine
from qtool.layer import Layer, Survey
from qtool.methods import equalize, gptq
from qtool.moments import HeldOut
from qtool.plan import make_plan
from qtool.recipe import Scheme
from qtool.tensors import CalibrationStats


def survey_of(hessian: torch.Tensor) -> Survey:
    none = torch.zeros(len(hessian))
    return Survey(none, none, none, none, hessian)


def problem(rows: int, columns: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose columns have sizes of their own, and the Hessian of correlated inputs."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.exp(spread * torch.randn(columns))
    inputs = torch.randn(4 * columns, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    inputs *= torch.exp(0.5 * torch.randn(columns))
    return weight, inputs.T @ inputs / len(inputs)


def layer_of(weight: torch.Tensor, scheme: Scheme, hessian: torch.Tensor | None = None) -> Layer:
    stats = None if hessian is None else CalibrationStats(hessian, HeldOut(len(hessian), True, hessian.device), 1)
    return Layer("linear", weight, weight, scheme, torch.float32, stats)


def solved(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> float:
    """tr(D H Dᵀ) of the unscaled weight after `gptq` has solved the scaled one."""
    done = gptq.run(layer_of(weight * scale, scheme, hessian / scale[:, None] / scale), gptq.Options())
    assert done.quantized is not None
    off = affine.decode(done.quantized) / scale - weight
    return float(((off @ hessian) * off).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 4, 16]), st.integers(0, 10_000))
def test_slopes_are_those_of_the_loss(rows: int, groups: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, pivot = torch.randn(rows, groups * width), torch.rand(groups * width) + 0.1
    log = 0.3 * torch.randn(groups * width)
    free = log.clone().requires_grad_()
    size = (weight.abs() * free.exp()).view(rows, groups, width)
    square = size.pow(equalize.NORM).sum(2).pow(2 / equalize.NORM)
    loss = ((pivot * (-2 * free).exp()).view(groups, width).sum(1) * square.sum(0)).sum()
    loss.backward()
    weights = equalize.Weights(weight, width)
    taken, added = weights.slopes(log, pivot)
    assert weights.loss(log, pivot) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert torch.allclose(2 * (added - taken), free.grad, rtol=1e-3, atol=1e-4 * float(loss.detach()))


@pytest.mark.parametrize("scheme", [Scheme(bits=4, group_size=32), Scheme(bits=3, group_size=32, symmetric=False),
                                    Scheme(bits=4, group_size=-1)], ids=["int4", "uint3", "rows"])
def test_what_is_foreseen_comes_about(scheme: Scheme) -> None:
    weight, hessian = problem(96, 128, 0, 0.4)
    [(scale, told)] = equalize.input_scales(layer_of(weight, scheme), survey_of(hessian), equalize.Options())
    ratio = solved(weight, hessian, scale, scheme) / solved(weight, hessian, torch.ones(128), scheme)
    assert ratio < 0.9 and told["equalize"] == pytest.approx(ratio, abs=0.12)


def test_channels_that_cannot_be_improved_stay() -> None:
    weight, hessian = torch.ones(8, 64), torch.eye(64)
    [(scale, told)] = equalize.input_scales(layer_of(weight, Scheme(group_size=32)), survey_of(hessian),
                                            equalize.Options())
    assert torch.equal(scale, torch.ones(64)) and told == {"equalize": 1.0}


def test_channels_that_share_a_scale() -> None:
    weight, hessian = problem(64, 64, 1)
    pairs = survey_of(hessian)
    object.__setattr__(pairs, "tie", lambda values: values.view(2, 32).mean(0).repeat(2))
    [(scale, told)] = equalize.input_scales(layer_of(weight, Scheme(group_size=32)), pairs, equalize.Options())
    assert torch.equal(scale[:32], scale[32:]) and told["equalize"] < 1
    [(_, alone)] = equalize.input_scales(layer_of(weight, Scheme(group_size=32)), survey_of(hessian),
                                         equalize.Options())
    assert alone["equalize"] < told["equalize"]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_dead_channels(rows: int) -> None:
    """No weights, no inputs, neither: every scale is a number that can be divided by."""
    weight, hessian = problem(rows, 64, 2)
    weight[:, 3] = 0
    weight[:, 32:] = 0
    for dead in (5, 40):
        hessian[dead] = hessian[:, dead] = 0
    [(scale, _)] = equalize.input_scales(layer_of(weight, Scheme(group_size=32)), survey_of(hessian),
                                         equalize.Options())
    assert scale.isfinite().all() and (scale > 0.04).all() and (scale < 21).all()


def test_no_hessian_is_refused() -> None:
    look = Survey(*4 * [torch.zeros(64)])
    with pytest.raises(NumericalError, match="linear: equalize needs the Hessian"):
        equalize.input_scales(layer_of(torch.ones(2, 64), Scheme(group_size=32)), look, equalize.Options())


@pytest.mark.parametrize("changes", [
    {"scheme.grid": "nf4", "format": "bitsandbytes"},
    {"scheme.activations": "token", "scheme.bits": 8, "scheme.group_size": -1}])
def test_other_grids_are_refused_while_planning(changes: dict[str, object], tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    base = recipe.override(recipe.preset("gptq"), {"steps": ["equalize", "gptq"], "scheme.group_size": 64, **changes})
    with pytest.raises(QtoolError, match="the equalize step foresees the error of integers"):
        make_plan(open_checkpoint(str(model)), base, tmp_path / "out", "cpu")
