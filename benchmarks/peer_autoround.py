"""AutoRound on the same calibration ids, timed: the peer of the steps that learn.

    python peer_autoround.py MODEL OUT IDS.safetensors [--bits 4] [--group 64] [--iters 200] [--batch 8] [--asymmetric]

Its venv: torch==2.13.0 first, then auto-round==0.16.1. Everything but these options is its default; without bfloat16
units it computes in float32 (its products in bfloat16 would be emulated). Writes GPTQ's layout; the folder that it
makes inside OUT takes OUT's place. Prints one JSON line.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("ids")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=64)
parser.add_argument("--iters", type=int, default=200)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--asymmetric", action="store_true")
options = parser.parse_args()

ids = load_file(options.ids)["ids"]
batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(options.batch)]
native = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if native else torch.float32)
learned = AutoRound(model, scheme=f"W{options.bits}A16", tokenizer=AutoTokenizer.from_pretrained(options.model),
                    group_size=options.group, sym=not options.asymmetric, iters=options.iters, seqlen=ids.shape[1],
                    nsamples=len(ids), batch_size=options.batch, dataset=batches, device_map="cpu", amp=native)
start = time.perf_counter()
learned.quantize_and_save(options.out, format="auto_gptq")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
made = Path(options.out)
if [path.is_dir() for path in made.iterdir()] == [True]:
    inner = next(made.iterdir()).rename(made.with_name(made.name + ".made"))
    made.rmdir()
    inner.rename(made)
sys.stdout.flush()
print("\n" + json.dumps({"tool": f"AutoRound, {options.iters} iterations", "seconds": round(seconds, 1),
                         "peak_rss_mb": round(peak)}))
