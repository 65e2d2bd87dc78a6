"""Bad input ends in one message and status 2; good input in what was promised."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qtool
from tests import tiny
from tests.cli.conftest import Run

ROOT = Path(__file__).parent.parent.parent
SHAPED = "--group-size 32"

BAD_QUANTIZE = [
    ("nope", "nope: no such file or folder, and not a Hub id"),
    ("short.txt", "is a file, but not a .gguf file"),
    ("empty", "there is no config.json"),
    ("MODEL --bits 9", "--bits: .*less than or equal to 8 .*9"),
    ("MODEL --bits 1", "--bits: .*greater than or equal to 2"),
    (f"MODEL --bits 5 {SHAPED}", "packs 2, 3, 4 or 8 bits, not the 5.*nearest: 4 bits"),
    ("MODEL --bits 1.5", "budget: 1.5 bits cannot be met; with int2-g128.* this model takes 2.2465 to 3.5243 bits"),
    ("MODEL --budget 3,5GB", "--budget: budget.size: a size is a number with kB, MB, GB or TB .*4.2GB"),
    ("MODEL --budget -1", "--budget: "),
    ("MODEL --budget nan", "--budget: budget.bits: .*finite"),
    ("MODEL --budget 3.5 --bits 4", "--bits 4 and --budget 3.5 both say how many bits; give one"),
    ("MODEL --bits 3.5 --group-size 32", "--group-size means nothing with a budget.*budget.schemes"),
    ("MODEL --set budget.bit=3", "unknown key 'budget.bit'; did you mean 'bits'"),
    ("MODEL --set budget={}", "budget: a budget has bits .* or size .*, one of the two"),
    ("MODEL --group-size 7", "--group-size: .*multiple of 8"),
    ("MODEL --group-size foo", "--group-size foo: give a number of columns, -1 .* or auto"),
    ("MODEL", "group size 128 does not divide the 64 input columns of model.layers.0.self_attn.q_proj.*64, 32.*auto"),
    ("MODEL --method gtpq", "did you mean 'gptq'"),
    ("MODEL --recipe missing.yaml", "recipe file missing.yaml does not exist; ready recipes: .*gptq-int4"),
    ("MODEL --recipe gptq-int5", "did you mean 'gptq-int4'"),
    ("MODEL --recipe gptq-int4 --method rtn", "--method rtn and --recipe gptq-int4 both say.*give one"),
    ("MODEL --set foo", "write it as key=value"),
    ("MODEL --set scheme.bitz=3", "unknown key 'scheme.bitz'; did you mean 'bits'"),
    (f"MODEL --set steps.gptq.dampin=1 {SHAPED}", "unknown option 'dampin'.*damping"),
    ("MODEL --set steps.awq.x=1", "no step 'awq'; its steps: asymmetric, gptq"),
    ("MODEL --set scheme.bits=[", "not valid YAML"),
    ("MODEL --method q4_k_m --bits 3", "--bits means nothing with the GGUF types of q4_k_m"),
    ("MODEL --method q2_k --asymmetric", "--symmetric or --asymmetric means nothing"),
    (f"MODEL --format ggml {SHAPED}", "unknown format 'ggml'.*compressed-tensors, fp8, gguf, gptq"),
    (f"MODEL --format hf {SHAPED}", "hf keeps dense weights.*--format compressed-tensors"),
    ("MODEL --dtype int8", "--dtype: .*'bfloat16'"),
    (f"MODEL --device tpu {SHAPED}", "device 'tpu' is not known; use auto, cpu"),
    (f"MODEL --device cuda:77 {SHAPED}", "device cuda:77 is not there.*--device cpu"),
    ("MODEL --samples 0", "--samples: .*greater than or equal to 1"),
    ("MODEL --sequence-length 4", "--sequence-length: .*greater than or equal to 8"),
    ("MODEL --seed -1", "--seed: .*greater than or equal to 0"),
    (f"MODEL --calibration missing.txt {SHAPED}", "calibration file missing.txt does not exist"),
    (f"MODEL --calibration short.txt {SHAPED}", "short.txt.* gives .* tokens.*use more text"),
    (f"MODEL --calibration what?ever {SHAPED}", "neither 'builtin', nor"),
    ("MODEL --symmetric --asymmetric", "exclude each other"),
    (f"MODEL --out full {SHAPED}", "full exists and is not empty"),
    (f"MODEL --out short.txt {SHAPED}", "exists and is not a directory"),
    (f"MODEL --out short.txt/x {SHAPED} --method rtn", "cannot be made"),
    ("QUANTIZED", "is quantized already .compressed-tensors.; start from the original.*--to hf"),
]
BAD_OTHERS = [
    ("inspect", "give the PATH of a checkpoint, --diff A B, or --system"),
    ("inspect --layers", "PATH"),
    ("inspect --system --verify", "need the PATH"),
    ("inspect MODEL --json --csv", "exclude each other"),
    ("inspect nope", "no such file or folder"),
    ("inspect QUANTIZED --against nope", "no such file or folder"),
    ("inspect QUANTIZED --against OTHER", "not the same architecture|has shape"),
    ("eval nope", "no such file or folder"),
    ("eval MODEL --windows 0", "--windows 0: at least 1"),
    ("eval MODEL --context 4", "--context 4: at least 8"),
    ("eval MODEL --context 4096", "more than the 256 positions.*--context 256"),
    ("eval MODEL --context 64 --text missing.txt", "evaluation file missing.txt does not exist"),
    ("eval MODEL --context 64 --text short.txt", r"gives \d+ tokens, but 20 windows of 64 need 1280; use more text"),
    ("eval MODEL --context 64 --against OTHER", "vocabulary of 512 tokens, but .* 600"),
    ("eval MODEL --device tpu", "device 'tpu' is not known"),
    ("eval MODEL MODEL", "is given twice; name each PATH once"),
    ("eval MODEL OTHER --context 64", "other has a vocabulary of 600 tokens, but .*tiny one of 512"),
    ("eval MODEL --no-cache", "about the model that --against names"),
    ("eval MODEL --against MODEL --cache x --no-cache", "--cache and --no-cache exclude each other"),
    ("eval MODEL --context 64 --memory-context 0", "context"),
    ("eval MODEL --memory-batch 2", "--memory-batch goes with --memory-context"),
    ("eval MODEL --limit 5", "--limit and --task-files go with --tasks"),
    ("eval MODEL --tasks ,", "--tasks names no task"),
    ("eval MODEL --stream --speed", "--speed and --tasks run the whole model, which --stream keeps out of memory"),
    ("eval MODEL --json --markdown", "--json and --markdown exclude each other"),
    ("export QUANTIZED --to compressed-tensors", "is stored as compressed-tensors already"),
    ("export QUANTIZED", "give --to FORMAT, --push-to NAMESPACE/NAME, or both"),
    ("export QUANTIZED --push-to me/x --out y", "--out goes with --to"),
    ("export QUANTIZED --push-to x", "--push-to x: write it as NAMESPACE/NAME"),
    ("export QUANTIZED --to gptq --push-to me/-x", "--push-to me/-x: "),
    ("export empty --push-to me/x", "manifest.json cannot be read: .*was this directory written by qtool"),
    ("export MODEL --push-to me/x", "manifest.json cannot be read: .*was this directory written by qtool"),
    ("export nope --push-to me/x", "nope: no such folder; --push-to uploads a directory that qtool wrote"),
    ("export QUANTIZED --to marlin", "unknown format 'marlin'.*gptq, hf, imatrix, mlx, modelopt, onnx"),
    ("export QUANTIZED --to onx", "unknown format 'onx'; did you mean 'onnx'"),
    ("export MODEL --to gptq", "is not quantized.*use: qtool quantize .* --format gptq"),
    ("export MODEL --to hf", "holds plain weights already"),
    ("export QUANTIZED --to gptq --out full", "exists and is not empty"),
    ("export nope --to hf", "no such file or folder"),
]
USAGE = [
    ("quantize", "Missing argument 'MODEL'"), ("quantize MODEL --bits four", "--bits"),
    ("quantize MODEL --bit 3", "No such option: --bit.*--bits"), ("quantise MODEL", "Did you mean 'quantize'"),
    ("eval MODEL --windows x", "--windows"), ("eval", "Missing argument 'PATH...'"), ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with things that are no model, and nothing else afterwards."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    (tmp_path / "short.txt").write_text("hello there")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("other") / "other", "llama", vocab_size=600, num_hidden_layers=2)


def words(line: str, model: Path, gptq: Path, other: Path) -> list[str]:
    known = {"MODEL": str(model), "QUANTIZED": str(gptq), "OTHER": str(other)}
    return [known.get(word, word) for word in line.split()]


@pytest.mark.parametrize(("line", "message"),
                         [*((f"quantize {line}", message) for line, message in BAD_QUANTIZE), *BAD_OTHERS])
def test_bad_input_is_one_message_and_status_2(line: str, message: str, run: Run, place: Path, model: Path, gptq: Path,
                                               other: Path) -> None:
    status, out, err = run(*words(line, model, gptq, other))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and re.search(message, err), err
    assert "Traceback" not in err and err.count("\n") == 1
    assert sorted(path.name for path in place.iterdir() if not path.name.endswith(".partial")) == [
        "empty", "full", "short.txt"]


@pytest.mark.parametrize(("line", "message"), USAGE)
def test_bad_usage_is_status_2(line: str, message: str, run: Run, model: Path, gptq: Path, other: Path) -> None:
    status, out, err = run(*words(line, model, gptq, other))
    assert (status, out) == (2, "")
    assert re.search(message, " ".join(err.split())), err


@pytest.mark.parametrize("command", ["", "quantize", "inspect", "eval", "export"])
def test_help_has_an_example(command: str, run: Run) -> None:
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    assert (f"qtool {command} " in out.split("Example")[1]) if command else "quantize" in out
    assert "[[" not in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"qtool {qtool.__version__}\n", "")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, qtool.cli; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_python_dash_m_gives_the_exit_status() -> None:
    done = subprocess.run([sys.executable, "-m", "qtool", "inspect", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nope")


def test_dry_run_writes_nothing_and_tells_everything(run: Run, place: Path, model: Path) -> None:
    status, out, _ = run("quantize", model, "--group-size", "auto", "--dry-run", "--json")
    plan = json.loads(out)
    assert status == 0 and plan["schema"] == 1
    assert {one["scheme"]["group_size"] for one in plan["linears"]} == {64}
    assert plan["out"] == "tiny-gptq-int4-g64" and len(plan["linears"]) == 21 and plan["blocks"] == 3
    assert plan["bits_per_weight"] > 4 and plan["peak_memory"] > 0 and plan["disk_bytes"] > plan["weight_bytes"]
    status, out, _ = run("quantize", model, "--group-size", "32", "--dry-run", "--out", "full")
    assert status == 0 and "21 linears to int4-g32" in out and "lm_head: the output head" in out
    assert "full exists: a run would refuse" in out
    assert not list(place.glob("tiny-*"))


def test_flags_win_over_the_recipe_and_set_wins_over_flags(run: Run, place: Path, model: Path) -> None:
    Path("r.yaml").write_text("steps: [rtn]\nscheme: {bits: 8, group_size: 64}\n")
    for given, expected in (
            ("", (8, 64, True)), ("--bits 3 --asymmetric", (3, 64, False)),
            ("--bits 3 --set scheme.bits=2 --set scheme.group_size=16", (2, 16, True))):
        plan = json.loads(run("quantize", model, "--recipe", "r.yaml", "--dry-run", "--json", *given.split())[1])
        scheme = plan["linears"][0]["scheme"]
        assert (scheme["bits"], scheme["group_size"], scheme["symmetric"]) == expected


def test_quantize_prints_a_line_per_block_and_a_summary(run: Run, place: Path, model: Path) -> None:
    status, out, err = run("quantize", model, "--group-size", "32", "--samples", "4", "--sequence-length", "32")
    assert status == 0 and Path("tiny-gptq-int4-g32/model.safetensors").is_file()
    lines = [line for line in err.splitlines() if line.startswith("block")]
    assert len(lines) == 3
    assert re.fullmatch(r"block 2/3  \S+ s  worst error \S+ % in 1\.\S+  \d+ MB  \S+ left", lines[1])
    assert "Quantized 21 linears" in out and "tiny-gptq-int4-g32" in out and "bits per quantized weight" in out


def test_quantize_json_and_quiet(run: Run, place: Path, model: Path) -> None:
    status, out, err = run("quantize", model, "--method", "rtn", "--group-size", "32", "--out", "a", "--json")
    result = json.loads(out)
    assert (status, err) == (0, "") and result["out"] == "a" and len(result["layers"]) == 21
    assert run("quantize", model, "--method", "rtn", "--group-size", "32", "--out", "b", "--quiet") == (0, "", "")
    assert (place / "a" / "model.safetensors").read_bytes() == (place / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_so_and_goes_on(number: int, status: int, place: Path) -> None:
    model = tiny.make(place / "deep", "llama", num_hidden_layers=16)
    command = [sys.executable, "-m", "qtool", "quantize", str(model), "--group-size", "32", "--samples", "64",
               "--sequence-length", "128", "--out", str(place / "out")]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=settings) as process:
        assert process.stderr is not None
        while not (line := process.stderr.readline()).startswith("block"):
            assert line
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == status
    assert f"stopped by {signal.Signals(number).name}; finished blocks are kept" in rest and "Traceback" not in rest
    if number == signal.SIGTERM:
        return  # going on is the same for both
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    assert "going on with an unfinished run" in done.stderr


def test_unexpected_errors_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def broken(name: str) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("qtool.recipe.preset", broken)
    status, out, err = run("quantize", model)
    assert (status, out) == (1, "") and "this is a bug in qtool: KeyError: 'surprise'" in err
    assert "--traceback" in err and "Traceback" not in err
    status, _, err = run("quantize", model, "--traceback")
    assert status == 1 and "Traceback" in err and "in broken" in err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_out_of_memory_is_explained(error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def hungry(name: str) -> None:
        raise error

    monkeypatch.setattr("qtool.recipe.preset", hungry)
    status, _, err = run("quantize", model)
    assert status == 1 and err.startswith("error: out of memory") and "--samples" in err
