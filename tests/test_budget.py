"""Budgets: what is asked for is met and not exceeded, fused linears agree, and a killed search goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import inspect, manifest, pipeline, recipe, sensitivity
from qtool.checkpoint import open_checkpoint
from qtool.decode import open_model
from qtool.errors import PlanError
from qtool.plan import Plan, make_plan
from tests import tiny

SMALL = {"calibration.samples": 8, "calibration.sequence_length": 32, "calibration.batch_tokens": 128}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("budget") / "llama", "llama")


class Progress:
    """Keeps the messages; raises KeyboardInterrupt at the one that begins with `stop_at`."""

    def __init__(self, stop_at: str = "never") -> None:
        self.stop_at = stop_at
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)
        if text.startswith(self.stop_at):
            raise KeyboardInterrupt

    def start(self, blocks: int, done: int) -> None: ...
    def linear(self, name: str, error: float | None) -> None: ...
    def block(self, *details: Any) -> None: ...
    def finish(self) -> None: ...


def plan_of(model: Path, out: Path, budget: Any, method: str = "gptq-fast", **settings: Any) -> Plan:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    made = recipe.override(recipe.preset(method), {**SMALL, "budget": budget, **changes})
    return make_plan(open_checkpoint(str(model)), made, out, "cpu")


def run(model: Path, out: Path, budget: Any, progress: Any = None, **settings: Any) -> dict[str, Any]:
    plan = plan_of(model, out, budget, **settings)
    return pipeline.run(open_checkpoint(str(model)), plan, progress or Progress())


def schemes(result: dict[str, Any]) -> dict[str, str]:
    return {layer["name"]: recipe.scheme_label(layer["scheme"]) for layer in result["layers"]}


@pytest.mark.parametrize("budget", [2.6, 3.5, 4.25, 5.0, "170kB", "200 kB"])
def test_budget_is_met_and_not_exceeded(budget: float | str, llama: Path, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", budget, method="rtn")
    weights = result["totals"]["quantized_weights"]
    if isinstance(budget, float):
        used, limit = 8 * sum(layer["bytes"] for layer in result["layers"]) / weights, budget
    else:
        specs = open_checkpoint(str(tmp_path / "out")).specs
        used, limit = sum(spec.nbytes for spec in specs.values()), float(budget.removesuffix("kB")) * 1000
    assert 0.995 * limit <= used <= limit
    assert len(set(schemes(result).values())) > 1


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fused_linears_share_a_scheme(family: str, tmp_path: Path) -> None:
    result = run(tiny.make(tmp_path / "model", family), tmp_path / "out", 3.6)
    chosen = schemes(result)
    for block in range(2):
        prefix = f"model.layers.{block}."
        assert len({chosen[f"{prefix}self_attn.{name}_proj"] for name in "qkv"}) == 1
        if family == "llama":
            assert chosen[f"{prefix}mlp.gate_proj"] == chosen[f"{prefix}mlp.up_proj"]
        else:
            assert len({label for name, label in chosen.items() if name.startswith(f"{prefix}mlp.experts.")}) == 1
    assert len(set(chosen.values())) > 1


def test_same_input_gives_the_same_bytes_also_after_every_kind_of_interruption(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "whole", 3.5)
    out = tmp_path / "stopped"
    steps = ["search: forward through block 3 of 3", "search: the gradient of the output head",
             "search: the sensitivity of block 3 of 3", "search: the sensitivity of block 2 of 3",
             "search: the sensitivity of block 1 of 3", "naming and hashing the files"]
    for before, stop in zip([steps[0], *steps], steps, strict=False):
        progress = Progress(stop)
        with pytest.raises(KeyboardInterrupt):
            run(llama, out, 3.5, progress)
        if stop != steps[0]:  # what was done is not done again
            assert progress.messages == [before, stop]
    last = Progress()
    run(llama, out, 3.5, last)
    assert not [text for text in last.messages if text.startswith("search")]
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in out.iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes() for name in files)


def test_rules_win_and_count(llama: Path, tmp_path: Path) -> None:
    rules = [{"match": "*.layers.0.self_attn.*", "bits": 8, "group_size": 64},
             {"match": "*.layers.1.mlp.down_proj", "skip": True}]
    result = run(llama, tmp_path / "out", 4.0, rules=rules, method="rtn")
    chosen = schemes(result)
    assert {chosen[f"model.layers.0.self_attn.{name}_proj"] for name in "qkvo"} == {"int8-g64"}
    assert "model.layers.1.mlp.down_proj" not in chosen
    assert 0.995 * 4.0 <= result["totals"]["bits_per_weight"] <= 4.0


def test_listed_schemes_are_the_only_ones(llama: Path, tmp_path: Path) -> None:
    listed = [{"grid": "nvfp4", "group_size": 16}, {"grid": "fp8", "bits": 8, "group_size": -1}]
    result = run(llama, tmp_path / "out", {"bits": 6, "schemes": listed})
    assert set(schemes(result).values()) == {"nvfp4-g16", "fp8-channel"}


def test_manifest_and_inspect_tell_the_allocation(llama: Path, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", 3.5)
    told = manifest.load(tmp_path / "out")["allocation"]
    assert told == result["allocation"]
    assert told["bytes"] == sum(layer["bytes"] for layer in result["layers"]) <= told["limit_bytes"]
    chosen = schemes(result)
    assert {one["name"]: one["scheme"] for one in told["linears"]} == chosen
    assert told["loss"] == pytest.approx(sum(one["losses"][one["scheme"]] for one in told["linears"]), rel=1e-5)
    for one in told["linears"]:  # more bits, less loss
        bits = {label: int(label[3]) for label in one["losses"]}
        least, middle, most = (math.fsum(loss for label, loss in one["losses"].items() if bits[label] == width)
                               for width in (2, 3, 4))
        assert least > middle > most > 0
    source = open_model(str(tmp_path / "out"))
    assert inspect.summary(source)["allocation"] == {key: value for key, value in told.items() if key != "linears"}
    rows = inspect.layers(source, inspect.record_of(source))
    assert all(row["expected_kl"] == row["losses"][row["scheme_label"]] for row in rows)
    assert inspect.verify(source, rows) == []


def test_bits_go_where_the_loss_is(llama: Path, tmp_path: Path) -> None:
    """The expected loss of the allocation is less than that of every uniform scheme of no more bytes."""
    result = run(llama, tmp_path / "out", 3.51)
    plan = plan_of(llama, tmp_path / "other", 3.51)
    assert plan.problem is not None
    losses = {one["name"]: one["losses"] for one in result["allocation"]["linears"]}
    for label in ("int3-g32", "int3-g64"):
        assert result["allocation"]["loss"] < sum(one[label] for one in losses.values())


def test_expected_loss_is_the_measured_one_for_small_errors(llama: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """KL divergence of the whole model with one linear moved a little, against what the search says of that move."""
    from transformers import AutoModelForCausalLM

    from qtool.models import calibration

    def noise(one: Any) -> torch.Tensor:
        return torch.randn(one.shape, generator=torch.Generator().manual_seed(sum(one.name.encode()))) * 0.004

    def errors(plan: Plan, group: list[Any], *rest: Any) -> torch.Tensor:
        return torch.cat([noise(one) for one in group])

    monkeypatch.setattr(sensitivity, "_error", errors)
    many = {"calibration.samples": 64, "calibration.sequence_length": 64}
    plan = plan_of(llama, tmp_path / "out", {"bits": 4.0, "samples": 64}, **many)
    result = pipeline.run(open_checkpoint(str(llama)), plan, Progress())
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = calibration.load_tokens(plan.recipe.calibration, llama, 64, 512).ids
    ratios = {}
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        for one in plan.linears:
            weight = model.get_submodule(one.name).weight
            weight += noise(one)
            kl = float((before.exp() * (before - model(ids).logits.log_softmax(-1))).sum(-1).mean())
            weight -= noise(one)
            told = next(told for told in result["allocation"]["linears"] if told["name"] == one.name)
            ratios[one.name] = told["losses"][told["scheme"]] / kl
    assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios


BAD = [
    (1.1, {}, "1.1 bits cannot be met.*2.2465 to 3.5243 bits per quantized weight"),
    (12.5, {}, "12.5 bits cannot be met.*int8-g64.* to 8.2465 bits"),
    ("100kB", {}, "100 kB cannot be met.*takes 0.16. MB to 0.18. MB in all, 132 kB of it for what is not quantized"),
    ("1TB", {}, "cannot be met"),
    ({"bits": 4, "schemes": [{"bits": 4, "group_size": 64}] * 2}, {}, "budget.schemes has int4-g64 twice"),
    ({"bits": 4, "schemes": [{"bits": 4, "group_size": 48}]}, {}, "none of int4-g48 fits .*q_proj: group size 48"),
    ({"bits": 4, "schemes": [{"bits": 4, "group_size": 64}, {"bits": 5, "group_size": 64}]}, {},
     "int5-g64 fits no linear: .*5"),
    (4.0, {"rules": [{"match": "*_proj", "bits": 4, "group_size": 64}]}, "nothing to choose"),
    (4.0, {"method": "nf4"}, "list the schemes under budget.schemes"),
    (4.3, {"method": "awq", "format": "awq"}, "awq has one group size per checkpoint"),
]


@pytest.mark.parametrize(("budget", "settings", "message"), BAD)
def test_what_cannot_be_met_is_refused_while_planning(budget: Any, settings: dict[str, Any], message: str, llama: Path,
                                                      tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(llama, tmp_path / "out", budget, **settings)


def test_plan_tells_the_budget(llama: Path, tmp_path: Path) -> None:
    data = plan_of(llama, tmp_path / "out", 3.5, method="rtn").to_json()
    assert data["budget"]["schemes"] == ["int2-g128", "int2-g64", "int2-g32", "int3-g128", "int3-g64", "int3-g32",
                                         "int4-g128", "int4-g64", "int4-g32"]
    assert data["samples"] == data["budget"]["samples"] == 8
    assert 0.995 * 3.5 <= data["bits_per_weight"] <= 3.5
    assert data["budget"]["least_bits"] < 3.5 < data["budget"]["most_bits"]
    assert all(one["scheme"] is None for one in data["linears"])
