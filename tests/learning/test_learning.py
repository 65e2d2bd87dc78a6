"""The steps tune and distill on tiny models: what they promise of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import decode, flags, html_report, inspect, learned, manifest, recipe, redo
from qtool.checkpoint import open_checkpoint
from qtool.errors import PlanError
from qtool.learning import whole
from qtool.models import calibration
from qtool.recipe import Calibration
from tests import tiny
from tests.test_pipeline import Silent, contents, quantize

STEPS: dict[str, list[Any]] = {
    "tune": [{"gptq": {}}, {"tune": {"tokens": 128}}],
    "offset": [{"gptq": {}}, {"tune": {"tokens": 128, "rounding": "offset", "offset_rate": 0.05}}],
    "distill": [{"gptq": {}}, {"distill": {"tokens": 128, "epochs": 2, "rate": 0.003}}],
    "qat": [{"gptq": {}}, {"tune": {"tokens": 128, "rounding": "weights"}},
            {"distill": {"tokens": 128, "epochs": 3, "rounding": "weights", "weight_rate": 0.01, "patience": 12}}],
}
MORE = {"scheme__bits": 3, "scheme__group_size": 16, "calibration__samples": 24, "calibration__held_out": 0.25}


def run(model: Path, out: Path, what: str, **more: Any) -> dict[str, Any]:
    return quantize(model, out, **{"steps": STEPS[what], **MORE, **more})


def faults(out: Path) -> list[Any]:
    output = decode.open_model(str(out))
    return [*inspect.damage(str(out)), *inspect.verify(output, inspect.layers(output, manifest.load(out)))]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mixtral"])
def test_blocks_become_better_and_their_files_say_so(family: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", family)
    made = run(model, tmp_path / "out", "tune")
    notes = [layer["tuned"][0] for layer in made["layers"]]
    assert all(note["loss_after"] <= note["loss_before"] for note in notes)
    assert sum(note["kept_step"] > 0 for note in notes) > len(notes) / 2
    source, output = decode.open_model(str(model)), decode.open_model(str(tmp_path / "out"))
    gains = [name for name, spec in source.specs.items() if len(spec.shape) == 1 and ".layers." in name]
    assert any(not torch.equal(source.read(name), output.read(name)) for name in gains)
    assert all(source.specs[name] == output.specs[name] for name in gains)
    assert not faults(tmp_path / "out")


@pytest.mark.parametrize("what", sorted(STEPS))
def test_two_runs_are_equal_byte_for_byte(what: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    for out in ("a", "b"):
        run(model, tmp_path / out, what)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def divergence(model: Path, out: Path, made_by: dict[str, Any]) -> float:
    """Of the finished output from the original, on the held-out samples, by transformers' own forward pass."""
    spec = made_by["calibration"]
    ids = calibration.load_tokens(Calibration.model_validate(spec), model, spec["samples"], tiny.VOCABULARY).ids
    held = ids[len(ids) - round(spec["samples"] * spec["held_out"]):]
    logs = []
    for folder in (model, out):
        with torch.no_grad():
            logs.append(logits(decode.open_model(str(folder)), held))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def logits(source: decode.Source, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    state = {name: source.read(name).float() for name in source.specs}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model(ids).logits.log_softmax(-1)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("what", ["distill", "qat"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_files_have_the_divergence_that_learning_ended_with(family: str, what: str, tmp_path: Path) -> None:
    """Fake quantization and the real codes are one computation; measured by a program that shares none of it."""
    model = tiny.make(tmp_path / "model", family)
    made = run(model, tmp_path / "out", what)
    curve = made["learned"]["curve"]
    best = min(point["held_out"] for point in curve)
    assert best < curve[0]["held_out"] and made["learned"]["kept_step"] > 0
    assert divergence(model, tmp_path / "out", made["recipe"]) == pytest.approx(best, rel=2e-3)
    assert all(layer["relative_error"] is None and layer["weight_error"] > 0 for layer in made["layers"])
    assert not faults(tmp_path / "out")


def test_logits_of_some_tokens_at_a_time_are_those_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make(tmp_path / "model", "gemma2")
    curves = []
    for rows in (5, 1000):
        monkeypatch.setattr(whole, "LOGITS", rows)
        curve = run(model, tmp_path / str(rows), "distill")["learned"]["curve"]
        curves.append([value for point in curve for value in (point["fitting"] or 0.0, point["held_out"])])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.parametrize("method", ["aqlm", "lloyd4"])
def test_codebooks_learn_too(method: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", dtype=torch.float32)
    steps = [*(next(iter(step)) for step in recipe.preset(method).steps)]
    made = quantize(model, tmp_path / "out", method, scheme__group_size=recipe.preset(method).scheme.group_size,
                    steps=[*steps, {"tune": {"tokens": 128}}, {"distill": {"tokens": 128, "rate": 0.003}}],
                    calibration__samples=24, calibration__held_out=0.25)
    assert any(layer["tuned"][0]["kept_step"] > 0 for layer in made["layers"])
    best = min(point["held_out"] for point in made["learned"]["curve"])
    assert divergence(model, tmp_path / "out", made["recipe"]) == pytest.approx(best, rel=1e-4)
    assert not faults(tmp_path / "out")


@pytest.mark.parametrize("first", ["equalize", "awq", "rotate"])
def test_what_moves_weights_first_can_be_learned_on(first: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", dtype=torch.float32)
    made = run(model, tmp_path / "out", "distill",
               steps=[first, "asymmetric", "gptq", "refine", {"tune": {"tokens": 128}}, *STEPS["distill"][1:]])
    assert any(layer["tuned"][0]["kept_step"] > 0 for layer in made["layers"])
    curve = made["learned"]["curve"]
    best = min(point["held_out"] for point in curve)
    assert best < curve[0]["held_out"]
    assert divergence(model, tmp_path / "out", made["recipe"]) == pytest.approx(best, rel=1e-4)
    assert not faults(tmp_path / "out")


class Interrupted(Exception):  # noqa: N818
    pass


class StopsAt(Silent):
    def __init__(self, count: int) -> None:
        self.count = count

    def message(self, text: str) -> None:
        if text.startswith("step"):
            self.count -= 1
        if self.count == 0:
            raise Interrupted


@pytest.mark.parametrize("count", [1, 3])
def test_interrupted_learning_goes_on_to_the_same_bytes(count: int, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    run(model, tmp_path / "whole", "qat")
    with pytest.raises(Interrupted):
        quantize(model, tmp_path / "out", progress=StopsAt(count), steps=STEPS["qat"], **MORE)
    assert list((tmp_path / "out.partial").glob("distill-*.bin"))
    run(model, tmp_path / "out", "qat")
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_state_past_the_budget_lies_in_files_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    run(model, tmp_path / "memory", "qat")
    run(model, tmp_path / "files", "qat", memory_budget_gb=1e-5)
    ours, theirs = (contents(tmp_path / name)["model.safetensors"] for name in ("memory", "files"))
    assert ours == theirs


@pytest.mark.parametrize("changes, message", [
    ({"calibration__held_out": 0.0}, "held-out samples"),
    ({"steps": [{"tune": {}}, {"gptq": {}}]}, "come last"),
    ({"steps": [{"gptq": {}}, {"distill": {}}, {"tune": {}}]}, "come last"),
    ({"scheme__activations": "token", "scheme__group_size": -1, "scheme__bits": 8}, "are rounded when the model runs"),
    ({"keep_statistics": True}, "--keep-statistics"),
    ({"calibration__samples": 1}, "samples >= 2"),
    ({"scheme__grid": "nvfp4", "scheme__bits": 4, "steps": [{"rtn": {}}, {"tune": {"rounding": "weights"}}]},
     "cannot be learned"),
])
def test_what_cannot_be_learned_is_refused_by_the_plan(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match=message):
        quantize(model, tmp_path / "out", **{**MORE, "steps": STEPS["tune"], **changes})
    assert not (tmp_path / "out.partial").exists()



def test_a_redo_of_what_learned_together_is_refused(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    run(model, tmp_path / "out", "tune")
    with pytest.raises(PlanError, match="learned together"):
        redo.prepare(open_checkpoint(str(model)), tmp_path / "out", flags.Given(None, None, {}, []), ["*.1.*"], "cpu")


def test_inspect_and_the_page_tell_of_learning(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama")
    made = run(model, tmp_path / "out", "qat")
    summary = inspect.summary(decode.open_model(str(tmp_path / "out")))
    tuned, distilled = summary["learned"]["tuned"], summary["learned"]["distilled"]
    assert tuned["blocks"] == 3 and 0 < tuned["loss_ratio"] < 1 and distilled == made["learned"]
    told = learned.told_of(summary["learned"])
    assert len(told) == 2 and "3 blocks became better" in told[0] and "divergence on held-out text" in told[1]
    pytest.importorskip("vl_convert")
    page = html_report.page([html_report.Run(summary, inspect.layers(decode.open_model(str(tmp_path / "out")), made),
                                             made)]).decode()
    assert "<h2>Learning</h2>" in page and f"{distilled['curve'][0]['held_out']:.5g}" in page
