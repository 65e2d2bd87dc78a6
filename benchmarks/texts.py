"""How far quantized models are from their original on kinds of text that they were not solved on.

    python texts.py MODEL DATA RUN... [--windows 10] [--length 512]

DATA holds wikitext2-valid.txt and gsm8k-test.jsonl. Prints one JSON line per run and text: mean KL divergence from the
original in nats per token, and its standard error over windows. validation: windows 400 and on of that text, past
what 128 samples see; builtin: the half of qtool's own text that never calibrates; gsm8k: questions with their answers.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from side_by_side import load

from qtool import decode
from qtool.models import calibration
from qtool.recipe import Calibration

SEEN = 400  # windows of the validation text that a run may have been solved on


def windows(model: Path, data: Path, count: int, length: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Kinds of text and their windows, int64 [count, length]."""
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder) / "gsm8k.txt"
        lines = (data / "gsm8k-test.jsonl").read_text(encoding="utf-8").splitlines()[:400]
        problems.write_text("\n\n".join(f"{one['question']}\n{one['answer']}" for one in map(json.loads, lines)))
        for name, source, skipped in (("validation", str(data / "wikitext2-valid.txt"), SEEN),
                                      ("builtin", "builtin:evaluation", 0), ("gsm8k", str(problems), 0)):
            spec = Calibration(source=source, sequence_length=length)
            directory = decode.open_model(str(model)).directory
            yield name, calibration.load_tokens(spec, directory, skipped + count, 1 << 30).ids[skipped:]


@torch.inference_mode()
def divergences(original: torch.nn.Module, model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    """Mean KL divergence of each window."""
    found = []
    for window in ids:
        wanted = original(window[None], use_cache=False).logits[0].log_softmax(-1)
        got = model(window[None], use_cache=False).logits[0].log_softmax(-1)
        found.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    texts = list(windows(options.model, options.data, options.windows, options.length))
    original = load(options.model)
    for run in options.runs:
        model = load(run)
        for name, ids in texts:
            each = divergences(original, model, ids)
            error = statistics.stdev(each) / math.sqrt(len(each))
            print(json.dumps({"run": run.name, "text": name, "kl": round(statistics.fmean(each), 4),
                              "error": round(error, 4)}), flush=True)
