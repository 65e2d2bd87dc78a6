"""The model card is Markdown that says what was made, and parses as the Hub parses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool import card, formats, manifest

LAYER = {"scheme": {"grid": "affine", "bits": 4, "group_size": 64, "symmetric": True}, "weight_error": 0.01}


def made(**changes: Any) -> dict[str, Any]:
    layers = [{"name": f"model.layers.{index}.mlp.up_proj", "relative_error": 0.01 * (index + 1), **LAYER}
              for index in range(3)]
    return {
        "qtool": "0.1.0", "source": {"name": "Qwen3-8B", "origin": "Qwen/Qwen3-8B@" + "0a" * 20, "files": {}},
        "recipe": {"steps": [{"gptq": {"damping": 0.01}}], "name": "x", "rules": [], "preset": None},
        "calibration": {"source": "builtin", "samples": 128, "sequence_length": 512, "sha256": "ab"},
        "format": "gptq", "layers": layers, "kept": [{"name": "lm_head", "reason": "it is the head"}],
        "totals": {"parameters": 8_190_735_360, "source_bytes": 16_381_470_720, "weight_bytes": 5_700_000_000,
                   "bits_per_weight": 4.25}, **changes}


def test_the_card_of_a_hub_model() -> None:
    text = card.text(made(), formats.load("gptq").LOADERS)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen3-8B" and front["tags"] == ["qtool", "quantized", "gptq"]
    for words in ("# Qwen3-8B, gptq int4-g64 (gptq)", "(https://huggingface.co/Qwen/Qwen3-8B)", "8,190,735,360",
                  "5,700.0 MB (34.8 %)", "| mlp.up_proj | 3 | int4-g64 | 2 % | 3 % | model.layers.2.mlp.up_proj |",
                  "`lm_head`: it is the head", "GPTQModel.load", "damping: 0.01", "128 × 512 tokens of `builtin`"):
        assert words in text, words
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == {"steps": [{"gptq": {"damping": 0.01}}], "name": "x"}
    for program in ("GPTQModel", "vLLM", "transformers"):
        code = text.split(f"\n{program}")[1].split("```python\n")[1].split("\n```")[0]
        assert len(code.splitlines()) == 3
        compile(code, program, "exec")


def test_a_local_path_is_not_told() -> None:
    text = card.text(made(source={"name": "mine", "origin": "/home/someone/mine", "files": {}}), ())
    assert "someone" not in text and "base_model" not in text and "`mine`" in text


def test_without_calibration_the_error_is_of_the_weights() -> None:
    layers = [{**layer, "relative_error": None} for layer in made()["layers"]]
    text = card.text(made(layers=layers, calibration=None, recipe=None), ())
    assert "no text was used" in text and "| 1 % | 1 % |" in text and "Calibrated" not in text and "yaml" not in text


@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_the_card_of_a_run_is_in_the_output(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    record = manifest.load(folder)
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert written == card.text(record, formats.load(record["format"]).LOADERS)
    assert str(folder.parent) not in written
