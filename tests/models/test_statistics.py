"""Hessians against direct computation on the full model; who shares what; experts; refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from qtool.errors import CalibrationError, NumericalError
from qtool.models import blocks, statistics
from tests import tiny
from tests.models.loaded import CPU, LENGTH, SAMPLES

BATCHES = [slice(0, 2), slice(2, 4), slice(4, 5)]
HELD_OUT = frozenset({4})


def collect(loaded, ids, index, block=None, float_store=None, change=None, only=None, residual=None):
    """Propagate unquantized up to block `index` and collect there, with float_store beside the same in it."""
    store, arguments = loaded.captured(ids, BATCHES)
    if float_store is not None:
        float_store.copy_from(store, BATCHES)
    for before in range(index):
        name = loaded.skeleton.blocks[before]
        for stream in (store, *([float_store] if float_store else [])):
            statistics.propagate(loaded.block(before), name, arguments, before, stream, BATCHES, CPU, torch.float32)
    if change is not None:
        store.write(slice(0, SAMPLES), change(store.read(slice(0, SAMPLES)).clone()))
    block, prefix = block or loaded.block(index), loaded.skeleton.blocks[index]
    names = list(loaded.skeleton.block_linears(index))
    original = copy.deepcopy(block)

    def floats(batch, wanted):
        if only is not None and batch not in (only, BATCHES[-1]):  # the last is held out
            return None
        return statistics.received(original, prefix, wanted, arguments, index, float_store, batch, CPU, torch.float32,
                                   residual)

    return statistics.collect(block, prefix, names, arguments, index, store, BATCHES, HELD_OUT, CPU, torch.float32,
                              floats if float_store else None, residual)


def inputs_in_the_full_model(loaded, ids, names) -> dict[str, torch.Tensor]:
    """Linear -> its input [S, T, K] in transformers' own model."""
    model, found = loaded.full_model(), {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: found.update({name: inputs[0].detach()}))
    with torch.no_grad():
        model(ids, use_cache=False)
    return found


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in ("qwen3_moe", "mixtral")])
def test_hessian_equals_the_direct_one(checkpoint, ids, family):
    loaded = checkpoint(family)
    stats = collect(loaded, ids, 1)
    inputs = inputs_in_the_full_model(loaded, ids, [name for names in stats for name in names])
    assert sorted(inputs) == sorted(loaded.skeleton.block_linears(1))
    for names, found in stats.items():
        for name in names:
            x = inputs[name]
            fit, held = x[:4].flatten(0, 1).double(), x[4:].flatten(0, 1).double()
            torch.testing.assert_close(found.hessian.double(), fit.T @ fit / len(fit), rtol=1e-4, atol=1e-5)
            weight = torch.randn(3, held.shape[1])
            assert found.held_out.energy(weight) == pytest.approx(
                float((held @ weight.double().T).square().sum()) / len(held), rel=1e-4)
        assert (found.tokens, found.held_out.tokens, found.pooled) == (4 * LENGTH, LENGTH, False)
        assert torch.equal(found.hessian, found.hessian.T) and found.cross is None
        assert not found.hessian.is_inference()


def test_shared_inputs(checkpoint, ids):
    prefix = "model.layers.0."
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    for family in ("llama", "gemma2", "qwen3"):
        groups = collect(checkpoint(family), ids, 0)
        assert [tuple(name.removeprefix(prefix) for name in names) for names in groups] == [
            attention, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert all(len(names) == 1 for names in collect(checkpoint("phi3"), ids, 0))


def test_the_last_product_is_not_computed(checkpoint, ids):
    loaded = checkpoint("llama")
    block, ran = loaded.block(0), []
    for name in ("mlp.up_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    collect(loaded, ids, 0, block)
    assert ran == ["mlp.up_proj"] * len(BATCHES)
    assert not block.get_submodule("mlp.down_proj")._forward_pre_hooks


def test_two_streams(checkpoint, ids):
    """cross = mean of (x~ - x) xᵀ."""
    loaded = checkpoint("llama")
    float_store = loaded.store()
    stats = collect(loaded, ids, 1, float_store=float_store, change=lambda hidden: hidden * 0.9 + 0.01)
    before = float_store.read(slice(0, SAMPLES))
    norm = loaded.block(1).get_submodule("input_layernorm")
    with torch.no_grad():
        clean, x = norm(before), norm(before * 0.9 + 0.01)
    found = next(found for names, found in stats.items() if names[0].endswith("q_proj"))
    rows, difference = x[:4].flatten(0, 1), (clean - x)[:4].flatten(0, 1)
    torch.testing.assert_close(found.cross, difference.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    rows, difference = x[4], (clean - x)[4]
    weight, change = torch.randn(2, 3, rows.shape[1])
    pull = float(((rows @ change.T) * (difference @ weight.T)).sum()) / len(rows)
    assert found.held_out.pull(change, weight) == pytest.approx(pull, rel=1e-3, abs=1e-6)


def test_equal_streams_have_no_cross_term(checkpoint, ids):
    """Also where a linear receives the stream itself, as in OLMo 2, whose blocks begin without a norm."""
    for family in ("llama", "olmo2"):
        loaded = checkpoint(family)
        for found in collect(loaded, ids, 1, float_store=loaded.store()).values():
            weight = torch.eye(len(found.cross))
            assert not found.cross.any() and found.held_out.paired and found.held_out.pull(weight, weight) == 0


def test_the_unquantized_model_beside_some_of_the_samples(checkpoint, ids):
    """cross and residual are over those alone, and paired is H over the same tokens; the Hessian itself is over all."""
    loaded = checkpoint("llama")
    full, float_store = collect(loaded, ids, 1), loaded.store()
    some = collect(loaded, ids, 1, float_store=float_store, change=lambda hidden: hidden * 0.9, only=BATCHES[0],
                   residual="input_layernorm")
    every = collect(loaded, ids, 1, float_store=loaded.store(), change=lambda hidden: hidden * 0.9)
    for names, found in some.items():
        torch.testing.assert_close(found.hessian, every[names].hessian, rtol=1e-4, atol=1e-5)
        assert every[names].paired is None and full[names].cross is None
        assert (found.tokens, found.held_out.tokens) == (4 * LENGTH, LENGTH)
        change, weight = torch.randn(2, 3, len(found.hessian))
        pull = every[names].held_out.pull(change, weight)
        assert found.held_out.pull(change, weight) == pytest.approx(pull, rel=1e-3, abs=1e-6)
    norm = loaded.block(1).get_submodule("input_layernorm")
    before = float_store.read(BATCHES[0])
    with torch.no_grad():
        clean, x = (norm(hidden).flatten(0, 1) for hidden in (before, before * 0.9))
    found = next(found for names, found in some.items() if names[0].endswith("q_proj"))
    torch.testing.assert_close(found.paired, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross, (clean - x).T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.residual, (before * 0.1).flatten(0, 1).T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_nothing_held_out(checkpoint, ids):
    loaded = checkpoint("llama")
    store, arguments = loaded.captured(ids, BATCHES)
    stats = statistics.collect(loaded.block(0), "model.layers.0", list(loaded.skeleton.block_linears(0)), arguments, 0,
                               store, BATCHES, (), CPU, torch.float32)
    for found in stats.values():
        assert found.held_out.energy(torch.eye(len(found.hessian))) == 0
        assert (found.tokens, found.held_out.tokens) == (SAMPLES * LENGTH, 0)


def test_some_linears_only(checkpoint, ids):
    loaded = checkpoint("llama")
    store, arguments = loaded.captured(ids, BATCHES)
    wanted = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"]
    stats = statistics.collect(loaded.block(0), "model.layers.0", wanted, arguments, 0, store, BATCHES, HELD_OUT, CPU,
                               torch.float32)
    assert list(stats) == [(name,) for name in wanted]
    assert statistics.collect(loaded.block(0), "model.layers.0", [], arguments, 0, store, BATCHES, HELD_OUT, CPU,
                              torch.float32) == {}


def test_a_batch_is_of_one_kind(checkpoint, ids):
    loaded = checkpoint("llama")
    store, arguments = loaded.captured(ids, BATCHES)
    with pytest.raises(ValueError, match=r"0\.\.1 mixes"):
        statistics.collect(loaded.block(0), "model.layers.0", list(loaded.skeleton.block_linears(0)), arguments, 0,
                           store, BATCHES, {1}, CPU, torch.float32)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_see_their_own_tokens(checkpoint, ids, family):
    loaded = checkpoint(family)
    stats = collect(loaded, ids, 1)
    names = [name for group in stats for name in group]
    assert sorted(names) == sorted(loaded.skeleton.block_linears(1))
    experts = {group: found for group, found in stats.items() if ".experts." in group[0]}
    first = [found for group, found in experts.items() if len(group) == 2]
    assert sum(found.tokens for found in first) == 4 * LENGTH * 2  # two experts per token
    pooled = {id(found.held_out): found.held_out.tokens for found in first if found.pooled}
    assert set(pooled.values()) <= {LENGTH * 2}  # one for all of them, of what all experts received
    whole = sum(found.hessian * found.tokens for found in first if not found.pooled)
    for found in experts.values():
        assert found.pooled == (found.tokens < 32)
        assert found.hessian.isfinite().all() and found.held_out.finite() and found.cross is None
    pooled = [found for found in first if found.pooled]
    if pooled:
        assert all(found.hessian is pooled[0].hessian for found in pooled)
        rest = pooled[0].hessian * 4 * LENGTH * 2 - whole
        assert torch.linalg.eigvalsh(rest.double()).min() > -1e-2


def test_an_expert_without_tokens_is_pooled(checkpoint, ids):
    loaded = checkpoint("qwen3_moe")
    block = loaded.block(0)
    with torch.no_grad():
        block.get_submodule("mlp.gate").weight[3] = 0  # its score is 0: others are chosen as long as two are positive
        block.get_submodule("mlp.gate").weight[:3] = block.get_submodule("mlp.gate").weight[0]
    block.get_submodule("mlp.gate").register_forward_hook(
        lambda _module, _inputs, output: (output[0], output[1], torch.where(output[2] == 3, 0, output[2])))
    stats = collect(loaded, ids, 0, block, float_store=loaded.store())
    prefix = "model.layers.0.mlp.experts."
    found = stats[(f"{prefix}3.gate_proj", f"{prefix}3.up_proj")]
    assert (found.tokens, found.held_out.tokens, found.pooled) == (0, LENGTH * 2, True)
    routed = [value for group, value in stats.items() if ".experts." in group[0] and len(group) == 2]
    assert sum(value.tokens for value in routed) == 4 * LENGTH * 2
    enough = next(value for value in routed if not value.pooled)
    assert found.hessian.shape == enough.hessian.shape and found.hessian.diagonal().min() > 0
    assert stats[(f"{prefix}3.down_proj",)].hessian.shape == (32, 32)


def test_experts_no_token_reaches(checkpoint, ids):
    loaded = checkpoint("qwen3_moe")
    block = loaded.block(0)
    block.get_submodule("mlp.gate").register_forward_hook(
        lambda _module, _inputs, output: (output[0], output[1], torch.full_like(output[2], 8)))
    with pytest.raises(CalibrationError, match=r"experts\.0\.gate_proj: no calibration token reached any expert"):
        collect(loaded, ids, 0, block)


def test_a_linear_that_is_never_called(checkpoint, ids):
    loaded = checkpoint("llama")
    store, arguments = loaded.captured(ids, BATCHES)
    block = loaded.block(0)
    block.add_module("spare", torch.nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match=r"layers\.0\.spare: no calibration token reached .* skip: true"):
        statistics.collect(block, "model.layers.0", [*loaded.skeleton.block_linears(0), "model.layers.0.spare"],
                           arguments, 0, store, BATCHES, HELD_OUT, CPU, torch.float32)


def test_non_finite_inputs_name_the_linear(checkpoint, ids):
    loaded = checkpoint("llama")
    block = loaded.block(0)
    with torch.no_grad():
        block.get_submodule("self_attn.v_proj").weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.o_proj: .* not finite"):
        collect(loaded, ids, 0, block)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_gpu_agrees_with_the_cpu(checkpoint, ids, family, dtype):
    loaded, gpu = checkpoint(family), torch.device("cuda")
    expected = collect(loaded, ids, 0)
    store = loaded.store()
    arguments = blocks.capture(loaded.skeleton, loaded.read, ids, store, gpu, dtype, BATCHES)
    block = blocks.load_block(loaded.skeleton, 0, loaded.read, gpu, dtype)
    found = statistics.collect(block, "model.layers.0", list(loaded.skeleton.block_linears(0)), arguments, 0, store,
                               BATCHES, HELD_OUT, gpu, dtype)
    assert list(found) == list(expected)
    for names, stats in found.items():
        assert stats.hessian.dtype == torch.float32 and stats.hessian.is_cuda
        if dtype == torch.float32:
            torch.testing.assert_close(stats.hessian.cpu(), expected[names].hessian, rtol=1e-3, atol=1e-3)
    statistics.propagate(block, "model.layers.0", arguments, 0, store, BATCHES, gpu, dtype)
    assert store.read(slice(0, SAMPLES)).isfinite().all()
