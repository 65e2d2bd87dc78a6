"""Runs a command and keeps its seconds and peak memory, or tabulates what was kept.

    python measure.py WORK LABEL COMMAND...   what the command prints goes to WORK/LABEL.out and .err
    python measure.py WORK --table LABEL...   beside quality.json of side_by_side.py; times are given as ratios to the
                                              last label's too

The last line that a command prints, or all of it, is JSON with its own `seconds`: without loading and saving for the
peer, without start-up for qtool. cpu_seconds are of all threads, with start-up: on a shared machine they say more.
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
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"process_seconds": round(time.perf_counter() - start, 1),
               "cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_rss_mb": round(used.ru_maxrss / 1024)}
    printed = (work / f"{label}.out").read_text().strip()
    try:
        inner = json.loads(printed)
    except ValueError:
        inner = json.loads(printed.splitlines()[-1])
    if "seconds" in inner:
        figures["seconds"] = round(inner["seconds"], 1)
    (work / f"{label}.json").write_text(json.dumps(figures))
    print(label, json.dumps(figures), flush=True)


def table(work: Path, labels: list[str]) -> None:
    runs: dict[str, Any] = {label: json.loads((work / f"{label}.json").read_text()) for label in labels}
    quality = json.loads((work / "quality.json").read_text())
    peer = runs[labels[-1]]
    print("| run | seconds | of the last's | whole process s | CPU s | peak RSS MB | perplexity | excess | KL |"
          " top-1 |\n"
          "|---|---|---|---|---|---|---|---|---|---|")
    for label in labels:
        one, figures = runs[label], quality[label]
        cells = (label, one["seconds"], f"{one['seconds'] / peer['seconds']:.3f}", one["process_seconds"],
                 one.get("cpu_seconds", ""), one["peak_rss_mb"], f"{figures['perplexity']:.3f}",
                 f"{figures['excess']:.4f} ± {figures['error']:.4f}", f"{figures['kl']:.4f}", f"{figures['top1']:.4f}")
        print("| " + " | ".join(map(str, cells)) + " |")
    print(f"original: perplexity {quality['original']['perplexity']:.3f}")


if __name__ == "__main__":
    if sys.argv[2] == "--table":
        table(Path(sys.argv[1]), sys.argv[3:])
    else:
        run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
