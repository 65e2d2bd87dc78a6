"""Token ids cut in order from a text.

    python calibration_ids.py MODEL TEXT OUT.safetensors [--samples 128] [--length 512]
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("out")
parser.add_argument("--samples", type=int, default=128)
parser.add_argument("--length", type=int, default=512)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
ids = tokenizer(Path(options.text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
count = options.samples * options.length
save_file({"ids": torch.tensor(ids[:count], dtype=torch.int64).view(options.samples, options.length)}, options.out)
