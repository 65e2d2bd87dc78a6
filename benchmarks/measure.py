"""Runs a command and keeps its seconds and peak memory, or tabulates what was kept.

    python measure.py WORK LABEL COMMAND...     what the command prints goes to WORK/LABEL.out and .err
    python measure.py WORK --table LABEL...     the last label is the peer: times are also given as ratios to its time

The last line that a command prints, or all of it, is JSON with its own `seconds`: without loading and saving for the
peer, without start-up for qtool.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(work: Path, label: str, command: list[str]) -> None:
    start = time.perf_counter()
    with (work / f"{label}.out").open("w") as out, (work / f"{label}.err").open("w") as err:
        subprocess.run(command, check=True, stdout=out, stderr=err)
    figures = {"process_seconds": round(time.perf_counter() - start, 1),
               "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)}
    printed = (work / f"{label}.out").read_text().strip()
    try:
        inner = json.loads(printed)
    except ValueError:
        inner = json.loads(printed.splitlines()[-1])
    figures["seconds"] = round(inner["seconds"], 1)
    (work / f"{label}.json").write_text(json.dumps(figures))
    print(label, json.dumps(figures), flush=True)


def table(work: Path, labels: list[str]) -> None:
    runs: dict[str, Any] = {label: json.loads((work / f"{label}.json").read_text()) for label in labels}
    peer = runs[labels[-1]]
    print("| run | seconds | of the peer's | whole process s | peak RSS MB | weights MB | perplexity | excess | KL | "
          "top-1 |\n|---|---|---|---|---|---|---|---|---|---|")
    for label in labels:
        one, quality = runs[label], json.loads((work / f"{label}.eval.json").read_text())
        model, excess = quality["model"], quality["excess"]
        cells = (label, one["seconds"], f"{one['seconds'] / peer['seconds']:.3f}", one["process_seconds"],
                 one["peak_rss_mb"], f"{model['weight_bytes'] / 1e6:.1f}", f"{model['perplexity']:.3f}",
                 f"{excess['mean']:.4f} ± {excess['error']:.4f}", f"{quality['kl']['mean']:.4f}",
                 f"{quality['top1_agreement']:.4f}")
        print("| " + " | ".join(map(str, cells)) + " |")
    print(f"original: perplexity {quality['against']['perplexity']:.3f}, {quality['text']['windows']} windows of "
          f"{quality['text']['context']} tokens; KL and agreement are over the same windows")


if __name__ == "__main__":
    if sys.argv[2] == "--table":
        table(Path(sys.argv[1]), sys.argv[3:])
    else:
        run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
