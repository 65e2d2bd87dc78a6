"""A method of llm-compressor on the same calibration ids, timed: the peer beside which qtool is measured.

    python peer_llmcompressor.py MODEL OUT IDS.safetensors [--method gptq|awq|w8a8|fp8] [--bits 4] [--group 64]
        [--asymmetric] [--dense]

awq: asymmetric groups, rounded.  w8a8: SmoothQuant, then GPTQ, per channel, inputs per token.  fp8: FP8_DYNAMIC.
--dense: the rounded weights are saved as they are, as every version reads them.
Loads the model in float32 where the CPU has no bfloat16 units (bfloat16 products would be hundreds of times slower
there), in its own dtype elsewhere. The output is saved as bfloat16. Prints one JSON line.
"""

import argparse
import json
import resource
import time
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD = ["lm_head"]


def recipe(method: str, bits: int, group: int, symmetric: bool) -> list[Any]:
    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group",
                                 group_size=group, **({"actorder": "static"} if method == "gptq" else {}))
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}
    if method == "awq":
        return [AWQModifier(config_groups=groups, ignore=HEAD)]
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=HEAD)]
    if method == "w8a8":
        return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(targets="Linear", scheme="W8A8", ignore=HEAD)]
    return [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=HEAD)]


parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("ids")
parser.add_argument("--method", choices=("gptq", "awq", "w8a8", "fp8"), default="gptq")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=64)
parser.add_argument("--asymmetric", action="store_true")
parser.add_argument("--dense", action="store_true")
options = parser.parse_args()

torch.manual_seed(0)
if not torch.cuda.is_available():  # its AWQ pins memory for a GPU that is not there, and fails
    torch.Tensor.pin_memory = lambda self, *_: self
ids = load_file(options.ids)["ids"]
native = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if native else torch.float32)
samples = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
data = {} if options.method == "fp8" else {
    "dataset": samples, "max_seq_length": ids.shape[1], "num_calibration_samples": len(ids)}
start = time.perf_counter()
oneshot(model=model, recipe=recipe(options.method, options.bits, options.group,
                                   options.method != "awq" and not options.asymmetric), **data)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = model.to(torch.bfloat16)
if options.dense:
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    dense.load_state_dict(model.state_dict(), strict=False)  # without its scales and zero points
    dense.save_pretrained(options.out)
else:
    model.save_pretrained(options.out, save_compressed=True)
AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
print(json.dumps({"tool": "llm-compressor", "seconds": round(seconds, 1), "peak_rss_mb": round(peak)}))
