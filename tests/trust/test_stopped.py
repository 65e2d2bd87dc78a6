"""SIGINT and SIGTERM at any moment: a quick end with a message, nothing left locked, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.trust.helpers import ROOT, Case, Ended, Whole, Zygote, goes_on, uninterrupted

pytestmark = pytest.mark.trust
BOUND = 2.0  # seconds from the signal to the end
SMALL = ("--group-size", "32", "--samples", "16", "--sequence-length", "64")
KEPT = "finished blocks are kept, the same command goes on from there"
READY = "open({ready!r}, 'w').close()\n"
SLOW_HASHES = """
import time, types
from qtool import files
from qtool.checkpoint import tensor_io
class Slow:
    def update(self, data):
        open({ready!r}, 'w').close()
        time.sleep(0.05)
    def hexdigest(self):
        return 'of a part'
tensor_io.HASH_BYTES = 256
files.hashlib = types.SimpleNamespace(sha256=Slow)
"""
LAST_FILE = """
import os, time
replace = os.replace
def slow(source, target, **options):
    if str(target).endswith('manifest.json'):
        open({ready!r}, 'w').close()
        time.sleep(60)
    replace(source, target, **options)
os.replace = slow
"""
HUB = """
import time, huggingface_hub
from pathlib import Path
from huggingface_hub import constants
from huggingface_hub.utils import _http
from tests.checkpoint.test_hub import Remote, httpx
server = Remote(Path({remote!r}))
def answer(request):
    if request.method == 'GET' and 'range' not in request.headers and request.url.path.endswith({slow!r}):
        open({ready!r}, 'w').close()
        time.sleep(60)
    return server.answer(request)
constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = {cache!r}, False, True
huggingface_hub.set_client_factory(lambda: httpx.Client(
    transport=httpx.MockTransport(answer), event_hooks=dict(request=[_http.hf_request_event_hook]),
    follow_redirects=True))
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as forks:
        yield forks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return tiny.make(place / "tiny", "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def gptq(model: Path) -> Case:
    return Case(("quantize", str(model), *SMALL, "--out", "{out}"))


@pytest.fixture(scope="module")
def whole(gptq: Case, zygote: Zygote, place: Path) -> Whole:
    return uninterrupted(zygote, gptq, place / "whole")


def stopped(zygote: Zygote, words: list[str], folder: Path, number: int, seconds: float = 0.0, setup: str = READY,
            then: Callable[[int], None] = lambda pid: None, **values: str) -> Ended:
    """The end of a command that got a signal so long after it, or its setup, said that it is ready."""
    ready = folder / "ready"
    running = zygote.start(words, folder, setup.format(ready=str(ready), **values))
    if (ended := running.until(ready.exists)) is None:
        time.sleep(0.01 + seconds)  # main sets its handlers a moment after READY
        began = time.monotonic()
        running.send(number)
        then(running.pid)
        ended = running.wait()
        if ended.status != 0:
            assert time.monotonic() - began < BOUND
    assert ready.exists(), ended.said
    ready.unlink()
    return ended


def refuse_bad_end(ended: Ended, number: int, words: str = KEPT) -> None:
    assert ended.status == 128 + number, ended.said
    assert ended.said.rstrip().endswith(f"stopped: stopped by {signal.Signals(number).name}; {words}"), ended.said
    assert "Traceback" not in ended.said and "Error" not in ended.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_random_moments(number: int, gptq: Case, whole: Whole, zygote: Zygote, tmp_path: Path) -> None:
    """While planning, hashing, solving, naming."""
    draws, count = random.Random(int(number)), 0
    for _ in range(20):
        out = gptq.place(tmp_path)
        ended = stopped(zygote, gptq.at(out), tmp_path, number, draws.random() * 1.5 * whole.seconds)
        if ended.status != 0:
            refuse_bad_end(ended, number)
            lock = tmp_path / "out.partial" / "lock"
            assert not lock.exists() or lock.read_bytes() == b""
            count += 1
        goes_on(zygote, gptq, tmp_path, whole, ended)
        if count == 8:
            return
    raise AssertionError(f"only {count} signals fell into the work")


def test_a_second_signal_on_the_way_out(gptq: Case, whole: Whole, zygote: Zygote, tmp_path: Path) -> None:
    draws, statuses = random.Random(2), []
    for _ in range(8):
        def again(pid: int) -> None:
            time.sleep(draws.random() * 0.004)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)

        out = gptq.place(tmp_path)
        ended = stopped(zygote, gptq.at(out), tmp_path, signal.SIGINT, draws.random() * whole.seconds, then=again)
        statuses.append(ended.status)
        goes_on(zygote, gptq, tmp_path, whole, ended)
    assert set(statuses) <= {0, 130, -signal.SIGTERM} and set(statuses) != {0}


def test_while_hashing(gptq: Case, whole: Whole, zygote: Zygote, tmp_path: Path) -> None:
    """The threads that hash do not finish their files first."""
    ended = stopped(zygote, gptq.at(gptq.place(tmp_path)), tmp_path, signal.SIGINT, setup=SLOW_HASHES)
    refuse_bad_end(ended, signal.SIGINT)
    assert not list(tmp_path.iterdir())
    goes_on(zygote, gptq, tmp_path, whole, ended)


def test_while_the_last_file_is_written(gptq: Case, whole: Whole, zygote: Zygote, tmp_path: Path) -> None:
    ended = stopped(zygote, gptq.at(gptq.place(tmp_path)), tmp_path, signal.SIGTERM, setup=LAST_FILE)
    refuse_bad_end(ended, signal.SIGTERM)
    goes_on(zygote, gptq, tmp_path, whole, ended)


@pytest.mark.parametrize(("slow", "method"), [("config.json", "rtn"), ("1-of-00002.safetensors", "rtn"),
                                              ("2-of-00002.safetensors", "gptq")])
def test_while_downloading(slow: str, method: str, model: Path, zygote: Zygote, tmp_path: Path) -> None:
    """While planning; of weights, in the thread that waits for them; of weights, in the one that reads ahead."""
    remote, names = tmp_path / "remote", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    remote.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (remote / name).write_bytes((model / name).read_bytes())
    tensors = load_file(model / "model.safetensors")
    parts: list[dict[str, object]] = [{}, {}]
    for name, tensor in tensors.items():
        parts[".layers.2." in name or ".layers.3." in name][name] = tensor
    for name, part in zip(names, parts, strict=True):
        save_file(part, remote / name, {"format": "pt"})
    index = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    (remote / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    words = ["quantize", "org/name", "--method", method, *(SMALL if method == "gptq" else SMALL[:2]), "--out", "out"]
    ended = stopped(zygote, words, tmp_path, signal.SIGINT, setup=HUB, remote=str(remote), slow=slow,
                    cache=str(tmp_path / "cache"))
    refuse_bad_end(ended, signal.SIGINT)


@pytest.mark.parametrize(("number", "words", "said"), [
    (signal.SIGINT, ["export", "{whole}", "--to", "gptq", "--out", "x"], "what was written is kept, the same command "
                                                                         "goes on from there"),
    (signal.SIGTERM, ["eval", "{whole}", "--against", "{model}", "--windows", "8", "--context", "64", "--cache", "c"],
     "the same command starts again, with what the cache has of the original")])
def test_other_commands(number: int, words: list[str], said: str, model: Path, zygote: Zygote, gptq: Case,
                        whole: Whole, tmp_path: Path) -> None:
    out = gptq.place(tmp_path)
    assert zygote.run(gptq.at(out), tmp_path).status == 0
    words = [word.format(whole=out, model=model) for word in words]
    refuse_bad_end(stopped(zygote, words, tmp_path, number), number, said)
    assert zygote.run(words, tmp_path).status == 0


def catches(pid: int, number: int) -> bool:
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("seconds", [0.0, 0.4, 1.2])
def test_while_importing(seconds: float, gptq: Case, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qtool", *gptq.at(tmp_path / "out")]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as process:
        assert process.stderr is not None
        while not catches(process.pid, signal.SIGTERM):
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        refuse_bad_end(Ended(process.wait(), process.stderr.read(), 0.0), signal.SIGINT)
