"""vLLM has no CPU kernels for ModelOpt checkpoints, but its readers must understand what config.json and
hf_quant_config.json say, and say the same of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool import formats
from qtool.formats.modelopt import FP8, NVFP4
from tests.loaders.checkpoints import read

pytestmark = pytest.mark.loaders


def test_vllm_understands_both_files(tmp_path: Path) -> None:
    module, jobs, expected = formats.load("modelopt"), [], []
    for scheme, algorithm, size in ((FP8, "FP8", None), (NVFP4, "W4A16_NVFP4", 16)):
        said = module.with_kv_cache(module.config({"model.layers.0.mlp.up_proj": scheme}, ["model.layers.0.mlp.gate"]))
        for one in (said, module.extra_files(said)["hf_quant_config.json"]):
            jobs.append({"said": one, "out": str(tmp_path / f"{len(jobs)}.answer")})
            expected.append({"algorithm": algorithm, "kv_cache": "FP8", "group_size": size,
                             "exclude": ["model.layers.0.mlp.gate", "lm_head"]})
    read(".venv-loaders-vllm", "read_modelopt_with_vllm.py", jobs, tmp_path)
    assert [json.loads(Path(job["out"]).read_text()) for job in jobs] == expected
