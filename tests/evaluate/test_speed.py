"""The figures of a timed generation: what they say of a clock that is known, and of models of few positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool import decode
from qtool.errors import InputError
from qtool.evaluate import speed
from tests import tiny

CPU = torch.device("cpu")


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = decode.open_model(str(tiny.make(tmp_path, "llama")))
    monkeypatch.setattr(speed, "timed", lambda generate, ids, new: (0.5, 2.0) if (len(ids), new) == (20, 5) else None)
    figures = speed.measure(source, CPU, prompt_tokens=20, new_tokens=5)
    assert figures["prompt_tokens_per_s"] == 40 and figures["tokens_per_s"] == 2 and figures["first_token_s"] == 0.5
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (20, 5)


def test_a_real_clock(tmp_path: Path) -> None:
    figures = speed.measure(decode.open_model(str(tiny.make(tmp_path, "llama"))), CPU)  # 256 positions, not 576
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (192, 64)
    assert 0 < figures["first_token_s"] < 60
    assert figures["prompt_tokens_per_s"] == pytest.approx(192 / figures["first_token_s"])
    assert figures["kernels"] == "native" and figures["reason"] is None


def test_a_family_without_a_native_step(tmp_path: Path) -> None:
    figures = speed.measure(decode.open_model(str(tiny.make(tmp_path, "gemma2"))), CPU, 12, 3)
    assert figures["kernels"] == "transformers" and "norms around both parts" in figures["reason"]
    assert figures["tokens_per_s"] > 0


@pytest.mark.parametrize("prompt, new", [(0, 4), (4, 1), (-1, 8)])
def test_too_few(tmp_path: Path, prompt: int, new: int) -> None:
    with pytest.raises(InputError, match="at least 1 and 2"):
        speed.measure(decode.open_model(str(tiny.make(tmp_path, "llama"))), CPU, prompt, new)
