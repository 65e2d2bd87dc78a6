"""bitsandbytes' NF4 through transformers, timed: the peer beside which `--method nf4` is measured.

    python peer_bitsandbytes.py MODEL OUT [--double-quant]

Quantizing happens while transformers loads the model, so seconds are of loading it. Prints one JSON line.
"""

import argparse
import json
import resource
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--double-quant", action="store_true")
options = parser.parse_args()

start = time.perf_counter()
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                              bnb_4bit_use_double_quant=options.double_quant)
model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=settings, dtype=torch.bfloat16,
                                             device_map="cpu")
seconds = time.perf_counter() - start
model.save_pretrained(options.out)
AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"tool": "bitsandbytes", "seconds": round(seconds, 1), "peak_rss_mb": round(peak)}))
