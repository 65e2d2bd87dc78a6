"""Perplexity and divergence against a direct computation with transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qtool.cli import main
from qtool.decode import open_model
from qtool.evaluate import evaluate
from tests import tiny

TEXT = "".join(f"Line {index}: the value is {index * index % 97}, and so on.\n" for index in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("evaluate") / "tiny", "llama")


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    path = model.with_name("text.txt")
    path.write_text(TEXT)
    return str(path)


def quantized(model: Path, name: str, *options: str) -> Path:
    out = model.with_name(name)
    if not out.exists():
        with pytest.raises(SystemExit) as stopped:
            main(["quantize", str(model), "--method", "rtn", "--group-size", "32", "--out", str(out), "--quiet",
                  *options])
        assert not stopped.value.code
    return out


def logits_of(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits [S, T, V] by transformers' own loading of dense weights."""
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits


def windows_of(path: Path, count: int, length: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(path)(TEXT, add_special_tokens=False).input_ids
    return torch.tensor(tokens[:count * length]).view(count, length)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_perplexity_is_that_of_transformers(family: str, tmp_path: Path, text: str) -> None:
    path = tiny.make(tmp_path / family, family)
    result = evaluate([open_model(str(path))], text=text, windows=3, context=40)
    ids = windows_of(path, 3, 40)
    if result["text"]["begins_with_bos"]:
        tokens = windows_of(path, 1, 3 * 39).view(3, 39)
        ids = torch.cat([torch.zeros(3, 1, dtype=torch.int64), tokens], 1)
    logits = logits_of(path, ids)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    row = result["models"][0]
    assert row["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert result["text"]["predictions"] == 3 * 39 and result["against"] is None and "kl" not in row


def test_divergence_is_that_of_the_definition(model: Path, text: str, tmp_path: Path) -> None:
    out = quantized(model, "three", "--bits", "3")
    dense = tmp_path / "dense"
    with pytest.raises(SystemExit):
        main(["export", str(out), "--to", "hf", "--out", str(dense), "--quiet"])
    data = evaluate([open_model(str(out))], open_model(str(model)), text, windows=3, context=40)
    result = data["models"][0]
    ids = windows_of(model, 3, 40)
    ours, base = (logits_of(path, ids)[:, :-1].double().log_softmax(-1) for path in (dense, model))
    kl = (base.exp() * (base - ours)).sum(-1)
    assert result["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result["kl"]["median"] == pytest.approx(float(kl.flatten().median()), rel=1e-3)
    assert result["kl"]["p99"] == pytest.approx(float(kl.flatten().quantile(0.99, interpolation="nearest")), rel=1e-3)
    same = (ours.argmax(-1) == base.argmax(-1)).double().mean(1)
    assert result["top1_agreement"]["mean"] == pytest.approx(float(same.mean()))
    assert result["top1_agreement"]["error"] == pytest.approx(float(same.std() / math.sqrt(3)))
    assert result["kl"]["error"] == pytest.approx(float(kl.mean(1).std() / math.sqrt(3)), rel=1e-3)
    nll = [-torch.gather(log, 2, ids[:, 1:, None]).mean((1, 2)) for log in (ours, base)]
    difference = nll[0] - nll[1]
    assert result["excess"]["mean"] == pytest.approx(float(difference.mean()), abs=1e-6)
    assert result["excess"]["error"] == pytest.approx(float(difference.std() / math.sqrt(3)), abs=1e-6)
    error = float(nll[0].std() / math.sqrt(3))
    assert result["nll_error"] == pytest.approx(error, rel=1e-4)
    middle = float(nll[0].mean())
    expected = [math.exp(middle + sign * 4.302653 * error) for sign in (-1, 1)]  # t of 2 degrees of freedom
    assert result["perplexity_interval"] == pytest.approx(expected, rel=1e-4)
    assert result["excess"]["mean"] == pytest.approx(math.log(result["perplexity"] / data["against"]["perplexity"]))
    assert result["bits_per_weight"] < 3.7 and data["against"]["bits_per_weight"] == 16
    assert data["against"]["of_fp16"] == 1.0 and 0.2 < result["of_fp16"] < 1


def test_a_model_against_itself(model: Path, text: str) -> None:
    row = evaluate([open_model(str(model))], open_model(str(model)), text, windows=2, context=32)["models"][0]
    assert set(row["kl"].values()) == {0.0} and row["excess"] == {"mean": 0.0, "error": 0.0}
    assert row["top1_agreement"] == {"mean": 1.0, "error": 0.0}


def test_models_side_by_side_are_what_they_are_alone(model: Path, text: str) -> None:
    paths = [quantized(model, "three", "--bits", "3"), quantized(model, "four")]
    base = open_model(str(model))
    together = evaluate([open_model(str(path)) for path in paths], base, text, windows=2, context=32)
    for path, row in zip(paths, together["models"], strict=True):
        alone = evaluate([open_model(str(path))], base, text, windows=2, context=32)
        row, single = dict(row), dict(alone["models"][0])
        assert row.pop("use_for") and single.pop("use_for")
        assert row == single and alone["against"] == together["against"]
    worse, better = together["models"]
    assert worse["kl"]["mean"] > better["kl"]["mean"] and worse["scheme"] == "int3-g32"


def test_formats_of_one_quantization_evaluate_alike(model: Path, text: str) -> None:
    out = quantized(model, "four")
    exported = model.with_name("four-gptq")
    with pytest.raises(SystemExit):
        main(["export", str(out), "--to", "gptq", "--out", str(exported), "--quiet"])
    figures = evaluate([open_model(str(path)) for path in (out, exported)], text=text, windows=2, context=32)["models"]
    assert figures[0]["nll"] == figures[1]["nll"] and figures[0]["weight_bytes"] < figures[1]["weight_bytes"]


def test_figures_that_are_not_finite_are_an_error(model: Path, text: str, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from qtool.errors import NumericalError

    shutil.copytree(model, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match="window 1: the predictions of bad are not finite"):
        evaluate([open_model(str(tmp_path / "bad"))], text=text, windows=2, context=32)
