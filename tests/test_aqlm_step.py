"""Additive codebooks: the grid, and the moves of the aqlm step against plain least squares and brute force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import decode, found, quality
from qtool.errors import NumericalError, PlanError
from qtool.grids import _kmeans
from qtool.grids._codebooks import CodebookGrid
from qtool.layer import Layer, damped
from qtool.methods import aqlm, rtn
from qtool.recipe import Scheme
from tests import nasty, tiny
from tests.test_methods import problem as layer_problem
from tests.test_pipeline import quantize

SCHEME = Scheme(grid="aqlm-2x8", bits=2, group_size=8)
SMALL = CodebookGrid("small", 2, 3)  # 8 codewords, so that least squares can be written down


def small(rows: int = 24, columns: int = 64, options: dict[str, Any] | None = None, seed: int = 0) -> aqlm.Problem:
    layer = layer_problem(SCHEME, rows, columns, seed=seed)
    made, _, _ = aqlm._problem(layer, layer.target, SMALL, aqlm.Options(**(options or {})), 1.0)
    return made


def loss(problem: aqlm.Problem, values: torch.Tensor) -> float:
    off = (problem.target - values).double()
    return float(((off @ problem.hessian.double()) * off).sum())


def solved(rows: int = 24, columns: int = 128, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Layer:
    return aqlm.run(layer_problem(SCHEME, rows, columns, dtype=dtype), aqlm.Options(**options))


def error_of(layer: Layer) -> float:
    assert layer.quantized is not None and layer.stats is not None
    off = layer.target - found.load("grids", layer.scheme.grid).decode(layer.quantized)
    return float(quality.output_error(layer.weight, off, quality.energy_under(layer.stats.hessian)) or 0.0)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_no_move_raises_the_loss_and_each_knows_it(rows: int, groups: int, seed: int) -> None:
    made = small(rows, groups * 8, seed=seed)
    state = made.first()
    for move in (made.refitted, made.rescaled, made.sweep, made.refitted, made.rescaled, made.sweep):
        new = move(state)
        before, after = loss(made, state.values()), loss(made, new.values())
        assert after <= before * (1 + 1e-4) + 1e-9, move
        assert float(new.loss.sum()) == pytest.approx(after, rel=1e-3, abs=1e-4)
        torch.testing.assert_close(new.error, (made.target - new.values()) @ made.hessian, rtol=1e-2, atol=1e-2)
        assert torch.equal(new.codebooks, new.codebooks.bfloat16().float())
        assert torch.equal(new.scale, new.scale.bfloat16().float())
        state = new


def test_conjugate_gradients_end_at_the_least_squares_of_all_codewords() -> None:
    """Against the dense normal equations in float64; codewords that stand for each other are a null space."""
    made = replace(small(options={"iterations": 200}), dtype=torch.float32)
    state = made.first()
    groups, words = state.codes.shape[1], 2 * SMALL.words
    design = torch.zeros(len(state.codes), groups, words, dtype=torch.float64)
    for book in range(2):
        design.scatter_(2, state.codes[..., book:book + 1].long() + book * SMALL.words, 1.0)
    design *= state.scale.double()[:, None, None]
    square = made.hessian.double().reshape(groups, 8, groups, 8)
    normal = torch.einsum("ngw,gihj,nhv->wivj", design, square, design).reshape(words * 8, words * 8)
    right = torch.einsum("ngw,gihj,nhj->wi", design, square, made.target.double().reshape(-1, groups, 8)).reshape(-1)
    best = (torch.linalg.pinv(normal, hermitian=True) @ right).reshape(2, SMALL.words, 8).float()
    least = loss(made, made.state(state.codes, best, state.scale).values())
    assert loss(made, made.refitted(state).values()) <= least * 1.001
    assert least < 0.98 * loss(made, state.values())


def test_scales_are_the_least_squares_of_each_row() -> None:
    made = replace(small(), dtype=torch.float32)
    state = made.state(made.first().codes, made.first().codebooks, made.first().scale * 1.3)
    unit = (state.values() / state.scale[:, None]).double()
    bent = unit @ made.hessian.double()
    best = (bent * made.target.double()).sum(1) / (bent * unit).sum(1)
    torch.testing.assert_close(made.rescaled(state).scale.double(), best, rtol=1e-4, atol=1e-5)


def test_in_order_is_the_textbook_recursion() -> None:
    """Group after group in float64: t_g = W_g + Σ D_i U_ig U_gg⁻¹, the nearest of all sums under U_gg U_ggᵀ."""
    made = small(6, 40, {"beam": 8})
    state = made.first()
    found_state = made.in_order(state)
    order = made.order.tolist()
    columns = [group * 8 + j for group in order for j in range(8)]
    upper = torch.linalg.cholesky(made.hessian.double()[columns][:, columns].flip(0, 1)).flip(0, 1)
    books = state.codebooks.double()
    pairs = (books[0][:, None] + books[1][None]).reshape(-1, 8)
    off = torch.zeros(6, 40, dtype=torch.float64)
    for place, group in enumerate(order):
        here, own = slice(place * 8, place * 8 + 8), upper[place * 8:place * 8 + 8, place * 8:place * 8 + 8]
        original = made.target[:, group * 8:group * 8 + 8].double()
        aim = original + off[:, :here.start] @ upper[:here.start, here] @ torch.linalg.inv(own)
        candidates = state.scale.double()[:, None, None] * pairs
        errors = ((aim[:, None] - candidates) @ own).square().sum(-1)
        codes = found_state.codes[:, group].long()
        mine = errors.gather(1, (codes[:, :1] * 8 + codes[:, 1:]))[:, 0]
        torch.testing.assert_close(mine, errors.min(1).values, rtol=1e-3, atol=1e-5)
        place_of = (codes[:, :1] * 8 + codes[:, 1:])[..., None].expand(-1, 1, 8)
        off[:, here] = original - candidates.gather(1, place_of)[:, 0]
    assert float(found_state.loss.sum()) < float(state.loss.sum())


def test_each_part_of_the_step_helps() -> None:
    """On held-in text: k-means without text, one pass in order, rounds; and more codebooks."""
    plain = error_of(rtn.run(layer_problem(SCHEME, 192, 256), rtn.Options()))
    once, rounds = error_of(solved(192, 256, rounds=0)), error_of(solved(192, 256, rounds=6, tolerance=0.0))
    assert rounds < 0.8 * once < 0.8 * 0.8 * plain
    three = Scheme(grid="aqlm-3x8", bits=3, group_size=8)
    more = aqlm.run(layer_problem(three, 192, 256), aqlm.Options(rounds=2))
    assert error_of(more) < 0.5 * rounds and more.notes["codebook_rounds"] == 2


def test_the_same_twice_and_other_threads() -> None:
    """On one problem the codes agree; the last bits of products may differ between numbers of threads."""
    threads = torch.get_num_threads()
    one, two = solved(40, 64), solved(40, 64)
    torch.set_num_threads(2)
    other = solved(40, 64)
    torch.set_num_threads(threads)
    assert one.quantized is not None and two.quantized is not None
    for name in ("codes", "scale"):
        assert torch.equal(getattr(one.quantized, name), getattr(two.quantized, name))
    assert torch.equal(one.quantized.extra["codebooks"], two.quantized.extra["codebooks"])
    assert error_of(other) == pytest.approx(error_of(one), rel=0.02)


@given(st.sampled_from(sorted(nasty.WEIGHTS)), st.sampled_from(sorted(nasty.INPUTS)), st.sampled_from([1, 20, 300]),
       st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_whatever_weights_and_inputs_are_like(weight: str, inputs: str, tokens: int, dtype: torch.dtype,
                                              seed: int) -> None:
    grid, matrix = found.load("grids", "aqlm-2x8"), nasty.weight(weight, 5, seed)
    if float(matrix.abs().max()) > grid.reach(SCHEME, dtype) / 16:
        return
    x = nasty.inputs(inputs, tokens, seed)
    layer = aqlm.run(Layer("x", matrix, matrix, SCHEME, dtype, nasty.statistics(x)), aqlm.Options(rounds=2))
    assert layer.quantized is not None
    dense = grid.decode(layer.quantized)
    assert dense.isfinite().all() and layer.quantized.extra["codebooks"].isfinite().all()
    if weight == "1e-30" and dtype is torch.float16:  # below the smallest scale
        assert not dense.any()
        return
    nothing = nasty.loss(matrix, torch.zeros_like(matrix), x)
    assert nasty.loss(matrix, dense, x) <= 0.2 * nothing + 1e-6
    assert quality.weight_error(matrix, matrix - dense) < float("inf")


def test_kmeans_lowers_its_own_error_and_uses_all_codewords() -> None:
    points = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(200, generator=torch.Generator().manual_seed(2)) + 0.5
    mix = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(3))
    blocks = mix @ mix.transpose(1, 2) + 0.1 * torch.eye(8)

    def error(rounds: int) -> tuple[float, int]:
        codes, books = _kmeans.start(points * scale[:, None], scale, blocks, 1, 32, rounds, 0)
        off = points * scale[:, None] - _kmeans.ops.dequantize_codebooks(codes, books, scale)
        return float((_kmeans.weighted(off, blocks) * off).double().sum()), len(codes.unique())

    assert error(10)[0] < error(2)[0] < error(1)[0] and error(10)[1] == 32
    codes, books = _kmeans.start(points[:3, :16], scale[:3], blocks[:2], 1, 32, 3, 0)  # fewer points than codewords
    exact = _kmeans.ops.dequantize_codebooks(codes, books, scale[:3])
    torch.testing.assert_close(exact, points[:3, :16], rtol=1e-5, atol=1e-6)


def test_what_tune_learns() -> None:
    layer = solved(40, 64, dtype=torch.bfloat16)
    grid, tensor = found.load("grids", "aqlm-2x8"), layer.quantized
    assert tensor is not None
    values = grid.learnable(tensor)
    assert {name: value.shape for name, value in values.items()} == {"codebooks": (2, 256, 8), "scales": (40, 1)}
    assert all(value.dtype is torch.float32 for value in values.values())
    assert torch.equal(grid.smooth(tensor, values), grid.decode(tensor))
    moved = {name: (value * 1.01 + 0.003).requires_grad_() for name, value in values.items()}
    dense = grid.smooth(tensor, moved)
    target = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    (dense * target).sum().backward()
    sums = _kmeans.ops.sum_codewords(target * moved["scales"].detach(), tensor.codes, 256)
    torch.testing.assert_close(moved["codebooks"].grad, sums, rtol=1e-4, atol=1e-5)
    assert moved["scales"].grad is not None and moved["scales"].grad.abs().min() > 0
    stored = grid.stored(tensor, moved)
    rounded = {name: value.detach().bfloat16().float() for name, value in moved.items()}
    assert torch.equal(grid.decode(stored), grid.smooth(tensor, rounded))
    assert torch.equal(stored.codes, tensor.codes) and stored.scale.dtype is torch.bfloat16
    assert torch.equal(grid.decode(tensor), grid.smooth(tensor, values)), "the tensor itself is as it was"


def test_an_indefinite_hessian_is_repaired_and_text_is_needed() -> None:
    layer = layer_problem(SCHEME, 16, 64)
    assert layer.stats is not None
    broken = layer.stats.hessian - 0.5 * torch.eye(64) * float(layer.stats.hessian.diagonal().mean())
    fixed = aqlm.run(replace(layer, stats=replace(layer.stats, hessian=broken)), aqlm.Options(rounds=1))
    assert "hessian" in fixed.repaired and fixed.quantized is not None
    assert found.load("grids", "aqlm-2x8").decode(fixed.quantized).isfinite().all()
    with pytest.raises(NumericalError, match="needs calibration"):
        aqlm.run(replace(layer, stats=None), aqlm.Options())


@pytest.mark.parametrize(("changes", "words"), [
    ({"scheme__bits": 4}, "has 2 bits a weight"), ({"scheme__group_size": 16}, "groups of 8"),
    ({"scheme__symmetric": False}, "leave --asymmetric"), ({"format": "compressed-tensors"}, "aqlm-2x8"),
    ({"format": "gptq"}, "not the aqlm-2x8 grid"), ({"format": "gguf"}, "needs a mixture"),
    ({"format": "fp8"}, "aqlm-2x8"),
    ({"steps": [{"gptq": {}}]}, "the gptq step works on single columns"),
    ({"steps": [{"aqlm": {}}, {"refine": {}}]}, "the refine step works on single columns"),
    ({"steps": [{"awq": {}}, {"aqlm": {}}]}, "the awq step works on single columns"),
    ({"scheme__grid": "affine", "scheme__group_size": 32, "format": "compressed-tensors"},
     "makes codebooks, which int2"),
    ({"rules": [{"match": "*.down_proj", "grid": "aqlm-3x8", "bits": 3}]}, "codebooks of one kind"),
])
def test_what_cannot_be_is_refused_while_planning(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match=words):
        quantize(model, tmp_path / "out", "aqlm", **{"scheme__group_size": 8, **changes})


def test_a_width_that_codewords_do_not_divide(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", intermediate_size=100)
    with pytest.raises(PlanError, match=r"does not divide the 100 input columns of .*down_proj"):
        quantize(model, tmp_path / "out", "aqlm", scheme__group_size=8)
    left = [{"match": "*.down_proj", "skip": True}]
    made = quantize(model, tmp_path / "out", "aqlm", scheme__group_size=8, rules=left, steps__aqlm__rounds=1)
    assert not any("down_proj" in layer["name"] for layer in made["layers"])
    assert all(0 <= layer["relative_error"] < 0.3 for layer in made["layers"])


def test_the_plan_counts_every_byte_and_each_linear_has_its_own_codebooks(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=1)
    made = quantize(model, tmp_path / "out", "aqlm", scheme__group_size=8, steps__aqlm__rounds=1)
    source = decode.open_model(str(tmp_path / "out"))
    assert made["totals"]["weight_bytes"] == source.weight_bytes()
    q, k = (source.read_quantized(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    assert not torch.equal(q.extra["codebooks"], k.extra["codebooks"])
    for layer in made["layers"]:
        rows, columns = layer["shape"]
        assert layer["bytes"] == rows * columns // 4 + 2 * (2 * 256 * 8 + rows) and layer["solved_together"] == 1
        assert layer["codebook_rounds"] == 1


def test_damping_is_that_of_the_other_steps() -> None:
    layer = layer_problem(SCHEME, 16, 64)
    assert layer.stats is not None
    options = aqlm.Options(damping=0.1, damping_mode="relative")
    made, strength, _ = aqlm._problem(layer, layer.target, SMALL, options, 1.0)
    assert strength == 0.1
    assert torch.equal(made.hessian, damped(layer.stats.hessian, 0.1, "relative"))
