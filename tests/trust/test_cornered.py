"""Tiny models with ruined weights through the whole command: what is written, what is said, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import decode
from tests import nasty, tiny
from tests.cli.conftest import Run, run
from tests.test_repairs import SCHEMES, STEPS, change, check_step

pytestmark = pytest.mark.trust
__all__ = ["run"]  # the fixture
FIRST, SECOND = "model.layers.0.", "model.layers.1."
TEXT = ["--samples", "12", "--sequence-length", "32"]
METHODS = {
    "rtn": ["rtn", "--group-size", "32"], "gptq": ["gptq", "--group-size", "32", *TEXT],
    "gptq-format": ["gptq", "--group-size", "32", "--format", "gptq", *TEXT],
    "gptq-fast": ["gptq-fast", "--group-size", "32", *TEXT], "awq": ["awq", "--group-size", "32", *TEXT],
    "equalize+gptq": ["equalize+gptq", "--group-size", "32", *TEXT],
    "awq+gptq": ["awq+gptq", "--group-size", "32", *TEXT], "smoothquant": ["smoothquant", *TEXT],
    "w8a8": ["w8a8", *TEXT], "rotate+gptq": ["rotate+gptq", "--group-size", "32", *TEXT], "fp8": ["fp8"],
    "fp8-static": ["fp8-static", *TEXT], "nvfp4": ["nvfp4", *TEXT], "mxfp4": ["mxfp4", *TEXT], "nf4": ["nf4"],
    "nf4-gptq": ["nf4-gptq", *TEXT], "llm-int8": ["llm-int8"], "q4_0": ["q4_0", *TEXT],
    "q4_k_m": ["q4_k_m", *TEXT], "aqlm": ["aqlm", "--set", "steps.aqlm.rounds=2", *TEXT],
    "budget": ["gptq", "--budget", "4.5", *TEXT],
}
RESCALING = ("awq", "awq+gptq", "equalize+gptq", "smoothquant", "rotate+gptq")


def _dead(matrix: torch.Tensor) -> None:
    matrix[:40] = 0


def _tiny_rows(matrix: torch.Tensor) -> None:
    matrix[3], matrix[4] = 1e-30, 0


def _subnormal(matrix: torch.Tensor) -> None:
    matrix[:, :32] *= 1e-38


# name -> (tensor: what is done to it), the linears and kinds that a calibrated run must tell of
RUINS: dict[str, tuple[dict[str, nasty.Change], dict[str, str]]] = {
    "dead inputs, tiny rows": (
        {f"{FIRST}input_layernorm.weight": _dead, f"{SECOND}self_attn.q_proj.weight": _tiny_rows,
         f"{SECOND}mlp.up_proj.weight": _subnormal,
         f"{SECOND}self_attn.v_proj.weight": lambda matrix: matrix[::2].mul_(1e-30)},
        {f"{FIRST}self_attn.q_proj": "dead_inputs"}),
    "zero matrix, constant and equal columns": (
        {f"{FIRST}mlp.gate_proj.weight": torch.Tensor.zero_,
         "model.embed_tokens.weight": lambda matrix: matrix[:, 7].fill_(3.0),
         f"{SECOND}mlp.up_proj.weight": lambda matrix: matrix[1:60].copy_(matrix[:1].expand(59, -1))},
        {f"{FIRST}mlp.down_proj": "dead_inputs"}),
}


@pytest.fixture(scope="session")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """ruin -> the folder of a model; made once."""
    made: dict[str, Path] = {}

    def get(ruin: str) -> Path:
        if ruin not in made:
            folder = tmp_path_factory.mktemp("ruined")
            made[ruin] = tiny.make(folder / "model", "llama", num_hidden_layers=2)
            change(made[ruin], RUINS[ruin][0])
        return made[ruin]

    yield get


def finite(out: Path) -> None:
    """All that is stored, and all that it stands for."""
    source = decode.open_model(str(out))
    for name in source.specs:
        assert source.read(name).isfinite().all(), name
    for name in source.schemes:
        assert source.decoded(name).isfinite().all(), name


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("ruin", sorted(RUINS))
def test_finite_and_told(ruin: str, method: str, run: Run, ruined: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = METHODS[method]
    status, text, err = run("quantize", ruined(ruin), "--method", *words, "--out", out, "--json")
    assert status == 0, err
    finite(out)
    layers = {layer["name"]: layer for layer in json.loads(text)["layers"]}
    assert len([name for name in layers if name.startswith("model.layers.")]) == 14
    for layer in layers.values():
        errors = [layer[key] for key in ("relative_error", "weight_error") if layer[key] is not None]
        assert errors and all(0 <= error < 0.2 for error in errors), layer
    before, after = decode.open_model(str(ruined(ruin))), decode.open_model(str(out))
    for name, layer in layers.items() if method not in RESCALING else ():
        lost = lost_rows(before.read(f"{layer['stored']}.weight"), after.decoded(layer["stored"]))
        assert not lost or "too_small" in layer["repaired"], name
    for name, kind in RUINS[ruin][1].items():
        if layers[name]["tokens"] and (method != "rotate+gptq" or name.endswith("down_proj")):
            assert kind in layers[name]["repaired"], name  # rotated, no column of the stream is dead


def lost_rows(weight: torch.Tensor, decoded: torch.Tensor) -> int:
    """Rows that are zero now and were not."""
    return int(((weight != 0).any(1) & (decoded == 0).all(1)).sum())


def test_a_repair_is_on_the_screen_and_in_the_inspection(run: Run, ruined: Any, tmp_path: Path) -> None:
    model, out = ruined("dead inputs, tiny rows"), tmp_path / "out"
    status, text, _ = run("quantize", model, "--method", "gptq", "--group-size", "32", *TEXT, "--out", out)
    assert status == 0
    flat = " ".join(text.split())
    assert f"4 linears with input columns that are always zero: {FIRST}self_attn.q_proj" in flat
    assert "dead inputs" in run("inspect", out, "--layers")[1]
    row = json.loads(run("inspect", out, "--layers", "--json")[1])["layers"][0]
    assert row["repaired"] == {"dead_inputs": "40 of 64 input columns are zero on all calibration text; their weights "
                                              "are rounded to nearest"}
    page = tmp_path / "page.html"
    assert run("inspect", out, "--report", page)[0] == 0 and "input columns that are always zero" in page.read_text()


def test_few_tokens_are_told(run: Run, tmp_path: Path) -> None:
    model, out = tiny.make(tmp_path / "model", "llama", num_hidden_layers=1), tmp_path / "out"
    status, text, _ = run("quantize", model, "--group-size", "32", "--samples", "2", "--sequence-length", "16",
                          "--set", "steps.gptq.damping=0", "--out", out, "--json")
    layers = json.loads(text)["layers"]
    assert status == 0 and all("few_tokens" in layer["repaired"] and "hessian" in layer["repaired"] for layer in layers)
    assert all(layer["damping"] > 0 and layer["relative_error"] < 0.5 for layer in layers)
    finite(out)


def _loud(matrix: torch.Tensor) -> None:
    matrix[5] = 6e4


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "q4_0"])
@pytest.mark.parametrize(("changes", "words"), [
    ({f"{FIRST}mlp.up_proj.weight": _loud, f"{FIRST}mlp.gate_proj.weight": _loud}, f"{FIRST}mlp."),
    ({f"{FIRST}mlp.down_proj.weight": lambda matrix: matrix.mul_(1e5)}, "model.layers.0: its output reaches"),
])
def test_activations_beyond_float16_are_named_and_the_remedy_works(
        method: str, changes: dict[str, nasty.Change], words: str, run: Run, tmp_path: Path) -> None:
    model, out = tiny.in_float16(tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)), tmp_path / "out"
    change(model, changes)
    command = ["quantize", model, "--method", *METHODS[method], "--out", out]
    status, _, err = run(*command)
    assert status == 1 and words in err and "float16 holds" in err and "dtype=bfloat16" in err, err
    assert not out.exists()
    status, _, err = run(*command, "--set", "dtype=bfloat16", "--restart")
    assert status == 0, err
    finite(out)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "nvfp4", "budget"])
def test_one_block_that_overflows_is_named(method: str, run: Run, tmp_path: Path) -> None:
    model, out = tiny.make(tmp_path / "model", "llama", num_hidden_layers=3), tmp_path / "out"
    change(model, {f"{SECOND}mlp.{name}_proj.weight": lambda matrix: matrix.mul_(1e25) for name in ("up", "gate")})
    status, _, err = run("quantize", model, "--method", *METHODS[method], "--out", out)
    assert status == 1 and "model.layers.1" in err and "not finite" in err and "--sort absmax" in err, err
    assert "Traceback" not in err and not out.exists()


@pytest.mark.parametrize(("family", "method"), [("llama", "smoothquant"), ("gemma2", "awq")])
def test_a_dead_block_teaches_no_wrong_fold(family: str, method: str, run: Run, tmp_path: Path) -> None:
    """In a block of zeros every fold seems to hold; what is tried there must not be done to the next block."""
    plain, dead = (tiny.make(tmp_path / name, family, num_hidden_layers=2) for name in ("plain", "dead"))
    names = ("q", "k", "v", "o"), ("gate", "up", "down")
    change(dead, {f"{FIRST}{part}.{name}_proj.weight": torch.Tensor.zero_
                  for part, some in zip(("self_attn", "mlp"), names, strict=True) for name in some})
    worst = {}
    for model in (plain, dead):
        out = tmp_path / f"out-{model.name}"
        status, text, err = run("quantize", model, "--method", *METHODS[method], "--set", "scheme.bits=8", "--out", out,
                                "--json")
        assert status == 0, err
        result = json.loads(run("eval", out, "--against", model, "--json", "--windows", "2", "--context", "64")[1])
        worst[model.name] = result["models"][0]["kl"]["mean"]
    assert worst["dead"] < 10 * worst["plain"] + 1e-4


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq", "smoothquant", "fp8", "llm-int8"])
def test_a_single_column_and_a_single_row(method: str, run: Run, tmp_path: Path) -> None:
    model, out = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2, intermediate_size=1), tmp_path / "out"
    words = ["-1" if word == "32" and before == "--group-size" else word
             for before, word in zip(["", *METHODS[method]], METHODS[method], strict=False)]
    status, text, err = run("quantize", model, "--method", *words, "--out", out, "--json")
    assert status == 0, err
    shapes = {tuple(layer["shape"]) for layer in json.loads(text)["layers"]}
    assert {(1, 64), (64, 1)} <= shapes
    finite(out)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_with_no_token_and_with_few(method: str, run: Run, tmp_path: Path) -> None:
    """A router of equal scores sends all tokens to the first experts; the others take the statistics of all."""
    model, out = tiny.make(tmp_path / "model", "qwen3_moe"), tmp_path / "out"
    change(model, {f"{FIRST}mlp.gate.weight": torch.Tensor.zero_})
    status, text, err = run("quantize", model, "--method", *METHODS[method], "--out", out)
    assert status == 0, err
    assert "with too few tokens of their own" in text
    layers = json.loads((out / "manifest.json").read_text())["layers"]
    experts = [layer for layer in layers if layer["name"].startswith(f"{FIRST}mlp.experts.")]
    assert {layer["tokens"] == 0 for layer in experts} == {True, False}
    assert all(layer["pooled"] for layer in experts if layer["tokens"] < 32)
    finite(out)


def test_embeddings_tied_to_the_head(run: Run, tmp_path: Path) -> None:
    model, out = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2, tie_word_embeddings=True), tmp_path / "out"
    change(model, {"model.embed_tokens.weight": _tiny_rows})
    status, text, err = run("quantize", model, "--method", *METHODS["q4_0"], "--out", out)
    assert status == 0, err
    assert "1 linear with groups too small for their scales, which are zero now: model.embed_tokens" in \
        " ".join(text.split())
    finite(out)
    change(model, {"model.embed_tokens.weight": lambda matrix: matrix[3, 3:4].fill_(1e30)})
    status, _, err = run("quantize", model, "--method", *METHODS["q4_0"], "--out", tmp_path / "other")
    assert status == 1 and "model.embed_tokens: its largest weight" in err and "Traceback" not in err


def test_a_dense_tensor_that_a_smaller_type_cannot_hold(run: Run, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    change(model, {"model.norm.weight": lambda vector: vector[3:4].fill_(1e6)})
    command = ["quantize", model, "--method", "rtn", "--group-size", "32", "--out", tmp_path / "out"]
    status, _, err = run(*command, "--set", "dtype=float16")
    assert status == 1 and "model.norm.weight: has values up to 9.994e+05, more than float16 holds" in err
    assert run(*command, "--set", "dtype=float32", "--restart")[0] == 0
    finite(tmp_path / "out")


@given(st.sampled_from(sorted(SCHEMES)), st.sampled_from(sorted(STEPS)), st.sampled_from(sorted(nasty.WEIGHTS)),
       st.sampled_from(sorted(nasty.INPUTS)), st.sampled_from([1, 3, 20, 300]), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_no_step_is_worse_than_plain_rounding(grid: str, steps: str, weight: str, inputs: str, tokens: int, rows: int,
                                              seed: int) -> None:
    check_step(grid, steps, weight, inputs, tokens, rows, seed)
