"""Tokens per second on this machine in one run: qtool int4, transformers bfloat16, llama.cpp Q4_0; and their ratios.

    OMP_NUM_THREADS=2 python benchmarks/decode.py MODEL [--llamacpp PYTHON] [--prompt 64] [--new 64] [--runs 3]

MODEL: a Llama-like checkpoint in bfloat16. It is quantized (round-to-nearest, groups of 32) and converted (q4_0) into
WORK first. PYTHON: one that has llama-cpp-python. Each engine runs in a process of its own, one after the other, is
warmed up, and the best of its runs counts. Prints JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def qtool(path: str, prompt: int, new: int, runs: int, rounded: bool) -> dict:
    from qtool import decode
    from qtool.evaluate import speed

    source = decode.open_model(path)
    return best([speed.measure(source, torch.device("cpu"), prompt, new, rounded) for _ in range(runs)])


@torch.inference_mode()
def transformers(path: str, prompt: int, new: int, runs: int) -> dict:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
                       max_new_tokens=count)
        return time.perf_counter() - start

    seconds(2)
    made = []
    for _ in range(runs):
        first, whole = seconds(1), seconds(new)
        made.append({"prompt_tokens_per_s": prompt / first, "tokens_per_s": (new - 1) / (whole - first),
                     "first_token_s": first, "kernels": "transformers"})
    return best(made)


def best(runs: list[dict]) -> dict:
    return max(runs, key=lambda run: run["tokens_per_s"])


def child(*words: object) -> dict:
    """One engine in a process of its own."""
    done = subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(model: str, work: Path) -> tuple[Path, Path]:
    int4, gguf = work / "int4-g32", work / "q4_0.gguf"
    command = [sys.executable, "-m", "qtool"]
    if not int4.exists():
        subprocess.run([*command, "quantize", model, "--method", "rtn", "--group-size", "32", "--out", int4, "--quiet"],
                       check=True)
    if not gguf.exists():
        subprocess.run([*command, "export", model, "--to", "gguf", "--type", "q4_0", "--out", gguf, "--quiet"],
                       check=True)
    return int4, gguf


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--llamacpp", default=".venv-loaders-llamacpp/bin/python")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--engine")  # one only: how this script calls itself
    for option, default in (("--prompt", 64), ("--new", 64), ("--runs", 3)):
        parser.add_argument(option, type=int, default=default)
    given = parser.parse_args()
    sizes = given.prompt, given.new, given.runs
    if given.engine:
        made = transformers(given.model, *sizes) if given.engine == "transformers" else \
            qtool(given.model, *sizes, given.engine == "rounded")
        print(json.dumps(made))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    int4, gguf = prepare(given.model, given.work)
    options = [word for name, size in zip(("--prompt", "--new", "--runs"), sizes, strict=True) for word in (name, size)]
    threads = torch.get_num_threads()
    result = {
        "transformers bf16": child(sys.executable, __file__, given.model, "--engine", "transformers", *options),
        "llama.cpp q4_0": child(given.llamacpp, HERE / "peer_llamacpp_decode.py", gguf, "--threads", threads, *options),
        "qtool int4-g32": child(sys.executable, __file__, int4, "--engine", "exact", *options),
        "qtool int4-g32, 8-bit inputs": child(sys.executable, __file__, int4, "--engine", "rounded", *options),
    }
    theirs = {name: result[name]["tokens_per_s"] for name in ("transformers bf16", "llama.cpp q4_0")}
    ratios = {f"{ours} / {name}": result[ours]["tokens_per_s"] / speed
              for ours in result if ours.startswith("qtool") for name, speed in theirs.items()}
    print(json.dumps({"threads": threads, "prompt": given.prompt, "new": given.new, "engines": result,
                      "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
