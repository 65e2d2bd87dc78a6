"""What a row says beside its figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qtool.evaluate import describe
from qtool.recipe import Scheme


def source(*schemes: Scheme) -> Any:
    return SimpleNamespace(schemes=dict(enumerate(schemes)), checkpoint=SimpleNamespace(block_types={}))


def row(name: str, size: int, kl: float | None = None, error: float = 0.001, **more: Any) -> dict[str, Any]:
    known = {} if kl is None else {"kl": {"mean": kl, "error": error}}
    return {"name": name, "weight_bytes": size, "format": "compressed-tensors", **known, **more}


@pytest.mark.parametrize(("schemes", "stored", "words"), [
    ([], None, "training"), ([Scheme()], "gptq", "few requests at once"), ([Scheme()], "mlx", "Apple silicon"),
    ([Scheme(bits=8, group_size=-1, activations="token")], "compressed-tensors", "multiply int8"),
    ([Scheme(grid="fp8", group_size=-1, activations="token")], "compressed-tensors", "FP8 units"),
    ([Scheme(grid="nf4", group_size=64)], "bitsandbytes", "QLoRA"),
    ([Scheme(grid="vectorwise_int8", bits=8, group_size=-1, activations="outliers")], "bitsandbytes", "calibration"),
])
def test_where_it_runs_well(schemes: list[Scheme], stored: str | None, words: str) -> None:
    said = describe.use_for(source(*schemes), row("one", 10, format=stored), [])
    assert words in said and ";" not in said  # nothing was measured against a base


@pytest.mark.parametrize(("kl", "words"), [(0.004, "hardly"), (0.02, "very close"), (0.0201, "close to"),
                                           (0.3, "visibly worse"), (3.0, "too far")])
def test_how_near_it_came(kl: float, words: str) -> None:
    assert words in describe.use_for(source(Scheme()), row("one", 10, kl), [])


def test_one_that_is_beaten_says_by_which() -> None:
    rows = [row("poor", 10, 0.3), row("better", 10, 0.2), row("best", 9, 0.1), row("large", 20, 0.001)]
    assert "best is no larger and closer" in describe.use_for(source(Scheme()), rows[0], rows)
    assert "no larger" not in describe.use_for(source(Scheme()), rows[2], rows)
    unsure = [row("poor", 10, 0.3, 0.1), row("better", 10, 0.2, 0.1)]  # within the errors
    assert "no larger" not in describe.use_for(source(Scheme()), unsure[0], unsure)


def test_labels_of_mixtures() -> None:
    def one(name: str, weights: int) -> dict[str, Any]:
        return {"scheme": name, "weights": weights}

    assert describe.label([]) == "" and describe.label([one("int4-g128", 5)]) == "int4-g128"
    assert describe.label([one("a", 1), one("b", 9), one("c", 5), one("d", 2)]) == "b + c + 2 more"
