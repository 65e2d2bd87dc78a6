"""llama.cpp's quantizer through llama-cpp-python, timed: the peer of `--method q4_k_m` and of `export --to gguf`.

    python peer_llamacpp.py SOURCE.gguf OUT.gguf TYPE [--imatrix MEANS.safetensors] [--threads 2]

TYPE: a mixture such as q4_k_m. MEANS: float32 mean squares by GGUF tensor name (imatrix.py). Prints one JSON line.
"""

import argparse
import ctypes
import json
import resource
import time

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

FTYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
          "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30}

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("out")
parser.add_argument("type", choices=FTYPES)
parser.add_argument("--imatrix")
parser.add_argument("--threads", type=int, default=2)
options = parser.parse_args()

params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = FTYPES[options.type], options.threads
if options.imatrix:
    means = {name: np.ascontiguousarray(values, np.float32) for name, values in load_file(options.imatrix).items()}
    table = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # ends with an entry of zeros
    for entry, (name, values) in zip(table, means.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(table, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
llama_cpp.llama_backend_init()
start = time.perf_counter()
status = llama_cpp.llama_model_quantize(options.source.encode(), options.out.encode(), ctypes.byref(params))
seconds = time.perf_counter() - start
if status:
    raise SystemExit(f"llama.cpp could not quantize {options.source}: {status}")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"tool": "llama.cpp", "seconds": round(seconds, 2), "peak_rss_mb": round(peak)}))
