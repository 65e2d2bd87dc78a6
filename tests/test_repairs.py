"""Numerically cornered: every step on every grid stays finite and near plain rounding; repairs are told."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool import decode, found, ops, quality, repairs
from qtool.errors import NumericalError
from qtool.grids.ggml import MEMBERS
from qtool.layer import Layer, damped
from qtool.methods import asymmetric, gptq, refine, rtn
from qtool.ops import extremes
from qtool.recipe import Scheme
from tests import nasty, tiny
from tests.test_pipeline import quantize

SCHEMES = {
    "int4": Scheme(group_size=32), "uint3": Scheme(bits=3, group_size=64, symmetric=False),
    "int8-channel": Scheme(bits=8, group_size=-1), "fp8": Scheme(grid="fp8", bits=8, group_size=-1),
    "fp8-tensor": Scheme(grid="fp8", bits=8, group_size=-1, strategy="tensor"),
    "nvfp4": Scheme(grid="nvfp4", group_size=16), "mxfp4": Scheme(grid="mxfp4", group_size=32),
    "nf4": Scheme(grid="nf4", group_size=64), "nf4-dq": Scheme(grid="nf4", group_size=64, double_quant=True),
    "llm-int8": Scheme(grid="vectorwise-int8", bits=8, group_size=-1),
    **{name: MEMBERS[name].scheme for name in ("q4_0", "q4_1", "q4_k", "q6_k", "iq4_xs")},
}
STEPS: dict[str, list[tuple[ModuleType, dict[str, float]]]] = {
    "rtn": [(rtn, {})], "gptq": [(gptq, {})], "gptq undamped": [(gptq, {"damping": 0.0})],
    "gptq, refine": [(gptq, {}), (refine, {})], "rtn, refine": [(rtn, {}), (refine, {})],
    "asymmetric": [(asymmetric, {}), (gptq, {}), (refine, {})],
}


def solved(layer: Layer, steps: str) -> Layer:
    for step, options in STEPS[steps]:
        layer = step.run(layer, step.Options(**options))
    return layer


@given(st.sampled_from(sorted(SCHEMES)), st.sampled_from(sorted(STEPS)), st.sampled_from(sorted(nasty.WEIGHTS)),
       st.sampled_from(sorted(nasty.INPUTS)), st.sampled_from([1, 3, 20, 300]), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_step_is_worse_than_plain_rounding(grid: str, steps: str, weight: str, inputs: str, tokens: int, rows: int,
                                              seed: int) -> None:
    """On the very inputs that it was solved for, against the plain grid, whatever weights and inputs are like."""
    check_step(grid, steps, weight, inputs, tokens, rows, seed)


def check_step(name: str, steps: str, weight: str, inputs: str, tokens: int, rows: int, seed: int) -> None:
    scheme, dtype = SCHEMES[name], torch.bfloat16 if name in ("int4", "fp8", "fp8-tensor", "uint3") else torch.float32
    grid = found.load("grids", scheme.grid)
    if weight in ("1e30", "mixed") and grid.reach(scheme, dtype) < 1e33:
        pytest.raises(NumericalError, repairs.refuse_too_large, "x", nasty.weight(weight, 2, seed), scheme, dtype)
        return
    matrix, x = nasty.weight(weight, max(rows, 2), seed), nasty.inputs(inputs, tokens, seed)
    layer = solved(Layer("x", matrix, matrix, scheme, dtype, nasty.statistics(x)), steps)
    dense = grid.decode(layer.quantized)
    assert dense.isfinite().all() and layer.quantized.scale.float().isfinite().all()
    plain = grid.decode(grid.encode(matrix, grid.fit(matrix, scheme, dtype)))
    nearest = solved(Layer("x", matrix, matrix, scheme, dtype, nasty.statistics(x)), "rtn").quantized
    if steps == "rtn":  # it fits scales to the errors of columns, as if these were independent
        columns = torch.diag(x.double().square().mean(0).sqrt())
        assert nasty.loss(matrix, dense, columns) <= 1.1 * nasty.loss(matrix, plain, columns) + 1e-6
    elif steps != "asymmetric":  # which is near another target
        bound = max(nasty.loss(matrix, other, x) for other in (plain, grid.decode(nearest)))
        assert nasty.loss(matrix, dense, x) <= 1.5 * bound + 1e-6
    assert 0 <= quality.weight_error(matrix, matrix - dense) < float("inf")
    repairs.of_weights(matrix, layer.quantized, dense)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_a_fit_does_not_depend_on_the_size_of_weights(size: float) -> None:
    """Searched grids of any size are those of ordinary weights: nothing is lost where squares overflow or vanish."""
    unit = 2.0 ** round(torch.tensor(size).log2().item())
    weight = nasty.weight("normal", 4, 3)
    importance = torch.rand(nasty.COLUMNS, generator=torch.Generator().manual_seed(0))
    levels, edges = found.load("grids", "nf4").GRID.levels, found.load("grids", "nf4").GRID.edges
    for dtype in (torch.float32, torch.bfloat16):
        for symmetric in (True, False):
            small = ops.fit_affine(weight, importance, 32, 4, symmetric, dtype)
            large = ops.fit_affine(weight * unit, importance * unit, 32, 4, symmetric, dtype)
            assert torch.equal(small[0] * unit, large[0]) and torch.equal(small[1], large[1])
        small = ops.fit_levels(weight, importance, 64, levels, edges, dtype)
        assert torch.equal(small * unit, ops.fit_levels(weight * unit, importance, 64, levels, edges, dtype))


@given(st.integers(-120, 120), st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=8, max_size=8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_weighing_keeps_ratios_and_gives_the_dead_a_little(power: int, values: list[float]) -> None:
    importance = torch.tensor(values) * 2.0**power
    weighed = extremes.weighing(importance)
    assert weighed.isfinite().all() and (weighed > 0).all()
    if (importance > 0).any():
        live = (importance > 2.0**-100) & (weighed > 2.0**-100)
        ratio = weighed[live].double() / importance[live].double()
        assert (ratio == ratio[:1]).all() and bool((torch.frexp(ratio).mantissa == 0.5).all())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q6_k", "iq4_xs"])
def test_blocks_whose_inputs_are_dead_are_rounded_not_zeroed(name: str) -> None:
    """A sub-block without importance, as of an expert's or a pruned channel's, keeps its weights."""
    grid, weight, importance = MEMBERS[name], nasty.weight("normal", 6, 0), torch.ones(nasty.COLUMNS)
    importance[32:96] = 0
    dense = grid.decode(grid.encode(weight, grid.fit(weight, grid.scheme, torch.float16, importance, 24, True, 2)))
    assert quality.weight_error(weight[:, 32:96], (weight - dense)[:, 32:96]) < 0.05


def test_one_massive_column_does_not_spoil_its_block() -> None:
    """The closed form for a scale and a minimum would be lost to rounding beside one column that counts alone."""
    importance = torch.ones(nasty.COLUMNS)
    importance[3] = 1e12
    weight, grid = nasty.weight("normal", 64, 0), MEMBERS["q4_1"]
    dense = grid.decode(grid.encode(weight, grid.fit(weight, grid.scheme, torch.float16, importance, 24, True, 2)))
    assert quality.weight_error(weight[:, 3:4], (weight - dense)[:, 3:4]) < 0.01


def test_dead_inputs_do_not_raise_the_damping() -> None:
    """λ is a part of the mean of the live diagonal, however small it is beside the 1 of the paper's dead columns."""
    hessian = torch.diag(torch.tensor([1e-6, 3e-6, 0.0, 0.0]))
    assert torch.allclose(damped(hessian, 0.01, "mean").diagonal(), torch.tensor([1e-6, 3e-6, 2e-6, 2e-6]) + 2e-8)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_errors_are_honest_at_any_size(size: float) -> None:
    weight, hessian = nasty.weight("normal", 4, 0) * size, torch.eye(nasty.COLUMNS)
    for part in (1.0, 0.5):
        assert quality.weight_error(weight, weight * part) == pytest.approx(part**2, rel=1e-3)
        error = quality.output_error(weight, weight * part, quality.energy_under(hessian))
        assert error == pytest.approx(part**2, rel=1e-3)
    assert quality.output_error(weight, weight, lambda matrix: 0.0) is None


@pytest.mark.parametrize(("method", "settings", "largest", "works"), [
    ("rtn", {"format": "gptq"}, 6e5, False), ("rtn", {"format": "gptq"}, 4e5, True),
    ("rtn", {"format": "compressed-tensors"}, 1e30, True), ("rtn", {"format": "compressed-tensors"}, 3e38, False),
    ("llm-int8", {}, 7e4, False), ("q4_0", {}, 6e5, False), ("nvfp4", {}, 7e35, True),
])
def test_what_no_scale_reaches_is_refused_by_name(method: str, settings: dict[str, str], largest: float, works: bool,
                                                  tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    change(model, {f"{name}.weight": lambda matrix: matrix[3, 4:5].fill_(largest)})
    if method in ("rtn", "llm-int8"):
        settings = {**settings, **({"scheme__group_size": "-1"} if method != "rtn" else {})}
    if method in ("nvfp4", "q4_0"):
        settings = {**settings, "scheme__group_size": 16 if method == "nvfp4" else 32}
    if not works:
        with pytest.raises(NumericalError, match=rf"{name}: its largest weight.*skip: true"):
            quantize(model, tmp_path / "out", method, **settings)
        return
    quantize(model, tmp_path / "out", method, steps=[{"rtn": {}}], **settings)
    dense = decode.open_model(str(tmp_path / "out")).decoded(name)
    assert dense.isfinite().all() and dense.max() == pytest.approx(largest, rel=0.15)


def change(model: Path, changes: dict[str, nasty.Change]) -> None:
    """Change some tensors of a checkpoint in place."""
    tensors = load_file(model / "model.safetensors")
    for name, made in changes.items():
        made(tensors[name])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_old_manifests_had_a_sentence() -> None:
    """A repair was one sentence once; such a manifest is read, and its repair not told."""
    layers = [{"name": "a", "repaired": "Hessian"}, {"name": "b", "repaired": {"hessian": "x", "too_small": "y"}},
              {"name": "c", "pooled": True}]
    assert [names for _, names in repairs.listed(layers)] == [["b"], ["b"], ["c"]]
    assert json.dumps(repairs.kinds(layers[1])) == '["hessian", "too_small"]'
