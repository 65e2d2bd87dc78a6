"""`qtool inspect OUT --verify` after one bit of one file was flipped: exit status 3, and the file is named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool import manifest
from qtool.inspect import damage
from tests import tiny
from tests.cli.conftest import Run, make
from tests.cli.conftest import run as run  # the fixture

pytestmark = pytest.mark.trust
FLIPS = 8  # of each file
MADE = {
    "compressed-tensors": ["--method", "rtn", "--group-size", "32", "--set", "shard_gb=0.0001"],
    "gptq": ["--method", "rtn", "--group-size", "32", "--format", "gptq"],
    "mlx": ["--method", "rtn", "--group-size", "32", "--format", "mlx", "--asymmetric"],
    "modelopt": ["--method", "nvfp4", "--format", "modelopt"],
    "gguf": ["--method", "q4_0", "--set", "steps=[rtn]"],
}
EXPORTED = {"onnx": ["--to", "onnx"], "awq": ["--to", "awq", "--requantize", "uint4-g32"],
            "alone.gguf": ["--to", "gguf", "--type", "q4_0"]}
Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The outputs of tiny models, by name."""
    folder = tmp_path_factory.mktemp("flips")
    source = tiny.make(folder / "model", "llama", num_hidden_layers=1)
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")

    def get(name: str) -> Path:
        out = folder / name
        if not out.exists():
            command = ["quantize", source, *MADE[name]] if name in MADE else ["export", get("gptq"), *EXPORTED[name]]
            make(*command, "--out", out, "--quiet")
        return out
    return get


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*MADE, *EXPORTED])
def test_every_flipped_bit_is_found(name: str, written: Get, run: Run, tmp_path: Path) -> None:
    whole, draw = written(name), random.Random(name)
    copy = tmp_path / name
    shutil.copytree(whole, copy) if whole.is_dir() else shutil.copy(whole, copy)
    assert run("inspect", copy, "--verify")[0] == 0
    files = sorted(path for path in copy.iterdir() if path.is_file()) if whole.is_dir() else [copy]
    for path in files:
        content = path.read_bytes()
        for count in range(FLIPS * (1 if whole.is_dir() else 4)):
            place, bit = draw.randrange(min(len(content), 2000) if count % 2 else len(content)), draw.randrange(8)
            flip(path, place, bit)
            status, out, err = run("inspect", copy, "--verify", "--json")
            assert status == 3, (path.name, place, bit, status, out, err)
            assert str(path) in json.loads(out)["problems"][0], (path.name, place, bit, out)
            path.write_bytes(content)


def test_every_bit_of_a_manifest_counts(written: Get, tmp_path: Path) -> None:
    """Also where the JSON stays valid, and where it stays the same."""
    shutil.copytree(written("gptq"), tmp_path / "out")
    path, draw = tmp_path / "out" / manifest.NAME, random.Random(0)
    content, bit = path.read_bytes(), 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        assert manifest.wrong_seal(path.parent), (place, bit)
    path.write_bytes(content.replace(b"\n ", b"\n  "))
    assert manifest.wrong_seal(path.parent)
    path.write_bytes(content)
    assert manifest.wrong_seal(path.parent) is None


def test_every_byte_of_a_gguf_file_alone_counts(written: Get, tmp_path: Path) -> None:
    path, draw = tmp_path / "a.gguf", random.Random(0)
    shutil.copy(written("alone.gguf"), path)
    content = path.read_bytes()
    assert damage(str(path)) == []
    header = content.index(b"qtool.sealed") - 40  # both keys of the seal, byte for byte; the rest by chance
    places = [*range(header, header + 200), *(draw.randrange(len(content)) for _ in range(300))]
    for place in places:
        flip(path, place, draw.randrange(8))
        assert damage(str(path)), place
        path.write_bytes(content)
