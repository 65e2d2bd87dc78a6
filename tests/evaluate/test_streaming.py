"""Block by block and all at once are the same computation: every figure is equal, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import pipeline, recipe
from qtool.checkpoint import open_checkpoint
from qtool.console import Silent
from qtool.decode import open_model
from qtool.evaluate import evaluate, predictions
from qtool.models import skeleton
from qtool.outputs import make_plan
from tests import tiny

TEXT = "".join(f"Line {index}: the value is {index * index % 97}, and so on.\n" for index in range(400))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def quantize(model: Path, out: Path, name: str, changes: dict[str, Any]) -> Path:
    settings = {"calibration.samples": 4, "calibration.sequence_length": 32, **changes}
    checkpoint = open_checkpoint(str(model))
    plan = make_plan(checkpoint, recipe.override(recipe.preset(name), settings), out, "cpu")
    pipeline.run(checkpoint, plan, Silent())
    return out


def compare(paths: list[Path], base: Path | None, text: str) -> list[dict[str, Any]]:
    """The figures, streamed; they are those of the whole models."""
    results = []
    for stream in (False, True):
        result = evaluate([open_model(str(path)) for path in paths], open_model(str(base)) if base else None, text,
                          windows=3, context=48, stream=stream)
        assert [row.pop("streamed") for row in result["models"]] == [stream] * len(paths)
        results.append(result)
    assert results[0] == results[1]
    return list(results[1]["models"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "qwen3_moe"])
def test_families(family: str, tmp_path: Path, text: str) -> None:
    model = tiny.make(tmp_path / "model", family, num_hidden_layers=2,
                      **({"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}))
    compare([model], None, text)


@pytest.mark.parametrize(("method", "changes"), [
    ("rtn", {"scheme.bits": 4, "scheme.group_size": 32}), ("fp8", {}), ("fp8-static", {}), ("llm-int8", {}),
    ("rtn", {"scheme.bits": 4, "scheme.group_size": 32, "kv_cache": "fp8"}),
])
def test_what_is_rounded_while_running(method: str, changes: dict[str, Any], tmp_path: Path, text: str) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    out = quantize(model, tmp_path / "out", method, changes)
    row = compare([out], model, text)[0]
    assert row["kl"]["mean"] > 0


def test_rounding_is_there_when_streamed(tmp_path: Path, text: str) -> None:
    """The same weights with and without rounded inputs, or keys and values, differ."""
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    for name, method, changes in (
            ("plain", "rtn", {"scheme.bits": 8}), ("cache", "rtn", {"scheme.bits": 8, "kv_cache": "fp8"}),
            ("inputs", "rtn", {"scheme.bits": 8, "scheme.activations": "token", "scheme.group_size": -1})):
        quantize(model, tmp_path / name, method, {"scheme.group_size": 32, **changes})
    rows = evaluate([open_model(str(tmp_path / name)) for name in ("plain", "cache", "inputs")], open_model(str(model)),
                    text, windows=2, context=48, stream=True)["models"]
    assert rows[1]["kl"]["mean"] > 1.5 * rows[0]["kl"]["mean"] and rows[2]["kl"]["mean"] > 1.5 * rows[0]["kl"]["mean"]


def test_a_model_that_does_not_fit_is_streamed(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    for free, expected in ((1 << 40, False), (100_000, True)):
        monkeypatch.setattr(predictions, "_free", lambda device, free=free: free)
        result = evaluate([open_model(str(model))], text=text, windows=1, context=32)
        assert result["models"][0]["streamed"] is expected


def test_no_more_than_one_block_is_held(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of a block is read once, after all blocks before it and once their weights are gone."""
    import gc
    import weakref

    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=4)
    alive: list[weakref.ref[torch.nn.Module]] = []
    held = []
    real = predictions.load_rounding_block

    def watched(bones: skeleton.Skeleton, index: int, *rest: Any) -> torch.nn.Module:
        gc.collect()
        held.append(sum(block() is not None for block in alive))
        block = real(bones, index, *rest)
        alive.append(weakref.ref(block))
        return block

    monkeypatch.setattr(predictions, "load_rounding_block", watched)
    evaluate([open_model(str(model))], text=text, windows=2, context=32, stream=True)
    assert held == [0, 0, 0, 0]


def test_hidden_states_in_a_file_are_the_same(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    results = []
    for memory in (1 << 30, 0):
        monkeypatch.setattr(predictions, "MEMORY", memory)
        results.append(evaluate([open_model(str(model))], text=text, windows=2, context=32, stream=True))
    assert results[0] == results[1]
