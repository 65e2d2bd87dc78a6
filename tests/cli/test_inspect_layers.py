"""inspect --layers, --sort, --against: figures against ones computed here from the files and with transformers."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qtool import decode, manifest
from qtool.inspect import ordering, outputs, statistics
from qtool.models import calibration
from qtool.recipe import Calibration
from tests import tiny
from tests.cli.conftest import Run, make


def layers_of(run: Run, *words: object) -> list[dict[str, Any]]:
    status, out, err = run("inspect", *words, "--json")
    assert status == 0, err
    rows: list[dict[str, Any]] = json.loads(out)["layers"]
    return rows


def test_statistics_are_those_of_the_decoded_weights(run: Run, gptq: Path) -> None:
    source = decode.open_model(str(gptq))
    for row in layers_of(run, gptq, "--layers"):
        weight = source.decoded(row["stored"]).double().flatten()
        centred = weight - weight.mean()
        assert row["absmax"] == pytest.approx(float(weight.abs().max()), rel=1e-5)
        assert row["std"] == pytest.approx(float(weight.std(unbiased=False)), rel=1e-5)
        assert row["kurtosis"] == pytest.approx(float((centred**4).mean() / weight.var(unbiased=False)**2), rel=1e-4)
        assert row["zeros"] == pytest.approx(float((weight == 0).double().mean()), abs=1e-6)
        assert row["damping"] > 0 and row["pooled"] is False


@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([1, 7, 1 << 22]))
@settings(max_examples=25, deadline=None)
def test_statistics_do_not_depend_on_the_pieces(seed: int, count: int, piece: int) -> None:
    weight = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    whole = statistics.describe(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "ELEMENTS", piece)
        assert statistics.describe(weight) == pytest.approx(whole, rel=1e-4)


def test_a_constant_has_no_kurtosis() -> None:
    assert statistics.describe(torch.zeros(4, 4)) == {"absmax": 0.0, "std": 0.0, "kurtosis": None, "zeros": 1.0}


def test_headers_only_reads_no_weights(run: Run, gptq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(decode.Source, "decoded", refuse)
    rows = layers_of(run, gptq, "--layers", "--headers-only")
    assert len(rows) == 21 and "kurtosis" not in rows[0]


def test_sort_and_top_are_the_same_in_all_forms(run: Run, gptq: Path) -> None:
    every = layers_of(run, gptq, "--layers")
    worst = sorted(every, key=lambda row: -row["relative_error"])[:4]
    rows = layers_of(run, gptq, "--sort", "error", "--top", "4")
    assert [row["name"] for row in rows] == [row["name"] for row in worst]
    text = run("inspect", gptq, "--sort", "error", "--top", "4", "--csv")[1]
    assert [row["name"] for row in csv.DictReader(io.StringIO(text))] == [row["name"] for row in worst]
    table = run("inspect", gptq, "--sort", "error", "--top", "4")[1]
    shown = [line.split()[0] for line in table.splitlines() if "_proj" in line and "int4" in line]
    assert shown == [row["name"].removeprefix("model.layers.") for row in worst]


def test_order_of_a_column() -> None:
    rows = [{"name": "b", "sqnr_db": 20.0, "bytes": 1}, {"name": "a", "sqnr_db": None, "bytes": 3},
            {"name": "c", "sqnr_db": 10.0, "bytes": 2}]

    def by(key: str) -> str:
        return "".join(row["name"] for row in ordering.arranged(rows, key, None))

    assert (by("sqnr"), by("bytes"), by("name"), by("size")) == ("cba", "acb", "abc", "acb")


@pytest.mark.parametrize(("words", "message"), [
    (["--sort", "kurtoses"], "no key of a layer; did you mean 'kurtosis'"),
    (["--sort", "shape"], "known of no linear"), (["--top", "0"], "--top 0: at least 1"),
    (["--tokens", "9"], "goes with --against"), (["--headers-only"], "goes with --layers"),
])
def test_bad_questions(words: list[str], message: str, run: Run, gptq: Path) -> None:
    status, _, err = run("inspect", gptq, *words)
    assert status == 2 and message in err


def reference_errors(model: Path, weights: dict[str, torch.Tensor], rounding: Any = None) -> dict[str, float]:
    """Σ|W x - Q x|² / Σ|W x|² of each linear, with x caught in the whole model of transformers, in float32."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    spec = Calibration(source=outputs.TEXT, sequence_length=64)
    ids = calibration.load_tokens(spec, model, 1, tiny.VOCABULARY).ids
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].double()[0]
            meant = x @ module.weight.double().T
            given = (rounding(x) if rounding else x) @ weights[name].double().T
            found[name] = float((meant - given).square().sum() / meant.square().sum())
        return hook

    for name, module in original.named_modules():
        if name in weights:
            module.register_forward_hook(watch(name))
    with torch.inference_mode():
        original(ids)
    return found


def test_output_errors_are_those_of_the_whole_model(run: Run, model: Path, rtn: Path) -> None:
    source = decode.open_model(str(rtn))
    expected = reference_errors(model, {name: source.decoded(name) for name in source.schemes})
    rows = layers_of(run, rtn, "--layers", "--against", model, "--tokens", "64")
    assert len(rows) == len(expected) == 15
    for row in rows:
        assert row["output_error"] == pytest.approx(expected[row["name"]], rel=0.02), row["name"]  # bf16 or float32


@pytest.mark.usefixtures("in_float32")
def test_output_errors_include_the_rounding_of_inputs(run: Run, model: Path, tmp_path: Path) -> None:
    make("quantize", model, "--method", "w8a8", "--samples", "4", "--sequence-length", "32", "--quiet",
         "--out", tmp_path / "out")
    source = decode.open_model(str(tmp_path / "out"))

    def per_token(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127) * scale

    weights = {name: source.decoded(name) for name in source.schemes}
    expected, without = reference_errors(model, weights, per_token), reference_errors(model, weights)
    rows = layers_of(run, tmp_path / "out", "--layers", "--against", model, "--tokens", "64")
    for row in rows:
        assert row["output_error"] == pytest.approx(expected[row["name"]], rel=0.1)
    assert sum(expected.values()) > 1.2 * sum(without.values())


def test_the_manifest_plays_no_part(run: Run, model: Path, gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "foreign")
    (tmp_path / "foreign" / manifest.NAME).unlink()
    own, foreign = ({row["stored"]: row["output_error"] for row in layers_of(run, path, "--layers", "--against", model)}
                    for path in (gptq, tmp_path / "foreign"))
    assert own == foreign and all(0 < error < 0.1 for error in own.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3"])
def test_other_families(family: str, run: Run, tmp_path: Path) -> None:
    path = tiny.make(tmp_path / family, family, num_hidden_layers=3)
    make("quantize", path, "--method", "rtn", "--group-size", "32", "--quiet", "--out", tmp_path / "out")
    rows = layers_of(run, tmp_path / "out", "--layers", "--against", path)
    assert all(0 < row["output_error"] < 0.1 for row in rows if row.get("output_error") is not None)
    assert sum(row.get("output_error") is not None for row in rows) >= 21


def test_rescaled_weights_have_no_error_like_for_like(run: Run, model: Path, tmp_path: Path) -> None:
    make("quantize", model, "--method", "awq", "--group-size", "32", "--samples", "4", "--sequence-length", "32",
         "--quiet", "--out", tmp_path / "out")
    status, out, _ = run("inspect", tmp_path / "out", "--layers", "--against", model, "--json")
    rows, count = json.loads(out)["layers"], json.loads(out)["comparison"]["rescaled"]
    assert status == 0 and count == sum(bool(row.get("rescaled")) for row in rows) > 0
    assert all(row.get("output_error") is None for row in rows if row.get("rescaled"))


def test_without_a_tokenizer_only_weights_are_compared(run: Run, model: Path, rtn: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    status, out, _ = run("inspect", rtn, "--against", tmp_path / "base", "--json", "--layers")
    compared = json.loads(out)["comparison"]
    assert status == 0 and compared["outputs"] is None and "tokenizer" in compared["no_outputs"]
    assert all(row["weight_error"] > 0 for row in json.loads(out)["layers"])


def test_tokens_0_leaves_the_outputs_out(run: Run, model: Path, rtn: Path) -> None:
    rows = layers_of(run, rtn, "--layers", "--against", model, "--tokens", "0")
    assert all("output_error" not in row and row["weight_error"] > 0 for row in rows)
    assert run("inspect", rtn, "--against", model, "--tokens", "3")[0] == 2


def test_gguf_has_output_errors_too(run: Run, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "tiny", "llama", num_hidden_layers=2)
    make("export", model, "--to", "gguf", "--type", "q4_0", "--out", tmp_path / "a.gguf", "--quiet")
    rows = layers_of(run, tmp_path / "a.gguf", "--layers", "--against", model)
    measured = [row["output_error"] for row in rows if row.get("output_error") is not None]
    assert len(measured) == 14 and all(0 < error < 0.05 for error in measured)
    assert all(len(load_file(model / "model.safetensors")[row["stored"] + ".weight"].shape) == 2 for row in rows)
