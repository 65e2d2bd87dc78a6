"""What a run finds in its directory: a journal cut short, files that are missing, too short or foreign, a lost name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qtool
from qtool import export, journal, manifest, redo, redoing, resuming, workspace
from qtool.errors import OutputError
from qtool.workspace import Workspace
from tests import tiny
from tests.test_pipeline import Silent, contents, quantize

Change = Callable[[Path], Any]
DAMAGED = "journal.jsonl is damaged: a line is not as it was written; --restart discards"


class Interrupted(Silent):
    """After the first block."""

    def block(self, *details: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what becomes of it, and a run of it that was stopped after its first block."""
    place = tmp_path_factory.mktemp("workspace")
    tiny.make(place / "tiny", "llama", num_hidden_layers=2)
    quantize(place / "tiny", place / "whole", shard_gb=1e-4)
    with pytest.raises(KeyboardInterrupt):
        quantize(place / "tiny", place / "out", shard_gb=1e-4, progress=Interrupted())
    return place


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "out.partial", tmp_path / "out.partial")
    return tmp_path / "out"


def go_on(place: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return quantize(place / "tiny", out, shard_gb=1e-4, **settings)


def append(text: bytes) -> Change:
    def change(folder: Path) -> None:
        with (folder / "journal.jsonl").open("ab") as file:
            file.write(text)

    return change


def cut(name: str) -> Change:
    def change(folder: Path) -> None:
        path = next(folder.glob(name))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)

    return change


def test_a_line_that_was_cut_short_is_left_out(place: Path, out: Path) -> None:
    append(b'{"stage": "block 1", "layers": [{"na')(out.with_name("out.partial"))
    go_on(place, out)
    assert contents(out) == contents(place / "whole")


@pytest.mark.parametrize(("change", "words"), [
    (append(b"{]\n"), DAMAGED),
    (append(b'{"layers": []}\n'), DAMAGED),
    (append(b"[1]\n"), DAMAGED),
    (append(b"\xff\n"), DAMAGED),
    (lambda folder: (folder / "journal.jsonl").write_text("[]\n"), DAMAGED),
    (lambda folder: next(folder.glob("*.safetensors.part")).unlink(),
     r"model-00001.*part: is missing, and with it tensors that were finished; --restart"),
    (cut("*.safetensors.part"), r"model-0000.*part: holds other tensors than this run writes; use --restart"),
    (cut("stream-*"), "stream-.*these saved activations are damaged or belong to another run; start over with --rest"),
    (lambda folder: next(folder.glob("stream-*")).unlink(), "stream-.*cannot be read.*--restart"),
    (lambda folder: (folder / "model-extra.safetensors").write_text("x"),
     r"model-extra.safetensors was not written by this run and would become a part of .*out; move it elsewhere"),
    (lambda folder: (folder / "notes").mkdir(), "notes was not written by this run"),
])
def test_what_cannot_be_continued(change: Change, words: str, place: Path, out: Path) -> None:
    """Refused with a reason, never taken up; --restart always works."""
    change(out.with_name("out.partial"))
    with pytest.raises(OutputError, match=words):
        go_on(place, out)
    assert not out.exists()
    go_on(place, out, restart=True)
    assert contents(out) == contents(place / "whole") and list(out.parent.iterdir()) == [out]


def test_a_foreign_file_costs_nothing_once_it_is_gone(place: Path, out: Path) -> None:
    foreign = out.with_name("out.partial") / ".DS_Store"
    foreign.write_text("x")
    with pytest.raises(OutputError, match="DS_Store was not written"):
        go_on(place, out)
    foreign.unlink()
    progress = Silent()
    go_on(place, out, progress=progress)
    assert progress.done == 2 and contents(out) == contents(place / "whole")


@pytest.mark.parametrize(("settings", "field"), [
    ({"scheme__bits": 3}, "recipe.scheme.bits: 4 -> 3"), ({"seed": 7}, "recipe.seed: 0 -> 7"),
    ({"calibration__samples": 16}, "calibration.samples: 12 -> 16"),
    ({"calibration__source": "builtin:evaluation"}, "calibration.sha256"),
    ({"steps__gptq__damping": 0.1}, r"recipe.steps: "),
])
def test_another_run_is_refused_field_by_field(settings: dict[str, Any], field: str, place: Path, out: Path) -> None:
    before = contents(out.with_name("out.partial"))
    with pytest.raises(OutputError, match=rf"unfinished run of something else:(.|\n)*  {field}(.|\n)*--restart"):
        go_on(place, out, **settings)
    assert contents(out.with_name("out.partial")) == before


def test_another_version_is_refused(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtool, "__version__", "9.9")
    with pytest.raises(OutputError, match=r"  qtool: \S+ -> \"9.9\"\nGive the same command"):
        go_on(place, out)


def test_one_byte_of_the_model_is_another_model_and_another_place_is_not(place: Path, out: Path) -> None:
    moved = out.parent / "else" / "where" / "tiny"
    shutil.copytree(place / "tiny", moved)
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    with pytest.raises(OutputError, match=r"else:\n  source.files.model.safetensors: .*\nGive"):
        quantize(moved, out, shard_gb=1e-4)
    shutil.copyfile(place / "tiny" / "model.safetensors", moved / "model.safetensors")
    progress = Silent()
    quantize(moved, out, shard_gb=1e-4, progress=progress)
    assert progress.done == 1 and contents(out) == contents(place / "whole")


def test_a_folder_that_lacks_its_name_gets_it(place: Path, tmp_path: Path) -> None:
    """Killed between the end of the journal and the rename; for a command that wants something else there too."""
    for settings in ({}, {"scheme__bits": 3}):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(place / "whole", tmp_path / "out.partial")
        if settings:
            with pytest.raises(OutputError, match="not hold what this command makes:\n  recipe.scheme.bits: 4 -> 3"):
                go_on(place, tmp_path / "out", **settings)
        else:
            assert go_on(place, tmp_path / "out") == manifest.load(tmp_path / "out")
        assert contents(tmp_path / "out") == contents(place / "whole")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_discarded_run_is_never_taken_for_a_finished_one(place: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """--restart, killed after each removal: the journal goes last."""
    stopped, real = 0, Path.unlink
    for count in range(1, 12):
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        shutil.copytree(place / "whole", tmp_path / "out.partial")
        (tmp_path / "out.partial" / "journal.jsonl").write_bytes(journal.line({"identity": {}}))
        left = [count]

        def unlink(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            real(path, missing_ok)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink)
            Workspace(tmp_path / "out", {}, restart=True).__enter__().__exit__(None, None, None)
        stopped += not left[0]
        workspace.recover(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert stopped > 5


def test_an_output_that_is_finished_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, between the look at its place and the lock."""
    out, real = tmp_path / "out", workspace.lock.hold

    def hold(path: Path) -> Any:
        out.mkdir()
        (out / "file").touch()
        return real(path)

    monkeypatch.setattr(workspace.lock, "hold", hold)
    with pytest.raises(OutputError, match="exists and is not empty"), Workspace(out, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", ["gptq", "hf"])
def test_an_export_goes_on_within_the_weights(to: str, place: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.decode import open_model

    written: list[str] = []
    real = export.ShardWriter.write

    def write(self: Any, name: str, tensor: Any) -> None:
        written.append(name)
        if len(written) == 10:
            raise KeyboardInterrupt
        real(self, name, tensor)

    monkeypatch.setattr(resuming, "RECORDED", 1)
    monkeypatch.setattr(export.ShardWriter, "write", write)
    source = open_model(str(place / "whole"))
    with pytest.raises(KeyboardInterrupt):
        export.run(export.make_export(source, to, tmp_path / "a"))
    tensors = json.loads((tmp_path / "a.partial" / "journal.jsonl").read_text().splitlines()[-1])["count"]
    export.run(export.make_export(source, to, tmp_path / "a"))
    assert tensors >= 3 and 0 < len(set(written[:9]) & set(written[10:])) < 9 or to == "hf"
    export.run(export.make_export(source, to, tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_second_command_is_refused_at_once(place: Path, tmp_path: Path) -> None:
    """Whatever it is, with the owner's name and since when."""
    from qtool.checkpoint import open_checkpoint
    from qtool.decode import open_model
    from tests.test_redo import given

    shutil.copytree(place / "whole", tmp_path / "out")
    source = open_model(str(place / "whole"))
    model = open_checkpoint(str(place / "tiny"))
    asked = redo.prepare(model, tmp_path / "out", given(scheme__bits=8), ["*.0.*"], "cpu")
    commands: dict[str, Callable[[], Any]] = {
        "new": lambda: go_on(place, tmp_path / "new"), "out.redo": lambda: redoing.run(asked, Silent()),
        "exported": lambda: export.run(export.make_export(source, "gptq", tmp_path / "exported"))}
    for name, command in commands.items():
        folder = tmp_path / f"{name}.partial"
        folder.mkdir()
        with workspace.lock.hold(folder / "lock"):
            began = time.monotonic()
            with pytest.raises(OutputError, match=rf"{name}.partial is in use by process {os.getpid()} on .* since 20"):
                command()
            assert time.monotonic() - began < 5
        command()
        assert not folder.exists()
