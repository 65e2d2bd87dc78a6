"""GPTQ with llm-compressor on the same calibration ids, timed: the peer beside which qtool is measured.

    python peer_llmcompressor.py MODEL OUT IDS.safetensors [--bits 4] [--group 64]

Loads the model in float32 where the CPU has no bfloat16 units (bfloat16 products would be hundreds of times slower
there), in its own dtype elsewhere. The output is saved as bfloat16. Prints one JSON line.
"""

import argparse
import json
import resource
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("ids")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=64)
options = parser.parse_args()

torch.manual_seed(0)
ids = load_file(options.ids)["ids"]
native = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if native else torch.float32)
samples = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
arguments = QuantizationArgs(num_bits=options.bits, type="int", symmetric=True, strategy="group",
                             group_size=options.group, actorder="static")
scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
start = time.perf_counter()
oneshot(model=model, dataset=samples, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model.to(torch.bfloat16).save_pretrained(options.out, save_compressed=True)
AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
print(json.dumps({"tool": "llm-compressor", "seconds": round(seconds, 1), "peak_rss_mb": round(peak)}))
