"""The ops called without their wrappers, with wrong arguments: an error, never a crash. See raw_calls.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool import ops

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not ops.native_available(), reason="no compiled extension")
def test_wrong_arguments_are_an_error_and_never_a_crash() -> None:
    ended = subprocess.run([sys.executable, "-m", "tests.ops.raw_calls", "1", "2850"], cwd=ROOT, capture_output=True,
                           text=True, timeout=300)
    assert ended.returncode == 0, f"exit status {ended.returncode}; the last calls: {ended.stderr[-1500:]}"
    told = json.loads(ended.stdout)
    assert told["wrong"] == [] and told["calls"] == 2850
    assert 1500 < told["refused"] < 2600  # most are refused, and not all: the changes are not absurd


@pytest.mark.skipif(not ops.native_available(), reason="no compiled extension")
def test_inputs_that_are_not_numbers_stay_so_when_they_are_rounded() -> None:
    """The sums of codes of NaN and infinity ran over the ends of 32 bits."""
    from qtool.ops import packed

    weight = packed.pack_codes(torch.full((32, 64), 3, dtype=torch.uint8), torch.arange(-8.0, 8.0), torch.ones(32, 2))
    x = torch.ones(3, 64)
    x[0, 5], x[1, 40] = float("nan"), float("inf")
    product = torch.ops.qtool.multiply_packed(x, *weight.tensors, weight.kind, weight.rows, weight.group, True)
    assert not product[:2].isfinite().any() and product[2].isfinite().all()
