"""The plain prediction of a run's time: small trials, multiplied by counts of its work."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool import duration, recipe, trials
from qtool.checkpoint import open_checkpoint
from qtool.plan import Plan, make_plan
from tests import tiny
from tests.test_pipeline import SMALL

ROW, TOKEN, GRAM, SCALES = 1e-3, 1e-2, 1e-4, 7.0  # seconds that the trials are made to find


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("duration") / "model", "llama", hidden_size=64, num_hidden_layers=2)


def planned(model: Path, out: Path, method: str = "gptq", samples: int = 12) -> Plan:
    made = recipe.override(recipe.preset(method), {**SMALL, "calibration.samples": samples})
    return make_plan(open_checkpoint(str(model)), made, out, "cpu")


@pytest.fixture
def constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "token_pass", lambda *_: TOKEN)
    monkeypatch.setattr(trials, "gram", lambda columns: GRAM * columns)
    monkeypatch.setattr(trials, "scaling", lambda *_: SCALES)
    monkeypatch.setattr(trials, "solving", lambda *_: trials.Solving(0.5, ROW))
    monkeypatch.setattr(duration, "DISK_RATE", 1e18)


@pytest.mark.parametrize("samples", [8, 32])
def test_text_and_rows_are_counted(samples: int, constant: None, model: Path, tmp_path: Path) -> None:
    """Two blocks: q, k, v (128 rows), o (64), gate and up (256) of 64 columns, down (64) of 128."""
    plan = planned(model, tmp_path / "out", "gptq-fast", samples)
    tokens, solving = samples * 32, 4 * 0.5 + ROW * (128 + 64 + 256 + 64)
    once = 2 * (tokens * (TOKEN + GRAM * (3 * 64 + 128)) + solving)
    assert duration.calibrated(plan) == pytest.approx(once)
    plan = planned(model, tmp_path / "out", "gptq", samples)
    share = plan.float_share
    added_to = 2 * share * GRAM * (64 + 64)  # of o and down, with 64 rows each
    twice = 2 * (tokens * (TOKEN * (1 + share) + GRAM * (1 + 2 * share) * (3 * 64 + 128) + added_to) + solving)
    assert duration.calibrated(plan) == pytest.approx(twice)
    plan = planned(model, tmp_path / "out", "equalize+gptq", samples)
    surveyed = 2 * (tokens * (TOKEN + GRAM * (3 * 64 + 128)) + 4 * SCALES)
    assert duration.calibrated(plan) == pytest.approx(twice + surveyed)
    plan = planned(model, tmp_path / "out", "awq", samples)
    assert duration.calibrated(plan) == pytest.approx(once + 2 * (tokens * TOKEN + 4 * SCALES))


def test_each_kind_is_tried_once(constant: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, bool]] = []
    monkeypatch.setattr(trials, "solving",
                        lambda _, one, tail: tried.append((one.shape[1], tail)) or trials.Solving(1.0, 0.0))
    duration.calibrated(planned(model, tmp_path / "out", "gptq-fast"))
    assert tried == [(64, False), (128, False)]
    tried.clear()
    duration.calibrated(planned(model, tmp_path / "out", "nf4-gptq"))  # whose linears are solved one by one
    assert tried == [(64, False), (64, True), (128, True)]


@pytest.mark.parametrize("method", ["gptq", "awq", "equalize+gptq", "rtn"])
def test_trials_of_a_real_plan(method: str, model: Path, tmp_path: Path) -> None:
    plan = planned(model, tmp_path / "out", method)
    assert 0 < duration.seconds(plan) < 60


def test_long_inputs_are_cut_and_scaled(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(model, tmp_path / "out", "gptq-fast")
    monkeypatch.setattr(trials, "_by_rows", lambda call: call(32) or trials.Solving(1.0, 0.25))
    down = next(one for one in plan.linears if one.shape[1] == 128)
    assert trials.solving(plan, down) == trials.Solving(1.0, 0.25)
    monkeypatch.setattr(trials, "COLUMNS", 32)
    assert trials.solving(plan, down, True) == trials.Solving(4.0**3, 0.25 * 4**2)
    equalized = planned(model, tmp_path / "out", "equalize+gptq")
    assert trials.scaling(equalized, [down], 0.0) == 4.0**3 + 0.25 * 64 * 4  # one factor of H, and 64 rows
    monkeypatch.setattr(trials, "PASS_BYTES", 1)
    assert trials.token_pass(plan, plan.stages[1]) is None
