"""A loaded LLM.int8() model multiplies as its config.json says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qtool import decode
from qtool.activations import mixed_product
from qtool.grids import vectorwise_int8
from qtool.models import skeleton
from qtool.models.whole import load_model
from tests import tiny
from tests.cli.conftest import make
from tests.models.loaded import CPU

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    model = tiny.make(folder / "model", "llama")
    make("quantize", model, "--method", "llm-int8", "--set", "scheme.outlier_threshold=2.5", "--out", folder / "out",
         "--quiet")
    return folder / "out"


@pytest.mark.parametrize("threshold", [None, 0.0, 1.5, 6])
def test_the_threshold_is_the_checkpoints(int8: Path, threshold: float | None, tmp_path: Path) -> None:
    """`None`: as the recipe wrote it, 2.5."""
    shutil.copytree(int8, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text())
    if threshold is None:
        assert config["quantization_config"]["llm_int8_threshold"] == 2.5
    else:
        config["quantization_config"]["llm_int8_threshold"] = threshold
        path.write_text(json.dumps(config))
    wanted = 2.5 if threshold is None else threshold
    source = decode.open_model(str(tmp_path / "copy"))
    bones = skeleton.build(source.directory, source.config, source.specs)
    model = load_model(bones, source.read, CPU, torch.float32, source.schemes, source.read_quantized)
    tensor, x = source.read_quantized(NAME), torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0))
    product = mixed_product(x.flatten(0, 1), vectorwise_int8.signed_codes(tensor), tensor.extra["absmax"], wanted)
    assert torch.equal(model.get_submodule(NAME)(x), product.reshape(2, 9, -1))
