"""llama.cpp's speed through llama-cpp-python: a peer of decode.py. Prints one JSON line.

    python peer_llamacpp_decode.py MODEL.gguf [--threads 2] [--prompt 512] [--new 64] [--runs 3]
"""

import argparse
import json
import time

import llama_cpp
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("model")
for option, default in (("--threads", 2), ("--prompt", 512), ("--new", 64), ("--runs", 3)):
    parser.add_argument(option, type=int, default=default)
options = parser.parse_args()

model = llama_cpp.Llama(options.model, n_ctx=options.prompt + options.new, n_threads=options.threads, verbose=False,
                        n_threads_batch=options.threads, n_batch=options.prompt)
ids = np.random.default_rng(0).integers(0, model.n_vocab(), options.prompt).tolist()
best = {"first_token_s": float("inf"), "token_s": float("inf")}
for _ in range(options.runs + 1):  # the first is for warmth
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    token = model.sample(temp=0.0)
    first = time.perf_counter()
    for _ in range(options.new - 1):
        model.eval([token])
        token = model.sample(temp=0.0)
    end = time.perf_counter()
    best = {"first_token_s": min(best["first_token_s"], first - start),
            "token_s": min(best["token_s"], (end - first) / (options.new - 1))}
print(json.dumps({"prompt_tokens_per_s": options.prompt / best["first_token_s"], "tokens_per_s": 1 / best["token_s"],
                  "first_token_s": best["first_token_s"], "kernels": "llama.cpp"}))
