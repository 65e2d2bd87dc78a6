"""GPTQModel's AWQ or GPTQ on the same calibration ids, timed: another peer of these methods.

    python peer_gptqmodel.py MODEL OUT IDS.safetensors [--method awq|gptq] [--bits 4] [--group 64] [--asymmetric]

awq: always 4 bits with zero points.  gptq: all else is its default.

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
parser.add_argument("--method", choices=("awq", "gptq"), default="awq")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=64)
parser.add_argument("--asymmetric", action="store_true")
options = parser.parse_args()

ids = load_file(options.ids)["ids"]
samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
how = ({"bits": 4, "sym": False, "method": "awq", "format": "gemm"} if options.method == "awq" else
       {"bits": options.bits, "sym": not options.asymmetric})
settings = QuantizeConfig(group_size=options.group, device="cpu", **how)
model = GPTQModel.load(options.model, settings)
start = time.perf_counter()
model.quantize(samples, batch_size=1)
seconds = time.perf_counter() - start
model.save(options.out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"tool": "GPTQModel", "seconds": round(seconds, 1), "peak_rss_mb": round(peak)}))
