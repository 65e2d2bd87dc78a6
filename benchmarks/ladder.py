"""What each option of the solver is worth: quantizes one model with every rung, evaluates all of them side by side.

    python benchmarks/ladder.py MODEL CALIBRATION.txt TEST.txt OUT [--samples 128] [--windows 60] [--only a,b]

Each rung is a recipe; OUT/<rung>.yaml and OUT/<rung>/ remain, and a rung that is already there is not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PLAIN = {"search": False, "signed": False}
ASYMMETRIC: dict[str, Any] = {"asymmetric": {}}
RUNGS: dict[str, list[dict[str, Any]]] = {
    "rtn-absmax": [{"rtn": PLAIN}],
    "rtn": [{"rtn": {}}],
    "gptq-plain": [{"gptq": {**PLAIN, "order": "none"}}],
    "gptq-order": [{"gptq": PLAIN}],
    "gptq-search": [{"gptq": {}}],
    "gptq-refine": [{"gptq": {}}, {"refine": {}}],
    "asymmetric-gptq-refine": [ASYMMETRIC, {"gptq": {}}, {"refine": {}}],
}
OTHERS: dict[str, list[dict[str, Any]]] = {  # only with --only
    "unsigned": [{"gptq": {"signed": False}}, {"refine": {}}],
    "refine-4": [{"gptq": {}}, {"refine": {"sweeps": 4}}],
    "refine-codes": [{"gptq": {}}, {"refine": {"scales": False}}],
    "damp-0.1": [{"gptq": {"damping": 0.1}}, {"refine": {"damping": 0.1}}],
    "damp-0.001": [{"gptq": {"damping": 0.001}}, {"refine": {"damping": 0.001}}],
    "damp-relative": [{"gptq": {"damping": 0.05, "damping_mode": "relative"}},
                      {"refine": {"damping": 0.05, "damping_mode": "relative"}}],
    "share-0.25": [{"asymmetric": {"share": 0.25}}, {"gptq": {}}, {"refine": {"sweeps": 1}}],
    "share-0.125": [{"asymmetric": {"share": 0.125}}, {"gptq": {}}, {"refine": {"sweeps": 1}}],
    "asymmetric-0.5": [{"asymmetric": {"factor": 0.5}}, {"gptq": {}}, {"refine": {}}],
    "asymmetric-limit-0.5": [{"asymmetric": {"limit": 0.5}}, {"gptq": {}}, {"refine": {}}],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "test", "out"):
        parser.add_argument(name)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--only", default=",".join(RUNGS))
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rungs = options.only.split(",")
    for rung in rungs:
        quantize(options, out, rung)
    run("side_by_side.py", options.model, options.test, str(out / "quality.json"), *(str(out / rung) for rung in rungs),
        "--windows", str(options.windows))
    run("measure.py", str(out), "--table", *rungs)


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments], check=True)


def quantize(options: argparse.Namespace, out: Path, rung: str) -> None:
    if (out / rung).exists():
        return
    recipe = {"name": rung, "steps": {**RUNGS, **OTHERS}[rung],
              "scheme": {"bits": options.bits, "group_size": options.group_size},
              "calibration": {"source": options.calibration, "samples": options.samples, "sequence_length": 512}}
    path = out / f"{rung}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    run("measure.py", str(out), rung, sys.executable, "-m", "qtool", "quantize", options.model, "--recipe", str(path),
        "--out", str(out / rung), "--json")


if __name__ == "__main__":
    main()
