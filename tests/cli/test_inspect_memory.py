"""inspect --memory: the bytes of schemes against what quantize really writes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qtool import decode, footprint
from tests import tiny
from tests.cli.conftest import Run, make

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that every scheme fits, blocks of 256 too."""
    return tiny.make(tmp_path_factory.mktemp("memory") / "wide", "llama", **WIDE)


@pytest.fixture(scope="module")
def known(wide: Path) -> dict[str, dict[str, object]]:
    """By method."""
    from qtool.inspect import memory

    found = memory(decode.open_model(str(wide)), 128, 2)
    assert found["not_possible"] == []
    return {method: row for row in found["schemes"] for method in row["methods"]} | {"": found["schemes"][0]}


@pytest.mark.parametrize("method", ["rtn", "w8a8", "llm-int8", "fp8", "fp8-block", "fp8-static", "nf4", "fp4", "mxfp4",
                                    "nvfp4", "awq"])
def test_bytes_are_those_that_quantize_writes(method: str, wide: Path, known: dict[str, dict[str, object]],
                                              tmp_path: Path) -> None:
    make("quantize", wide, "--method", method, "--samples", "4", "--sequence-length", "16", "--quiet",
         "--out", tmp_path / "out")
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "out/model.safetensors").values())
    assert known[method]["weights"] == written
    assert known[method]["total"] == footprint.inference(decode.open_model(str(tmp_path / "out")), 128, 2)["total"]


@pytest.mark.parametrize("mixture", ["q4_k_m", "q8_0", "iq4_xs"])
def test_bytes_of_gguf_mixtures(mixture: str, wide: Path, known: dict[str, dict[str, object]], tmp_path: Path) -> None:
    make("quantize", wide, "--method", mixture, "--samples", "4", "--sequence-length", "16", "--quiet",
         "--out", tmp_path / "out")
    path = next((tmp_path / "out").glob("*.gguf"))
    assert known[mixture]["weights"] == footprint.stored_bytes(decode.open_model(str(path)))


def test_all_formats_and_all_mixtures_are_there(known: dict[str, dict[str, object]]) -> None:
    from qtool.mixtures import MIXTURES

    assert set(MIXTURES) <= set(known)
    assert {row["format"] for row in known.values()} >= {"compressed-tensors", "gptq", "awq", "mlx", "bitsandbytes",
                                                         "fp8", "gguf"}


def test_what_does_not_fit_is_named_with_the_reason(run: Run, model: Path) -> None:
    result = json.loads(run("inspect", model, "--memory", "--context", "64", "--batch", "2", "--json")[1])["memory"]
    refused = {one["method"]: one["why"] for one in result["not_possible"]}
    assert "128 x 128" in refused["fp8-block"] and "q_proj" in refused["fp8-block"]
    groups = {row["scheme"] for row in result["schemes"] if "rtn" in row["methods"]}
    assert groups == {"int4-g64"}  # 128 does not divide 64 columns
    for row in result["schemes"]:
        assert row["total"] == sum(row[key] for key in ("weights", "kv_cache", "activations", "overhead"))
    dense = next(row for row in result["schemes"] if row["format"] == "hf")
    assert dense["weights"] == result["weights"] and result["schemes"][0]["this"]


def test_a_family_without_a_known_cache_still_has_weights(run: Run, monkeypatch: pytest.MonkeyPatch,
                                                          tmp_path: Path) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16})
    path = tiny.make(tmp_path / "hybrid", "falcon_h1")
    status, out, _ = run("inspect", path, "--memory")
    assert status == 0 and "not known" in out and "int4-g64" in out


def test_csv_and_table(run: Run, gptq: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("inspect", gptq, "--memory", "--kv", "fp8", "--csv")[1])))
    assert rows[0]["this"] == "True" and int(rows[0]["kv_cache"]) == 3 * 2 * 2 * 16 * 4096
    _, out, _ = run("inspect", gptq, "--memory", "--context", "1000", "--batch", "3")
    assert "3 × 1000 tokens, keys and values in bf16" in out and "256 positions" in out and "Not possible here" in out


@pytest.mark.parametrize(("words", "message"), [
    (["--context", "5"], "--context goes with --memory"), (["--kv", "fp8"], "--kv goes with --memory"),
    (["--memory", "--batch", "0"], "both are at least 1"), (["--memory", "--kv", "fp9"], "a cache in 'fp9'"),
])
def test_bad_questions(words: list[str], message: str, run: Run, model: Path) -> None:
    status, _, err = run("inspect", model, *words)
    assert status == 2 and message in err
