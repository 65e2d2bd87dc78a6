"""What each option of the solver is worth: quantizes one model with every rung, evaluates all of them side by side.

    python benchmarks/ladder.py MODEL CALIBRATION.txt TEST.txt OUT [--samples 128] [--windows 60] [--only a,b] [--table]

Each rung is a recipe; OUT/<rung>.yaml and OUT/<rung>/ remain, and a rung that is already there is not made again.
KL and top-1 agreement are over the first 20 windows, perplexity over all. `qtool` and its Python must be the first on
the path.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from qtool import decode
from qtool.evaluate import measure
from qtool.models import calibration, skeleton
from qtool.models.whole import load_model
from qtool.recipe import Calibration

CONTEXT, KL_WINDOWS = 1024, 20
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
    "asymmetric-0.25": [{"asymmetric": {"factor": 0.25}}, {"gptq": {}}, {"refine": {}}],
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
    rows = evaluate(options, [out / rung for rung in rungs])
    print("| rung | perplexity | excess | KL | top-1 | seconds | peak RSS MB |\n|---|---|---|---|---|---|---|")
    for rung, row in zip(["original", *rungs], rows, strict=True):
        run = json.loads((out / f"{rung}.run.json").read_text()) if rung in rungs else {}
        print(f"| {rung} | {row['perplexity']:.3f} | {row['excess']:.4f} | {row['kl']:.4f} | {row['top1']:.4f} | "
              f"{run.get('seconds', '')} | {run.get('peak_rss_mb', '')} |")


def quantize(options: argparse.Namespace, out: Path, rung: str) -> None:
    if (out / rung).exists():
        return
    recipe = {"name": rung, "steps": {**RUNGS, **OTHERS}[rung],
              "scheme": {"bits": options.bits, "group_size": options.group_size},
              "calibration": {"source": options.calibration, "samples": options.samples, "sequence_length": 512}}
    path = out / f"{rung}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qtool", "quantize", options.model, "--recipe", str(path), "--out",
                    str(out / rung), "--quiet"], check=True)
    seconds = round(time.perf_counter() - start, 1)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024  # the largest child so far
    known = peak if peak > before.ru_maxrss // 1024 else None
    (out / f"{rung}.run.json").write_text(json.dumps({"seconds": seconds, "peak_rss_mb": known}))
    print(f"{rung}: {seconds} s", file=sys.stderr, flush=True)


@torch.inference_mode()
def evaluate(options: argparse.Namespace, paths: list[Path]) -> list[dict[str, float]]:
    """The original first. All models are in memory at once, in float32, so that each window is read once."""
    sources = [decode.open_model(str(path)) for path in (Path(options.model), *paths)]
    models = [load_model(skeleton.build(one.directory, one.config, one.specs), one.read, torch.device("cpu"),
                         torch.float32) for one in sources]
    spec = Calibration(source=options.test, sequence_length=CONTEXT)
    ids = calibration.load_tokens(spec, sources[0].directory, options.windows, 1 << 30).ids
    figures = [measure.Figures.empty(2) for _ in models]
    likelihood: list[list[float]] = [[] for _ in models]
    for index, window in enumerate(ids):
        logits = [model(window[None], use_cache=False).logits[0, :-1] for model in models]
        for place, one in enumerate(logits):
            if index < KL_WINDOWS:
                measure.add(figures[place], [one, logits[0]], window[1:])
                likelihood[place].append(figures[place].nll[0][-1])
            else:
                likelihood[place].append(float(torch.nn.functional.cross_entropy(one, window[1:])))
    nll = [math.fsum(one) / len(one) for one in likelihood]
    return [{"perplexity": math.exp(mean), "excess": mean - nll[0],
             "kl": measure.divergence(figure)["kl"]["mean"], "top1": measure.divergence(figure)["top1_agreement"]}
            for mean, figure in zip(nll, figures, strict=True)]


if __name__ == "__main__":
    main()
