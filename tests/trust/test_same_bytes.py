"""The same model and command give the same files wherever, whenever and however they are run; the manifest too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests import tiny
from tests.trust.helpers import ROOT, contents

pytestmark = pytest.mark.trust
SMALL = ("--group-size", "32", "--samples", "8", "--sequence-length", "32")
FEW = ("--samples", "4", "--sequence-length", "16")
RECIPE = """
steps: [gptq]
scheme: {bits: 4, group_size: 32}
calibration: {samples: 8, sequence_length: 32}
shard_gb: 5.0e-5
outputs: [{name: a}, {name: b, scheme: {bits: 8, group_size: 64}, format: gptq}]
"""
FREE = {  # the name of the output -> the command; what computes on no text
    "rtn": ("quantize", "{model}", "--method", "rtn", "--group-size", "32"),
    "nf4": ("quantize", "{model}", "--method", "nf4", "--group-size", "64"),
    "to-gptq": ("export", "{out}/rtn", "--to", "gptq"),
    "to-mlx": ("export", "{out}/rtn", "--to", "mlx"),
    "to-hf": ("export", "{out}/rtn", "--to", "hf"),
    "to-onnx": ("export", "{out}/rtn", "--to", "onnx"),
    "to-nf4": ("export", "{out}/rtn", "--to", "bitsandbytes", "--requantize", "nf4"),
    "to.gguf": ("export", "{model}", "--to", "gguf", "--type", "f16"),
    "blocks.gguf": ("export", "{wide}", "--to", "gguf", "--type", "q4_k_m"),
    "again.gguf": ("export", "{out}/blocks.gguf", "--to", "gguf", "--type", "q5_0"),
}
ON_TEXT = {
    "gptq": ("quantize", "{model}", *SMALL),
    "awq": ("quantize", "{model}", "--method", "awq", *SMALL),
    "aqlm": ("quantize", "{model}", "--method", "aqlm", *FEW),
    "qat": ("quantize", "{model}", "--method", "qat", "--group-size", "32", *FEW, "--set", "steps.distill.tokens=64"),
    "several": ("quantize", "{model}", "--recipe", "{recipe}"),
    "budget": ("quantize", "{model}", "--method", "gptq-fast", "--budget", "5.0", *SMALL[2:]),
    "imatrix.gguf": ("export", "{model}", "--to", "imatrix", *FEW),
}
DRIVER = """
import json, os, sys, time
os.umask(int(sys.argv[1], 8))
if (later := float(sys.argv[2])):
    now, stamp = time.time, time.time_ns
    time.time, time.time_ns = lambda: now() + later, lambda: stamp() + int(later * 1e9)
import torch
from qtool.cli import main
for words in json.load(sys.stdin):
    torch.set_num_threads(int(sys.argv[3]))
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, words
"""
DAYS = 400 * 86400.0


def run(commands: Mapping[str, Sequence[str]], out: str, folder: Path, values: Mapping[str, str], threads: int = 1,
        umask: str = "022", later: float = 0.0, **environment: str) -> dict[str, bytes]:
    """All commands, in one process, from `folder` into `out`; the files that they wrote."""
    lists = [[word.format(out=out, **values) for word in (*words, "--out", f"{out}/{name}", "--quiet")]
             for name, words in commands.items()]
    settings = {key: value for key, value in os.environ.items() if not key.startswith("LC_")}
    settings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), **environment}
    subprocess.run([sys.executable, "-c", DRIVER, umask, str(later), str(threads)], input=json.dumps(lists), text=True,
                   cwd=folder, env=settings, check=True)
    return contents(folder / out)


def refuse_different(ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> None:
    assert sorted(ours) == sorted(theirs)
    assert not [name for name in ours if ours[name] != theirs[name]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bytes")
    tiny.make(place / "models" / "tiny", "llama", num_hidden_layers=2)
    tiny.make(place / "models" / "wide", "llama", num_hidden_layers=1, hidden_size=256, intermediate_size=256)
    (place / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def plain(place: Path) -> dict[str, bytes]:
    """Absolute paths, one thread, today."""
    values = {"model": str(place / "models" / "tiny"), "wide": str(place / "models" / "wide"),
              "recipe": str(place / "recipe.yaml")}
    return run({**FREE, **ON_TEXT}, str(place / "plain"), place, values, PYTHONHASHSEED="0")


def test_another_place_day_language_and_hash_seed(place: Path, plain: Mapping[str, bytes], tmp_path: Path) -> None:
    """Relative paths, a trailing slash, a copy of the model elsewhere, a home and a temporary folder of its own."""
    shutil.copytree(place / "models" / "tiny", tmp_path / "deep" / "er" / "tiny")
    (tmp_path / "deep" / "recipe.yaml").write_text(RECIPE)
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    values = {"model": "./er/tiny/", "wide": f"../../{place.name}/models/wide", "recipe": "recipe.yaml"}
    made = run({**FREE, **ON_TEXT}, "out/", tmp_path / "deep", values, umask="077", later=DAYS, PYTHONHASHSEED="1",
               TZ="Asia/Kolkata", LANG="tr_TR.UTF-8", LC_ALL="C", HOME=str(tmp_path / "home"),
               TMPDIR=str(tmp_path / "temporary"), COLUMNS="40", NO_COLOR="1")
    refuse_different(made, plain)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_link_and_two_threads(place: Path, plain: Mapping[str, bytes], tmp_path: Path) -> None:
    """A link to the model has the model's name. What runs no text gives the same bytes with any number of threads."""
    (tmp_path / "linked").symlink_to(place / "models" / "tiny")
    values = {"model": str(tmp_path / "linked"), "wide": str(place / "models" / "wide")}
    gguf = "linked-F16.gguf"
    made = run(FREE, "out", tmp_path, values, threads=2, PYTHONHASHSEED="random")
    refuse_different(made, {name: data for name, data in plain.items() if name.partition("/")[0] in FREE})
    assert gguf not in made


def test_what_depends_on_threads_says_so(place: Path, plain: Mapping[str, bytes], tmp_path: Path) -> None:
    values = {"model": str(place / "models" / "tiny")}
    made = run({"gptq": ON_TEXT["gptq"]}, "out", tmp_path, values, threads=2)
    records = [json.loads(data) for data in (made["gptq/manifest.json"], plain["gptq/manifest.json"])]
    assert [one["arithmetic"]["threads"] for one in records] == [2, 1]
    assert json.loads(plain["rtn/manifest.json"])["arithmetic"] is None
    assert sorted(made) == [name for name in sorted(plain) if name.startswith("gptq/")]
    assert made["gptq/config.json"] == plain["gptq/config.json"]


def test_nothing_of_the_machine_or_the_day_is_in_a_file(place: Path, plain: Mapping[str, bytes]) -> None:
    for name, data in plain.items():
        for word in (str(place), str(place.name), str(Path.home()), os.uname().nodename, str(os.getpid())):
            assert len(word) < 5 or word.encode() not in data, (name, word)
