"""Running block by block gives what transformers' own full model gives."""

from __future__ import annotations

import pytest
import torch

from qtool.errors import ModelError, NumericalError
from qtool.models import blocks, statistics, streams
from tests import tiny
from tests.models.loaded import CPU, LENGTH, SAMPLES, open_tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_blocks_give_the_logits_of_the_full_model(checkpoint, ids, family):
    loaded = checkpoint(family)
    batches, _ = streams.batches_for(SAMPLES, LENGTH, 2 * LENGTH, 0.0)
    store, arguments = loaded.captured(ids, batches)
    for index, name in enumerate(loaded.skeleton.blocks):
        statistics.propagate(loaded.block(index), name, arguments, index, store, batches, CPU, torch.float32)
    model = loaded.full_model()
    with torch.no_grad():
        expected = model.model(ids, use_cache=False).last_hidden_state
        hidden = model.model.norm(store.read(slice(0, SAMPLES)))
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.lm_head(hidden), model.lm_head(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "phi"])
def test_parallel_attention_and_alibi(tmp_path, ids, family):
    """Blocks that get positional arguments, and blocks whose attention and MLP run side by side."""
    sizes = {"bloom": {"n_head": 4, "n_layer": 2}, "phi": {}}
    tiny.FAMILIES[family] = sizes[family]
    try:
        loaded = open_tiny(tiny.make(tmp_path, family))
    finally:
        del tiny.FAMILIES[family]
    batches = [slice(0, SAMPLES)]
    store, arguments = loaded.captured(ids, batches)
    outputs = {}
    model = loaded.full_model()
    model.get_submodule(loaded.skeleton.blocks[-1]).register_forward_hook(
        lambda _module, _inputs, output: outputs.update(last=output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        model(ids, use_cache=False)
    for index, name in enumerate(loaded.skeleton.blocks):
        statistics.propagate(loaded.block(index), name, arguments, index, store, batches, CPU, torch.float32)
    torch.testing.assert_close(store.read(slice(0, SAMPLES)), outputs["last"], rtol=1e-5, atol=1e-5)


def test_only_the_embeddings_are_read_to_capture(checkpoint, ids):
    loaded, asked = checkpoint("llama"), []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return loaded.weights[name]

    blocks.capture(loaded.skeleton, read, ids, loaded.store(), CPU, torch.float32, [slice(0, SAMPLES)])
    assert sorted(asked) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert all(parameter.is_meta for parameter in loaded.skeleton.model.parameters())


def test_load_block_reads_each_tensor_once_and_leaves_the_skeleton(checkpoint):
    loaded, asked = checkpoint("mixtral"), []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return loaded.weights[name]

    block = blocks.load_block(loaded.skeleton, 1, read, CPU, torch.float32)
    assert sorted(asked) == sorted(map(loaded.skeleton.source, loaded.skeleton.block_parameters(1)))
    assert not any(tensor.is_meta for tensor in [*block.parameters(), *block.buffers()])
    assert all(parameter.dtype == torch.float32 for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in loaded.skeleton.model.parameters())


def test_one_set_of_arguments_per_batch_size(checkpoint, ids):
    loaded = checkpoint("gemma3")
    batches = [slice(0, 2), slice(2, 4), slice(4, 5)]
    _, arguments = loaded.captured(ids, batches)
    (_, sliding), (_, full) = arguments.for_block(0, 2), arguments.for_block(2, 2)
    assert sliding["attention_mask"] is arguments.for_block(1, 2)[1]["attention_mask"]
    assert sliding["position_embeddings"] is not full["position_embeddings"]
    assert {size for _, size in arguments._recorded} == {1, 2}


def test_arguments_that_depend_on_the_text_are_refused():
    arguments = blocks.BlockArguments()
    arguments.record("layers.0", 0, 2, (), {"mask": torch.ones(2), "flag": None})
    arguments.record("layers.0", 0, 2, (), {"mask": torch.ones(2), "flag": None})
    with pytest.raises(ModelError, match=r"layers\.0 receives arguments that depend on the text"):
        arguments.record("layers.0", 0, 2, (), {"mask": torch.zeros(2), "flag": None})


def test_stored_type_is_rounded_between_blocks(checkpoint, ids):
    loaded = checkpoint("llama")
    store = streams.StreamStore(SAMPLES, LENGTH, 64, torch.bfloat16, 1 << 30)
    batches = [slice(0, SAMPLES)]
    arguments = blocks.capture(loaded.skeleton, loaded.read, ids, store, CPU, torch.float32, batches)
    torch.testing.assert_close(store.read(slice(0, 1)), loaded.weights["model.embed_tokens.weight"][ids[:1]])
    statistics.propagate(loaded.block(0), "block", arguments, 0, store, batches, CPU, torch.float32)
    assert store.read(slice(0, 1)).dtype == torch.bfloat16


def test_non_finite_output_names_the_block(checkpoint, ids):
    loaded = checkpoint("llama")
    store, arguments = loaded.captured(ids, [slice(0, SAMPLES)])
    block = loaded.block(1)
    with torch.no_grad():
        block.get_submodule("mlp.down_proj").weight[3, 4] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.layers\.1: its output is not finite on .* samples 0\.\.4"):
        statistics.propagate(block, "model.layers.1", arguments, 1, store, [slice(0, SAMPLES)], CPU, torch.float32)


def test_models_that_pass_more_than_hidden_states_are_refused(tmp_path, ids):
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "laurel_rank": 8,
             "num_kv_shared_layers": 0, "activation_sparsity_pattern": None, "num_hidden_layers": 2}
    tiny.FAMILIES["gemma3n_text"] = sizes
    try:
        loaded = open_tiny(tiny.make(tmp_path, "gemma3n_text"))
    finally:
        del tiny.FAMILIES["gemma3n_text"]
    with pytest.raises(ModelError, match=r"hidden states \[4, 5, 24, 64\], not \[samples, tokens, hidden\]"):
        loaded.captured(ids, [slice(0, SAMPLES)])


def test_compute_type():
    assert blocks.choose_compute_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    assert blocks.choose_compute_dtype(CPU, torch.float32) == torch.float32
    assert blocks.choose_compute_dtype(CPU, torch.float16) == torch.float32
    assert blocks.choose_compute_dtype(CPU, torch.bfloat16) in (torch.bfloat16, torch.float32)
