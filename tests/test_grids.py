"""Grids of levels: their tables against their definitions, their fits, and the solver on them."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import found, quality
from qtool.grids import _absmax, fp4, fp8, mxfp4, nf4, nvfp4
from qtool.layer import Layer
from qtool.methods import gptq, refine, rtn
from qtool.recipe import Scheme
from tests.test_methods import loss, problem

SCHEMES = {
    "nf4": Scheme(grid="nf4", group_size=64), "nf4-dq": Scheme(grid="nf4", group_size=64, double_quant=True),
    "fp4": Scheme(grid="fp4", group_size=64), "fp8": Scheme(grid="fp8", bits=8, group_size=-1),
    "fp8-tensor": Scheme(grid="fp8", bits=8, group_size=-1, strategy="tensor"),
    "mxfp4": Scheme(grid="mxfp4", group_size=32), "nvfp4": Scheme(grid="nvfp4", group_size=16),
}


def test_nf4_is_the_table_of_qlora() -> None:
    """Quantiles of the normal distribution, 8 above zero, 7 below; the popular symmetric formula is another table."""
    quantile, top = NormalDist().inv_cdf, 0.9677083
    above = [quantile(top + (0.5 - top) * step / 8) for step in range(8)]
    below = [-quantile(top + (0.5 - top) * step / 7) for step in range(7)]
    expected = torch.tensor(sorted([*above, *below, 0.0])) / max(above)
    torch.testing.assert_close(nf4.LEVELS, expected, rtol=0, atol=1.5e-7)
    popular = torch.tensor([quantile((2 * index + 1) / 32) for index in range(16)])
    assert (popular / popular.max() - nf4.LEVELS).abs().max() > 0.03


def test_small_floats_are_those_of_their_types() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(fp8.GRID.levels, every[every.isfinite()].unique())
    assert mxfp4.GRID.levels[7:].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(mxfp4.GRID.levels, -mxfp4.GRID.levels.flip(0))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-500, 500, width=32) | st.sampled_from(fp8.GRID.edges.tolist()), min_size=1, max_size=64))
def test_fp8_rounds_as_the_cast_does(values: list[float]) -> None:
    weight = torch.tensor([values])
    fitted = fp8.fit(torch.full_like(weight, 448.0), SCHEMES["fp8"], torch.float32)
    assert fitted.scale.item() == 1
    expected = weight.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(fp8.decode(fp8.encode(weight, fitted)), expected + 0.0)


def test_fp4_rounds_ties_to_even() -> None:
    """E2M1: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4, whatever the sign."""
    ties, expected = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], [0, 1, 1, 2, 2, 4, 4, 6]
    weight = torch.tensor([ties * 2 + [-one for one in ties] * 2])
    fitted = mxfp4.fit(weight, SCHEMES["mxfp4"], torch.float32)
    assert fitted.scale.item() == 1
    assert mxfp4.decode(mxfp4.encode(weight, fitted))[0, :8].tolist() == expected
    assert mxfp4.decode(mxfp4.encode(weight, fitted))[0, 16:24].tolist() == [-one for one in expected]


def test_bitsandbytes_fp4_is_another_type() -> None:
    assert not fp4.GRID.levels[7:9].any()
    assert fp4.GRID.levels[9:].tolist() == pytest.approx([1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1], rel=1e-6)


def test_the_dynamic_table() -> None:
    table = _absmax.dynamic_table()
    assert len(table) == 256 and torch.equal(table, table.sort().values)
    assert table[127] == 0 and table[255] == 1
    assert table[[0, 1, 253, 254]].tolist() == pytest.approx([-0.99297, -0.97891, 0.97891, 0.99297], abs=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_is_to_the_nearest_level(name: str) -> None:
    scheme = SCHEMES[name]
    grid = found.load("grids", scheme.grid)
    weight = problem(scheme).weight
    weight[3] = 0
    for search in (8,) if name == "nf4-dq" else (1, 8):  # a plain fit rounds before its scales are nested
        fitted = grid.fit(weight, scheme, torch.bfloat16, None, search, True, 1)
        answer = grid.encode(weight, fitted)
        decoded = grid.decode(answer)
        step = fitted.scale.float().repeat_interleave(answer.group_size, 1)
        best = (weight[..., None] - grid.GRID.levels * step[..., None]).abs().amin(-1)
        torch.testing.assert_close((weight - decoded).abs(), best, rtol=1e-4, atol=1e-6)
        if name != "nf4-dq":  # nested scales never are exactly zero
            assert not decoded[3].any()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_searched_scale_is_no_worse_than_absmax(name: str) -> None:
    scheme, errors = SCHEMES[name], []
    grid, weight = found.load("grids", scheme.grid), problem(scheme).weight
    for steps, rounds in ((1, 0), (24, 2)):
        answer = grid.encode(weight, grid.fit(weight, scheme, torch.float32, None, steps, True, rounds))
        errors.append(quality.weight_error(weight, weight - grid.decode(answer)))
    assert errors[1] <= errors[0] * (1.01 if name == "nf4-dq" else 1)  # its scales are rounded after the search


@pytest.mark.parametrize("name", SCHEMES)
def test_the_solver_works_on_every_grid(name: str) -> None:
    layer = problem(SCHEMES[name])
    plain = rtn.run(layer, rtn.Options())
    solved = gptq.run(layer, gptq.Options())
    better = refine.run(solved, refine.Options(damping=0.0))
    assert solved.quantized.grid == SCHEMES[name].grid

    def found_loss(one: Layer) -> float:
        return loss(one, found.load("grids", SCHEMES[name].grid))

    assert found_loss(better) <= found_loss(solved) < found_loss(plain)


def test_scales_are_what_their_types_hold() -> None:
    weight = problem(SCHEMES["mxfp4"]).weight
    power = mxfp4.fit(weight, SCHEMES["mxfp4"], torch.bfloat16, None, 8).scale.log2()
    assert torch.equal(power, power.round())
    for steps in (1, 8):
        fitted = nvfp4.fit(weight, SCHEMES["nvfp4"], torch.bfloat16, None, steps)
        local = nvfp4.local_scales(fitted)
        assert torch.equal(nvfp4.effective(local, fitted.extra["global_scale"]), fitted.scale)
        assert local.float().max() <= 448 and local.float().min() > 0
    assert nvfp4.fit(torch.zeros(2, 32), SCHEMES["nvfp4"], torch.bfloat16).scale.isfinite().all()


def test_a_search_finds_the_best_power_of_two() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = []
    for exponent in range(-8, 4):
        fitted = mxfp4.GRID.fitted(torch.full((64, 8), 2.0**exponent), 32)
        off = weight - mxfp4.decode(mxfp4.encode(weight, fitted))
        errors.append(off.reshape(64, 8, 32).square().sum(-1))
    fitted = mxfp4.fit(weight, SCHEMES["mxfp4"], torch.bfloat16, None, 2)
    off = weight - mxfp4.decode(mxfp4.encode(weight, fitted))
    torch.testing.assert_close(off.reshape(64, 8, 32).square().sum(-1), torch.stack(errors).amin(0))


@pytest.mark.parametrize("steps", [1, 8])
def test_rows_share_the_scales_of_fp8(steps: int) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    weight[:128, 128:256] *= 100
    weight[128:, :128] = 0
    for strategy, group, high, wide in (("tensor", -1, 256, 384), ("block", 128, 128, 128)):
        scheme = Scheme(grid="fp8", bits=8, group_size=group, strategy=strategy)
        fitted = fp8.fit(weight, scheme, torch.float32, None, steps)
        for row in range(0, 256, high):
            for index in range(384 // wide):
                cell = weight[row:row + high, index * wide:(index + 1) * wide]
                scale = fitted.scale[row:row + high, index]
                assert (scale == scale[0]).all()
                least = float(cell.abs().max()) / 448 or 1.0
                assert least * 0.999 <= float(scale[0]) <= least * (2 if steps > 1 else 1.001)
        off = (weight - fp8.decode(fp8.encode(weight, fitted))).abs()
        # half a step of the mantissa, or of the smallest numbers there are
        assert (off <= torch.maximum(weight.abs() / 16, fitted.scale.repeat_interleave(wide, 1) / 1024) * 1.001).all()


def test_double_quantization_keeps_the_scales() -> None:
    scale = torch.rand(40, 16) * 0.1 + 0.01
    nested = _absmax.nest(scale)
    again = _absmax.unnest(nested, scale.shape)
    assert nested["nested_codes"].shape == (640,) and nested["nested_absmax"].shape == (3,)
    assert (again - scale).abs().max() < 0.01 * scale.max()


@pytest.mark.parametrize(("scheme", "words"), [
    (Scheme(grid="nf4", bits=8, group_size=64), "has 4 bits, not 8"),
    (Scheme(grid="nf4", group_size=48), "groups of 32, 64"),
    (Scheme(grid="fp8", bits=8, group_size=-1, symmetric=False), "no zero points"),
    (Scheme(grid="mxfp4", group_size=64), "groups of 32, not 64"),
    (Scheme(grid="nvfp4", group_size=-1), "groups of 16, not -1"),
    (Scheme(strategy="tensor"), "leave strategy out"), (Scheme(grid="nf4", group_size=64, strategy="block"), "for fp8"),
    (Scheme(grid="fp8", bits=8, group_size=-1, strategy="block"), "goes with group_size 128, not -1"),
    (Scheme(double_quant=True), "leave --double-quant out"),
    (Scheme(grid="fp8", bits=8, group_size=-1, double_quant=True), "leave --double-quant out"),
])
def test_what_a_grid_cannot_be(scheme: Scheme, words: str) -> None:
    assert words in str(found.load("grids", scheme.grid).check(scheme))
