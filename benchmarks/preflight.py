"""What `qtool quantize --dry-run` predicts, plain and with --probe, beside what the run then takes.

    python benchmarks/preflight.py MODEL WORK [METHOD[:SETTING=VALUE]...] [--no-probe] [--options "--samples 16 ..."]

Each command is a process of its own; its peak memory is the kernel's (ru_maxrss). Seconds are those that the run itself
reports, without start-up and planning, as the prediction has them. Prints a Markdown table and keeps the figures in
WORK/preflight.json. Meaningful times need an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("rtn", "gptq", "awq", "q4_k_m", "nf4", "fp8")


def run(*words: str) -> tuple[dict[str, Any], int]:
    """(what `qtool WORDS --json` prints, its peak memory in bytes)"""
    command = [sys.executable, "-m", "qtool", *words, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    return json.loads(printed), usage.ru_maxrss * 1024


def measure(model: str, work: Path, method: str, options: list[str], probe: bool) -> dict[str, Any]:
    name, *settings = method.split(":")
    out = work / name
    words = ["quantize", model, "--method", name, "--out", str(out), *options,
             *(word for setting in settings for word in ("--set", setting))]
    plain, _ = run(*words, "--dry-run")
    probed = run(*words, "--dry-run", "--probe")[0] if probe else plain
    shutil.rmtree(out, ignore_errors=True)
    done, peak = run(*words)
    weights = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".gguf"))
    shutil.rmtree(out)
    return {"method": method, "memory": plain["peak_memory"], "probed_memory": probed["peak_memory"],
            "peak": peak, "seconds": plain["seconds"], "probed_seconds": probed["seconds"],
            "took": done["seconds"], "bytes": sum(plain["files"].values()), "written": weights,
            "terms": plain["memory"], "probe": probed.get("probe")}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | peak MB: predicted | with --probe | measured | seconds: predicted | with --probe | measured "
             "| bytes: predicted | written |", "|---|" + "---:|" * 8]
    for row in rows:
        memory = [f"{row[key] / 1e6:,.0f} ({row[key] / row['peak'] - 1:+.0%})" for key in ("memory", "probed_memory")]
        times = ["-" if row[key] is None else f"{row[key]:.1f} ({row[key] / row['took'] - 1:+.0%})"
                 for key in ("seconds", "probed_seconds")]
        cells = (row["method"], *memory, f"{row['peak'] / 1e6:,.0f}", *times, f"{row['took']:.1f}",
                 f"{row['bytes']:,}", f"{row['written']:,}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument("--options", default="", help="for every method, such as '--samples 16 --group-size auto'")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in given.methods:
        rows.append(measure(given.model, given.work, method, shlex.split(given.options), not given.no_probe))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    (given.work / "preflight.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
