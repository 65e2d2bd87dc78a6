"""GPTQModel's AWQ on the same calibration ids, timed: another peer of `--method awq`.

    python peer_gptqmodel.py MODEL OUT IDS.safetensors [--group 64]

Prints one JSON line.
"""

import argparse
import json
import os
import resource
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default fails on two cores

from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("ids")
parser.add_argument("--group", type=int, default=64)
options = parser.parse_args()

ids = load_file(options.ids)["ids"]
samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
settings = QuantizeConfig(bits=4, group_size=options.group, sym=False, method="awq", format="gemm", device="cpu")
model = GPTQModel.load(options.model, settings)
start = time.perf_counter()
model.quantize(samples, batch_size=1)
seconds = time.perf_counter() - start
model.save(options.out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"tool": "GPTQModel", "seconds": round(seconds, 1), "peak_rss_mb": round(peak)}))
