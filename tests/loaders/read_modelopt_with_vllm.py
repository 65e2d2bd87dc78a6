"""Runs in a venv with vLLM: what its ModelOpt readers understand of quantization configs. No kernel is needed.

usage: read_modelopt_with_vllm.py JOBS.json, a list of {"said": the config, "out": JSON file}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config, ModelOptNvFp4Config


def main(jobs: list[dict]) -> None:
    for job in jobs:
        said = {"quant_method": "modelopt", **job["said"]}
        reader = next(kind for kind in (ModelOptFp8Config, ModelOptNvFp4Config)
                      if kind.override_quantization_method(said, None))
        made = reader.from_config(said)
        cache = next(value for name, value in vars(made).items() if name.startswith("kv_cache_quant"))
        Path(job["out"]).write_text(json.dumps({
            "algorithm": made.quant_method, "kv_cache": cache, "exclude": made.exclude_modules,
            "group_size": getattr(made, "group_size", None)}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
