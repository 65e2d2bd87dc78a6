"""Perplexity and divergence against a direct computation with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from qtool.cli import main
from qtool.decode import open_model
from qtool.evaluate import evaluate, measure
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
    result = evaluate(open_model(str(path)), text=text, windows=3, context=40)
    ids = windows_of(path, 3, 40)
    if result["text"]["begins_with_bos"]:
        tokens = windows_of(path, 1, 3 * 39).view(3, 39)
        ids = torch.cat([torch.zeros(3, 1, dtype=torch.int64), tokens], 1)
    logits = logits_of(path, ids)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert result["model"]["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert result["model"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert result["text"]["predictions"] == 3 * 39 and result["against"] is None and "kl" not in result


def test_divergence_is_that_of_the_definition(model: Path, text: str, tmp_path: Path) -> None:
    out = quantized(model, "three", "--bits", "3")
    dense = tmp_path / "dense"
    with pytest.raises(SystemExit):
        main(["export", str(out), "--to", "hf", "--out", str(dense), "--quiet"])
    result = evaluate(open_model(str(out)), open_model(str(model)), text, windows=3, context=40)
    ids = windows_of(model, 3, 40)
    ours, base = (logits_of(path, ids)[:, :-1].double().log_softmax(-1) for path in (dense, model))
    kl = (base.exp() * (base - ours)).sum(-1)
    assert result["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result["kl"]["median"] == pytest.approx(float(kl.flatten().median()), rel=1e-3)
    assert result["kl"]["p99"] == pytest.approx(float(kl.flatten().quantile(0.99, interpolation="nearest")), rel=1e-3)
    assert result["top1_agreement"] == pytest.approx(float((ours.argmax(-1) == base.argmax(-1)).double().mean()))
    nll = [-torch.gather(log, 2, ids[:, 1:, None]).mean((1, 2)) for log in (ours, base)]
    difference = nll[0] - nll[1]
    assert result["excess"]["mean"] == pytest.approx(float(difference.mean()), abs=1e-6)
    assert result["excess"]["error"] == pytest.approx(float(difference.std() / math.sqrt(3)), abs=1e-6)
    assert result["model"]["nll_error"] == pytest.approx(float(nll[0].std() / math.sqrt(3)), rel=1e-4)
    ratio = result["model"]["perplexity"] / result["against"]["perplexity"]
    assert result["excess"]["mean"] == pytest.approx(math.log(ratio))
    assert result["model"]["bits_per_weight"] < 3.7 and result["against"]["bits_per_weight"] == 16


def test_a_model_against_itself(model: Path, text: str) -> None:
    result = evaluate(open_model(str(model)), open_model(str(model)), text, windows=2, context=32)
    assert result["kl"] == {"mean": 0.0, "error": 0.0, "median": 0.0, "p99": 0.0}
    assert result["top1_agreement"] == 1.0 and result["excess"] == {"mean": 0.0, "error": 0.0}


def test_formats_of_one_quantization_evaluate_alike(model: Path, text: str) -> None:
    out = quantized(model, "four")
    exported = model.with_name("four-gptq")
    with pytest.raises(SystemExit):
        main(["export", str(out), "--to", "gptq", "--out", str(exported), "--quiet"])
    figures = [evaluate(open_model(str(path)), text=text, windows=2, context=32)["model"] for path in (out, exported)]
    assert figures[0]["nll"] == figures[1]["nll"] and figures[0]["weight_bytes"] < figures[1]["weight_bytes"]


def test_the_command(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quantized(model, "four")
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["eval", str(out), "--against", str(model), "--windows", "2", "--context", "64", *extra])
        assert not stopped.value.code
    captured = capsys.readouterr()
    table, _, document = captured.out.partition("{")
    assert captured.err == "" and json.loads("{" + document)["text"]["source"] == "builtin"
    for words in ("2 windows × 64 tokens of builtin", "perplexity", "tiny", "four", "KL divergence, 99 %"):
        assert words in table


def test_kl_of_impossible_tokens_is_finite() -> None:
    figures = measure.Figures.empty(2)
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.5, 0.0, -math.inf]])
    measure.add(figures, [logits * 2, logits], torch.tensor([0, 1]))
    probability = torch.tensor([[0.0, 1.0], [0.5, 0.0]]).softmax(-1)
    other = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).softmax(-1)
    expected = (probability * (probability / other).log()).sum(-1)
    assert torch.allclose(figures.kl[0], expected) and figures.same == 2


def test_chunks_do_not_change_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(300, 50, generator=generator) for _ in range(2)]
    targets = torch.randint(0, 50, (300,), generator=generator)
    results = []
    for rows in (7, 1000):
        monkeypatch.setattr(measure, "ROWS", rows)
        figures = measure.Figures.empty(2)
        measure.add(figures, logits, targets)
        results.append((figures.nll, measure.divergence(figures)))
    assert results[0][0][0] == pytest.approx(results[1][0][0])
    assert results[0][1]["kl"]["mean"] == pytest.approx(results[1][1]["kl"]["mean"])


def test_figures_that_are_not_finite_are_an_error(model: Path, text: str, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from qtool.errors import NumericalError

    shutil.copytree(model, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match="window 1: the model's predictions are not finite"):
        evaluate(open_model(str(tmp_path / "bad")), text=text, windows=2, context=32)
