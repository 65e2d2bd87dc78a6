"""What the bytes of a calibrated run depend on beside its inputs: noted, taken up again, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import arithmetic, pipeline, prepare, recipe, workspace
from qtool.checkpoint import open_checkpoint
from qtool.errors import OutputError
from qtool.plan import make_plan
from tests import tiny
from tests.test_pipeline import SMALL, Silent, contents, quantize


@pytest.fixture
def one_thread_again() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


class Interrupted(Silent):
    """Stops after the first block."""

    def block(self, *details: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The folder of a model and of its output, which one thread has begun."""
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", progress=Interrupted())
    return tmp_path


@pytest.mark.usefixtures("one_thread_again")
def test_a_run_goes_on_with_the_threads_that_it_began_with(unfinished: Path) -> None:
    whole = quantize(unfinished / "model", unfinished / "whole")
    assert whole["arithmetic"] == {"threads": 1, "instructions": torch.backends.cpu.get_cpu_capability()}
    torch.set_num_threads(3)
    told = arithmetic.resume(unfinished / "out")
    assert told is not None and "began with 1 thread, so it goes on with as many and not with 3" in told
    assert torch.get_num_threads() == 1 and arithmetic.resume(unfinished / "out") is None
    torch.set_num_threads(3)
    quantize(unfinished / "model", unfinished / "out")
    assert contents(unfinished / "out") == contents(unfinished / "whole")


@pytest.mark.usefixtures("one_thread_again")
def test_restart_takes_the_threads_of_now(unfinished: Path) -> None:
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        quantize(unfinished / "model", unfinished / "out", restart=True, progress=Interrupted())
    identity = workspace.unfinished(unfinished / "out")
    assert torch.get_num_threads() == 2 and identity is not None and identity["arithmetic"]["threads"] == 2


def test_other_instructions_are_refused_and_named(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80")
    with pytest.raises(OutputError, match=r'arithmetic.instructions: ".*" -> "Z80"(.|\n)*--restart'):
        quantize(unfinished / "model", unfinished / "out")


@pytest.mark.usefixtures("one_thread_again")
def test_a_finished_output_is_finished_on_any_machine(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=1)
    quantize(model, tmp_path / "out")
    assert quantize(model, tmp_path / "rtn", "rtn")["arithmetic"] is None
    torch.set_num_threads(2)
    checkpoint = open_checkpoint(str(model))
    plan = make_plan(checkpoint, recipe.override(recipe.preset("gptq"), SMALL), tmp_path / "out", "cpu")
    assert prepare.dry_run(checkpoint, plan)["output"]["state"] == "finished"
    before = contents(tmp_path / "out")
    assert pipeline.run(checkpoint, plan, Silent())["arithmetic"]["threads"] == 1  # it is there already
    assert contents(tmp_path / "out") == before
