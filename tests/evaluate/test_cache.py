"""What is kept of the base: used when everything is the same, made again when a file is damaged or anything differs."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.decode import open_model
from qtool.evaluate import evaluate
from tests import tiny

TEXT = "".join(f"Line {index}: the value is {index * index % 97}, and so on.\n" for index in range(200))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    tiny.make(folder / "base", "llama", num_hidden_layers=2)
    tiny.make(folder / "model", "llama", seed=1, num_hidden_layers=2)
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(made: Path, kept: Path | None, base: str = "base", **options: Any) -> dict[str, Any]:
    settings = {"windows": 2, "context": 32, **options}
    return evaluate([open_model(str(made / "model"))], open_model(str(made / base)), str(made / "text.txt"),
                    kept_in=kept, **settings)


def used(result: dict[str, Any]) -> bool:
    return bool(result["against"].pop("from_cache"))


def test_the_second_time_the_base_does_not_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [run(made, None), run(made, tmp_path), run(made, tmp_path)]
    assert [used(result) for result in results] == [False, False, True]
    assert results[0] == results[1] == results[2]
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].suffix == ".safetensors"
    with safe_open(files[0], "pt") as opened:
        exits = opened.get_tensor("exits")
    assert exits.shape == (2, 32, 64) and exits.dtype == torch.float32


def test_streamed_and_resident_share_what_is_kept(made: Path, tmp_path: Path) -> None:
    first, second = run(made, tmp_path, stream=True), run(made, tmp_path, stream=False)
    assert not used(first) and used(second)
    assert first["against"] == second["against"] and first["models"][0]["kl"] == second["models"][0]["kl"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "no JSON", "longer"])
def test_a_damaged_file_is_made_again(damage: str, made: Path, tmp_path: Path) -> None:
    whole = run(made, tmp_path)
    path = next(tmp_path.iterdir())
    data = path.read_bytes()
    bad = {"cut": data[:-100], "empty": b"", "no JSON": data[:8] + b"x" * (len(data) - 8), "longer": data + b"0000",
           "flip": data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]}[damage]
    path.write_bytes(bad)
    again = run(made, tmp_path)
    assert not used(again) and not used(whole) and again == whole
    assert path.read_bytes() == data and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["weights", "text", "context", "windows"])
def test_anything_else_is_another_entry(change: str, made: Path, tmp_path: Path) -> None:
    assert not used(run(made, tmp_path))
    if change == "weights":
        other = tmp_path.with_name(tmp_path.name + "-other")
        shutil.copytree(made / "base", other)
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"][0] *= 2
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        result = run(made, tmp_path, base=str(other))
    elif change == "text":
        (made / "other.txt").write_text(TEXT.replace("value", "number"))
        result = evaluate([open_model(str(made / "model"))], open_model(str(made / "base")), str(made / "other.txt"),
                          windows=2, context=32, kept_in=tmp_path)
    else:
        result = run(made, tmp_path, **{change: {"context": 40, "windows": 3}[change]})
    assert not used(result) and len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_a_note(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(made, tmp_path / "file")
    assert len(result["notes"]) == 1 and f"the base's part is not kept: {tmp_path}" in result["notes"][0]
    assert result["models"] == run(made, None)["models"]


def test_a_killed_write_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(made: Path, tmp_path: Path) -> None:
    for name in ("dead", "living", "new"):
        (tmp_path / f"{name}.part").write_text("" if name == "new" else "x")
    with (tmp_path / "living.part").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run(made, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.part")) == ["living.part", "new.part"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
