"""Perplexity, KL and top-1 agreement of several quantized models, side by side, so that the original runs once.

    python benchmarks/side_by_side.py MODEL TEST.txt OUT.json PATH... [--windows 60]

Every model runs in float32 from its stored codes. Perplexity is over all windows of 1,024 tokens, KL and top-1
agreement over the first 20. OUT.json: the name of each path's folder (`original` for MODEL) and its figures;
excess = ln(perplexity / original's), with the standard error of the mean of the windows' differences.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch

from qtool import decode
from qtool.evaluate import measure
from qtool.models import calibration, skeleton
from qtool.models.whole import load_model
from qtool.recipe import Calibration

CONTEXT, KL_WINDOWS = 1024, 20


def load(path: Path) -> torch.nn.Module:
    source = decode.open_model(str(path))
    made = skeleton.build(source.directory, source.config, source.specs)
    return load_model(made, source.read, torch.device("cpu"), torch.float32, source.schemes,
                      source.read_quantized, source.cache_scales())


@torch.inference_mode()
def evaluate(model: Path, test: Path, paths: list[Path], windows: int) -> dict[str, dict[str, float]]:
    names = ["original", *(path.name for path in paths)]
    models = [load(path) for path in (model, *paths)]
    spec = Calibration(source=str(test), sequence_length=CONTEXT)
    ids = calibration.load_tokens(spec, decode.open_model(str(model)).directory, windows, 1 << 30).ids
    figures = {name: measure.Figures() for name in names}
    loss: dict[str, list[float]] = {name: [] for name in names}
    for index, window in enumerate(ids):
        original = models[0](window[None], use_cache=False).logits[0, :-1]
        for name, one in zip(names, models, strict=True):
            logits = original if one is models[0] else one(window[None], use_cache=False).logits[0, :-1]
            loss[name].append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
            if index < KL_WINDOWS:
                measure.add(figures[name], window[1:], logits, original)
    return {name: row(loss[name], loss["original"], figures[name]) for name in names}


def row(loss: list[float], original: list[float], figures: measure.Figures) -> dict[str, float]:
    excess = [mine - other for mine, other in zip(loss, original, strict=True)]
    error = statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    known = measure.divergence(figures)
    return {"perplexity": math.exp(statistics.fmean(loss)), "excess": statistics.fmean(excess), "error": error,
            "kl": known["kl"]["mean"], "top1": known["top1_agreement"]["mean"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "test", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=60)
    options = parser.parse_args()
    rows = evaluate(options.model, options.test, options.paths, options.windows)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
