"""Channel scales folded into what feeds them leave every architecture's block as it was; what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

from qtool.models import folds, statistics
from tests import tiny
from tests.models.loaded import CPU

BATCHES = [slice(0, 2), slice(2, 4), slice(4, 5)]
PREFIX = "model.layers.0"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
# family -> consumers of the folds that there are
EXPECTED = {
    "llama": {ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",)},
    "qwen2": {ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",)},
    "qwen3": {ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",)},
    "gemma2": {ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",)},
    "gemma3": {ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",)},
    "olmo2": {("self_attn.o_proj",), ("mlp.down_proj",)},  # no norm before attention or MLP
}


class Run:
    def __init__(self, loaded, ids, dtype=torch.float32) -> None:
        self.block, self.dtype = loaded.block(0, dtype), dtype
        self.names = list(loaded.skeleton.block_linears(0))
        self.store, self.arguments = loaded.captured(ids, BATCHES, dtype)
        self.surveys = folds.survey(self.block, PREFIX, self.names, self.arguments, 0, self.store, BATCHES, CPU, dtype,
                                    40, 1.5)
        self.folds, self.sure = folds.find_folds(self.block, self.surveys, self)

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        return statistics.run_block(self.block, self.arguments, 0, self.store, BATCHES[0], CPU, self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", sorted(EXPECTED))
def test_what_can_be_folded(checkpoint, ids, family, dtype):
    """Whatever the blocks compute in: some machines have units for bfloat16, and models come in float16."""
    run = Run(checkpoint(family), ids, dtype)
    assert {fold.consumers for fold in run.folds} == EXPECTED[family]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_block_computes_what_it_did(checkpoint, ids, family):
    """Also with norms rounded to bfloat16: the linears follow what the norm became."""
    run = Run(checkpoint(family), ids)
    before, weights = run(), {path: one.detach().clone() for path, one in run.block.named_parameters()}
    for fold in run.folds:
        columns = run.block.get_submodule(fold.consumers[0]).in_features
        scale = folds.tied(fold, torch.rand(columns) * 4 + 0.2)
        weights |= folds.apply(run.block, fold, scale, weights.__getitem__, torch.bfloat16)[0]
    torch.testing.assert_close(run(), before, rtol=1e-3, atol=1e-3 * float(before.std()))
    norms = [fold.source for fold in run.folds if not fold.linear]
    assert all(weights[f"{path}.weight"].dtype is torch.bfloat16 for path in norms)


def test_a_survey(checkpoint, ids):
    loaded = checkpoint("llama")
    run = Run(loaded, ids)
    found = run.surveys[ATTENTION]
    with torch.no_grad():
        x = loaded.block(0).get_submodule("input_layernorm")(run.store.read(slice(0, 5))).flatten(0, 1)
    torch.testing.assert_close(found.mean, x.abs().mean(0))
    torch.testing.assert_close(found.largest, x.abs().amax(0))
    assert torch.equal(found.outliers, (x.half().abs() >= 1.5).double().mean(0)) and 0 < found.outliers.max() < 1
    assert found.sample.shape == (40, x.shape[1])
    assert all(bool((row == x).all(1).any()) for row in found.sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_fold_where_something_else_reads_the_norm(checkpoint, ids, family, dtype):
    """A linear that keeps its weight would receive other inputs."""
    run = Run(checkpoint(family), ids, dtype)
    groups = [ATTENTION[:2], MLP]
    assert [fold.consumers for fold in folds.find_folds(run.block, groups, run)[0]] == [MLP]
