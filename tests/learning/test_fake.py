"""Fake quantization: forward what the format stores, backward what is written in fake.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import found
from qtool.learning import fake, weights
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor

SCHEMES = [Scheme(bits=bits, group_size=16, symmetric=symmetric)
           for bits in (2, 3, 4, 8) for symmetric in (True, False)]
SCHEMES += [Scheme(grid="fp8", bits=8, group_size=-1), Scheme(grid="nf4", bits=4, group_size=64)]


def made(scheme: Scheme, seed: int = 0, rows: int = 5, columns: int = 64) -> tuple[torch.Tensor, QuantizedTensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    grid = found.load("grids", scheme.grid)
    return weight, grid.encode(weight, grid.fit(weight, scheme, torch.float16, None, 8, True, 1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda one: one.label)
def test_frozen_codes_decode_to_what_is_stored_and_are_linear_in_the_scale(scheme: Scheme) -> None:
    _, tensor = made(scheme)
    grid = found.load("grids", tensor.grid)
    values = {what: value * 1.01 for what, value in fake.learnable(tensor).items()}
    assert set(values) == ({"scale"} if grid.FREE_SCALES else set())
    for value in values.values():
        value.requires_grad_()
    dense = fake.dense(tensor, values)
    assert torch.equal(dense, grid.decode(fake.stored(tensor, values)))
    if values:
        slope = torch.randn_like(dense)
        dense.backward(slope)
        steps = grid.decode(replace(tensor, scale=torch.ones_like(tensor.scale)))
        expected = (slope * steps).view(*tensor.scale.shape, -1).sum(-1)
        torch.testing.assert_close(values["scale"].grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda one: one.label)
def test_a_latent_weight_is_rounded_to_the_codes_that_it_came_from(scheme: Scheme) -> None:
    weight, tensor = made(scheme)
    grid = found.load("grids", tensor.grid)
    levels = fake.grid_levels(tensor, grid).shape[-1]
    other = torch.randint(0, levels, tensor.codes.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    for codes in (tensor.codes, other):  # also codes far from the weight
        there = replace(tensor, codes=codes)
        latent = fake.latent(weight, there, grid)
        again = fake.encoded(tensor.scale.float(), latent, there, grid)
        assert torch.equal(grid.decode(again), grid.decode(there))


def test_a_latent_weight_stays_where_it_is_when_it_has_its_code_already() -> None:
    weight, tensor = made(SCHEMES[4])
    grid = found.load("grids", "affine")
    latent = fake.latent(weight, tensor, grid, margin=0.0)
    inside = (grid.decode(tensor) - weight).abs() <= tensor.scale.float().abs().repeat_interleave(16, 1) * 0.499
    torch.testing.assert_close(latent[inside], weight[inside])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_slopes_of_a_rounding_are_those_of_lsq(bits: int) -> None:
    weight, tensor = made(Scheme(bits=bits, group_size=16))
    grid = found.load("grids", "affine")
    latent = (weight * 1.7).requires_grad_()  # some lie outside of the grid
    scale = tensor.scale.float().requires_grad_()
    dense = fake.Rounded.apply(scale, latent, tensor, grid)
    assert torch.equal(dense, grid.decode(grid.encode(latent.detach(), tensor)))
    slope = torch.randn_like(dense)
    dense.backward(slope)
    wide = tensor.scale.float().repeat_interleave(16, 1)
    quotient, levels = latent.detach() / wide, dense.detach() / wide
    half = 2 ** (bits - 1)
    inside = (quotient >= -half - 0.5) & (quotient <= half - 0.5)
    assert 0 < int((~inside).sum()) < inside.numel()
    assert torch.equal(latent.grad, slope * inside)
    expected = (slope * (levels - torch.where(inside, quotient, 0.0))).view(5, -1, 16).sum(-1)
    torch.testing.assert_close(scale.grad, expected / (16 * (half - 0.5)) ** 0.5, rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans(), learned=st.booleans())
def test_what_is_stored_decodes_to_what_was_learned_with(seed: int, bits: int, symmetric: bool, learned: bool) -> None:
    weight, tensor = made(Scheme(bits=bits, group_size=16, symmetric=symmetric), seed)
    gain = torch.randn(7, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    begin = weights.start({"w": tensor}, {"g": gain}, {"w": weight} if learned else None)
    moves = weights.moves(begin)
    assert set(moves) == {"g", "w|scale", *(["w|latent"] if learned else [])}
    at_start, gains = weights.answer(begin, moves)
    assert torch.equal(at_start["w"].codes, tensor.codes) and torch.equal(at_start["w"].scale, tensor.scale)
    assert torch.equal(gains["g"], gain)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for move in moves.values():
            move.add_(torch.randn(move.shape, generator=generator) * 0.3)
    tensors, gains = weights.answer(begin, moves)
    parameters = weights.parameters(begin, moves)
    assert torch.equal(found.load("grids", "affine").decode(tensors["w"]), parameters["w"])
    assert torch.equal(gains["g"].float(), parameters["g"]) and gains["g"].dtype is torch.bfloat16
    assert torch.equal(tensors["w"].codes, tensor.codes) != learned
    assert bool((tensors["w"].scale.sign() == tensor.scale.sign()).all())


def test_rounding_to_a_type_has_the_slope_of_the_identity() -> None:
    value = torch.randn(20, requires_grad=True)
    rounded = fake.rounded(value, torch.bfloat16)
    assert torch.equal(rounded, value.to(torch.bfloat16).float()) and not torch.equal(rounded, value)
    rounded.sum().backward()
    assert torch.equal(value.grad, torch.ones(20))
