"""HQQ, which needs no text, timed: a peer at 4, 3 and 2 bits.

    python peer_hqq.py MODEL OUT [--bits 4] [--group 64]

Its venv: torch==2.13.0 first, then hqq==0.2.8 and transformers. Its defaults (axis 1, asymmetric, optimised zero
points). OUT is a plain checkpoint of the decoded weights in float32, as no other program reads its files. Prints one
JSON line.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=64)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
seconds = 0.0
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
        start = time.perf_counter()
        codes, meta = Quantizer.quantize(module.weight.data, nbits=options.bits, group_size=options.group, axis=1,
                                         device="cpu", compute_dtype=torch.float32)
        seconds += time.perf_counter() - start
        module.weight.data = Quantizer.dequantize(codes, meta).float().view(module.weight.shape)
out = Path(options.out)
out.mkdir(parents=True)
source = Path(options.model)
for path in [*source.glob("*.json"), *source.glob("*.txt"), *source.glob("*.jinja")]:
    if "index" not in path.name:
        shutil.copy(path, out / path.name)
tied = model.config.tie_word_embeddings
save_file({name: tensor.float().contiguous() for name, tensor in model.state_dict().items()
           if not (tied and name == "lm_head.weight")}, out / "model.safetensors", {"format": "pt"})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"tool": "HQQ", "seconds": round(seconds, 1), "peak_rss_mb": round(peak)}))
