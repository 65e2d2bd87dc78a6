"""The learned levels: Lloyd's conditions, weights that count for more, and the layout that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import qtool
from qtool import decode, formats, independent
from qtool.errors import CheckpointError, PlanError
from qtool.grids import affine, lloyd4, nf4
from qtool.methods import gptq, refine, rtn
from qtool.recipe import Scheme
from tests import nasty, tiny
from tests.formats.cases import NAME
from tests.runtime.conftest import decoded, ids
from tests.test_methods import loss, problem
from tests.test_pipeline import quantize

SCHEME = Scheme(grid="lloyd4", bits=4, group_size=-1)


def error(weight: torch.Tensor, dense: torch.Tensor, importance: torch.Tensor | float = 1.0) -> float:
    off, whole = (weight - dense).double().square(), weight.double().square()
    return float((importance * off).sum() / (importance * whole).sum())


def rounded(weight: torch.Tensor, importance: torch.Tensor | None = None, scheme: Scheme = SCHEME,
            dtype: torch.dtype = torch.float32) -> Any:
    return lloyd4.encode(weight, lloyd4.fit(weight, scheme, dtype, importance, 24, True, 2))


def test_lloyds_two_conditions() -> None:
    """A level is the mean of its cell, a cell ends halfway between levels; no worse than scipy-free plain Lloyd."""
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(64, 512, generator=generator), torch.rand(512, generator=generator) + 0.1
    scale = weight.abs().amax(1, keepdim=True)
    levels = lloyd4.learned(weight, scale, importance, 512)
    ratio, mass = (weight / scale).double(), (importance * scale.square()).double()
    chosen = torch.bucketize(ratio, ((levels[1:] + levels[:-1]) / 2).double())
    for index in range(16):
        mine = chosen == index
        mean = (ratio * mass)[mine].sum() / mass[mine].sum()
        assert float(levels[index]) == pytest.approx(float(mean), abs=2e-3)
    plain = torch.linspace(-1, 1, 16).double()
    for _ in range(300):
        cell = torch.bucketize(ratio, (plain[1:] + plain[:-1]) / 2)
        sums = torch.zeros(16, dtype=torch.float64).index_add_(0, cell.flatten(), (ratio * mass).flatten())
        heavy = torch.zeros(16, dtype=torch.float64).index_add_(0, cell.flatten(), mass.flatten())
        plain = torch.where(heavy > 0, sums / heavy, plain)
    def off(table: torch.Tensor) -> float:
        near = table.double()[torch.bucketize(ratio, (table.double()[1:] + table.double()[:-1]) / 2)]
        return float((mass * (ratio - near).square()).sum())
    assert off(levels) <= 1.01 * off(plain)


@pytest.mark.parametrize("seed", range(3))
def test_less_error_than_nf4_and_integers_in_the_same_groups(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(128, 512, generator=generator) * torch.exp(0.3 * torch.randn(128, 1, generator=generator))
    for group in (64, 512):
        mine = lloyd4.decode(rounded(weight, scheme=SCHEME.model_copy(update={"group_size": group})))
        others = [(nf4, Scheme(grid="nf4", group_size=group)), (affine, Scheme(group_size=group))]
        for grid, scheme in others:
            fitted = grid.fit(weight, scheme, torch.float32, None, 24, True, 2)
            assert error(weight, mine) < 0.98 * error(weight, grid.decode(grid.encode(weight, fitted)))


def test_what_counts_for_more_is_nearer() -> None:
    """Columns of other sizes: the levels move to those that count."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[:, ::4] *= 0.1
    importance = torch.ones(256)
    importance[::4] = 1000.0
    plain, weighted = lloyd4.decode(rounded(weight)), lloyd4.decode(rounded(weight, importance))
    assert error(weight, weighted, importance) < 0.5 * error(weight, plain, importance)


@given(st.sampled_from(sorted(nasty.WEIGHTS)), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
       st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_weight_is_finite(kind: str, dtype: torch.dtype, rows: int, seed: int) -> None:
    weight = nasty.weight(kind, max(rows, 2), seed)
    if float(weight.abs().max()) > min(lloyd4.reach(SCHEME, dtype), 2.0**124):
        return
    tensor = rounded(weight, dtype=dtype)
    levels = tensor.extra["levels"]
    assert levels.dtype is dtype and levels.isfinite().all() and (levels.float().diff() >= 0).all()
    dense = lloyd4.decode(tensor)
    assert dense.isfinite().all() and int(tensor.codes.max()) < 16
    if kind in ("normal", "zero row", "zero group"):
        assert error(weight, dense) < 0.05
    again = rounded(weight, dtype=dtype)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.extra["levels"], levels)


def test_what_tune_learns() -> None:
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    tensor = rounded(weight, scheme=SCHEME.model_copy(update={"group_size": 32}), dtype=torch.bfloat16)
    values = lloyd4.learnable(tensor)
    assert values["levels"].shape == (16,) and values["scales"].shape == (20, 2)
    assert torch.equal(lloyd4.smooth(tensor, values), lloyd4.decode(tensor))
    moved = {name: value.clone().requires_grad_() for name, value in values.items()}
    lloyd4.smooth(tensor, moved).sum().backward()
    wide = values["scales"].repeat_interleave(32, 1)
    sums = torch.stack([wide[tensor.codes == code].sum() for code in range(16)])
    torch.testing.assert_close(moved["levels"].grad, sums, rtol=1e-4, atol=1e-4)
    values["levels"][[3, 4]] = values["levels"][[4, 3]]  # changed places
    stored = lloyd4.stored(tensor, values)
    assert (stored.extra["levels"].float().diff() >= 0).all() and stored.scale.dtype is torch.bfloat16
    assert torch.equal(lloyd4.decode(stored), lloyd4.smooth(tensor, values))


def test_the_solvers_run_on_it() -> None:
    layer = problem(SCHEME)
    nearest = rtn.run(layer, rtn.Options())
    solved = gptq.run(layer, gptq.Options())
    better = refine.run(solved, refine.Options())
    assert loss(better, lloyd4) <= loss(solved, lloyd4) < 0.7 * loss(nearest, lloyd4)


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
       st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_pairs_in_aqlms_layout(rows: int, pairs: int, dtype: torch.dtype, seed: int) -> None:
    form, shape = formats.load("aqlm"), (rows, 2 * pairs)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tensor = rounded(weight, dtype=dtype)
    packed, specs = form.pack(NAME, tensor, dtype), form.layout(NAME, shape, SCHEME, dtype)
    assert {one.name: (one.dtype, one.shape) for one in specs} == {
        key: (value.dtype, tuple(value.shape)) for key, value in packed.items()}
    again = form.unpack(NAME, packed.__getitem__, SCHEME, shape)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.extra["levels"], tensor.extra["levels"])
    assert torch.equal(lloyd4.decode(again), lloyd4.decode(tensor))
    assert torch.equal(form.dequantize(NAME, packed.__getitem__, SCHEME, shape), lloyd4.decode(tensor))
    config = {"quantization_config": form.config({NAME: SCHEME}, [])}
    assert form.schemes(config, {one.name: one for one in specs}) == {NAME: (SCHEME, shape)}
    assert form.obstacle(NAME, packed.__getitem__, SCHEME, shape) is None


def test_other_pairs_are_read_as_dense_weights(tmp_path: Path) -> None:
    form = formats.load("aqlm")
    packed = form.pack(NAME, rounded(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))), torch.float32)
    books = packed[f"{NAME}.codebooks"] = packed[f"{NAME}.codebooks"].clone()
    books[0, 200, 0, 1] += 1
    assert "pairs of 16 levels" in form.obstacle(NAME, packed.__getitem__, SCHEME, (6, 8))
    with pytest.raises(CheckpointError, match=r"pairs of 16 levels.*--to hf"):
        form.unpack(NAME, packed.__getitem__, SCHEME, (6, 8))
    codes = packed[f"{NAME}.codes"][..., 0].long() % 256
    wanted = (books[0, :, 0][codes] * packed[f"{NAME}.scales"][:, 0]).reshape(6, 8)
    assert torch.equal(form.dequantize(NAME, packed.__getitem__, SCHEME, (6, 8)), wanted)
    save_file(packed, tmp_path / "model.safetensors")
    reader = independent.linears(tmp_path, form.config({NAME: SCHEME}, []), "aqlm")[NAME]
    assert not isinstance(reader, str) and np.array_equal(reader(), wanted.numpy())


def test_a_whole_run_and_running_it_packed(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", hidden_size=128)
    made = quantize(model, tmp_path / "out", "lloyd4", scheme__group_size=-1)
    assert all(0 < layer["relative_error"] < 0.05 for layer in made["layers"])
    rows, columns = made["layers"][0]["shape"]
    assert made["layers"][0]["bytes"] == rows * columns // 2 + 2 * 256 * 2 + 2 * rows
    assert {one.label for one in decode.open_model(str(tmp_path / "out")).schemes.values()} == {"lloyd4-channel"}
    running, expected = qtool.load(str(tmp_path / "out"), device="cpu"), decoded(tmp_path / "out")
    assert set(running.running.packed.values()) == {"lloyd4-channel"}
    with torch.inference_mode():
        torch.testing.assert_close(running(ids(2, 7)).logits, expected(ids(2, 7)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("changes", "words"), [
    ({"scheme__group_size": 32}, "take group_size -1"), ({"scheme__bits": 3}, "has 4 bits, not 3"),
    ({"format": "bitsandbytes"}, "not the lloyd4-channel"), ({"format": "compressed-tensors"}, "--format aqlm"),
])
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match=words):
        quantize(model, tmp_path / "out", "lloyd4", **{"scheme__group_size": -1, **changes})
