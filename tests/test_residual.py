"""The step asymmetric follows what outputs are added to: the stream between blocks comes nearer to the original's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool import decode, recipe
from qtool.models import calibration, skeleton
from qtool.models.whole import load_model
from tests import tiny
from tests.test_pipeline import quantize


@torch.inference_mode()
def between_blocks(model: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states [S, T, hidden] after each block."""
    source = decode.open_model(str(model))
    made = skeleton.build(source.directory, source.config, source.specs)
    loaded = load_model(made, source.read, torch.device("cpu"), torch.float32, source.schemes, source.read_quantized,
                        source.cache_scales())
    return list(loaded(ids, use_cache=False, output_hidden_states=True).hidden_states[1:-1])


def distance(model: Path, out: Path, ids: torch.Tensor) -> float:
    pairs = zip(between_blocks(model, ids), between_blocks(out, ids), strict=True)
    return sum(float((one - other).square().mean()) for one, other in pairs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_later_blocks_make_up_for_a_coarse_one(family: str, tmp_path: Path) -> None:
    """2 bits in the first block, 8 in the others. In Gemma norms come before outputs are added, so nothing changes."""
    model = tiny.make(tmp_path / "model", family)
    text = recipe.Calibration(source="builtin", sequence_length=32)
    ids = calibration.load_tokens(text, model, 64, 1 << 30).ids
    off = {}
    for follow in (True, False):
        out = tmp_path / f"out-{follow}"
        quantize(model, out, steps=[{"asymmetric": {"residual": follow}}, {"gptq": {}}], scheme__bits=8,
                 rules=[{"match": "*.layers.0.*", "bits": 2}], calibration__samples=192)
        off[follow] = distance(model, out, ids)
    assert off[True] < 0.97 * off[False] if family != "gemma3" else off[True] == off[False]
