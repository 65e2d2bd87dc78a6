"""qtool export --to text: drawn from the model's own probabilities, the same again, and read by quantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import decode, export_text, preflight
from qtool.errors import NumericalError
from tests import tiny
from tests.cli.conftest import run  # noqa: F401

SAMPLES, LENGTH = 40, 12


def dense(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def made(model: Path, out: Path, samples: int = SAMPLES) -> export_text.TextExport:
    return export_text.make_export(decode.open_model(str(model)), out, samples, LENGTH, "cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen3_moe"])
def test_tokens_are_drawn_as_the_model_foresees_them(family: str, tmp_path: Path) -> None:
    """The loss of drawn text is its entropy, token by token, within the noise; under another model it is more."""
    model = dense(tiny.make(tmp_path / "m", family))
    with torch.inference_mode():
        some = model(torch.arange(20)[None], use_cache=False).logits
        model.get_output_embeddings().weight.mul_(2 / some.std())  # far from equal chances
        known = model.config.get_text_config().vocab_size - 3
        ids = export_text.draw(model, 1, 200, LENGTH, known, torch.Generator().manual_seed(0))
        assert ids.shape == (200, LENGTH) and int(ids.max()) < known and ids.dtype == torch.int64
        before = torch.cat([torch.ones(200, 1, dtype=torch.int64), ids[:, :-1]], dim=1)
        chances = model(before, use_cache=False).logits[..., :known].log_softmax(-1)
    lost = -chances.gather(2, ids[..., None])[..., 0]
    entropy = -(chances.exp() * chances).sum(-1)
    error = (lost - entropy).std() / lost.numel() ** 0.5
    assert 0.3 < entropy.mean() < 0.9 * torch.tensor(float(known)).log()
    assert abs((lost - entropy).mean()) < 4 * error
    first = torch.bincount(ids[:, 0], minlength=known) / 200
    assert (first - chances[0, 0].exp()).abs().max() < 0.15


def test_the_same_text_again_and_more_of_it(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "m", "llama")
    result = export_text.run(made(model, tmp_path / "a.jsonl"))
    export_text.run(made(model, tmp_path / "b.jsonl"))
    export_text.run(made(model, tmp_path / "more.jsonl", 70))
    text = (tmp_path / "a.jsonl").read_text()
    assert text == (tmp_path / "b.jsonl").read_text() and (tmp_path / "more.jsonl").read_text().startswith(text)
    lines = [json.loads(line)["text"] for line in text.splitlines()]
    assert len(lines) == SAMPLES and len(set(lines)) == SAMPLES
    assert result["calibration"] == {"source": "the model's own", "samples": SAMPLES, "sequence_length": LENGTH}


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw, seen = tiny.make(tmp_path / "m", "llama"), export_text.draw, []

    def stops(*given: Any) -> torch.Tensor:
        seen.append(given)
        if len(seen) == 2:
            raise SystemExit(9)
        return draw(*given)

    monkeypatch.setattr(export_text, "draw", stops)
    with pytest.raises(SystemExit):
        export_text.run(made(model, tmp_path / "a.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()
    export_text.run(made(model, tmp_path / "a.jsonl"))
    assert len(seen) == 3
    export_text.run(made(model, tmp_path / "b.jsonl"))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "m"]


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    model = dense(tiny.make(tmp_path / "m", "llama"))
    with torch.inference_mode():
        model.get_output_embeddings().weight[5] = float("nan")
        with pytest.raises(NumericalError, match="logits are not finite"):
            export_text.draw(model, 1, 2, 3, 100, torch.Generator())


def test_from_the_command_line_into_quantize(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    model = tiny.make(tmp_path / "m", "llama")
    words = ("export", model, "--to", "text", "--samples", 20, "--sequence-length", 40)
    own = tmp_path / "own.jsonl"
    status, out, _ = run(*words, "--out", own, "--json")
    assert status == 0 and json.loads(out)["out"] == str(own)
    _, said, _ = run(*words, "--out", tmp_path / "again.jsonl")
    assert "Wrote text with" in said and "20 texts of 40 tokens, drawn from the model" in " ".join(said.split())
    text = ("--calibration", own, "--samples", 4, "--sequence-length", 16, "--group-size", 32)
    assert run("quantize", model, *text, "--out", tmp_path / "q", "--quiet")[0] == 0
    told = json.loads((tmp_path / "q" / "manifest.json").read_text())
    assert told["calibration"]["source"] == "own.jsonl"
    for given, said in (
            ((*words, "--out", own), "own.jsonl exists; remove it or choose another --out"),
            ((*words, "--calibration", own), "--calibration is for --to imatrix, not text"),
            (("export", model, "--to", "text", "--samples", 0), "calibration.samples")):
        status, _, err = run(*given)
        assert status == 2 and said in " ".join(err.split()), err
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    status, _, err = run(*words, "--out", tmp_path / "other.jsonl")
    assert status == 2 and "needs the whole model in memory" in " ".join(err.split())
    assert not (tmp_path / "other.jsonl").exists()


def test_a_tokenizer_that_names_no_beginning(run: Any, tmp_path: Path) -> None:  # noqa: F811
    model = tiny.make(tmp_path / "m", "llama")
    path = model / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_token")}
    path.write_text(json.dumps(config))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    status, _, err = run("export", model, "--to", "text", "--samples", 2)
    assert status == 2 and "names no token that a text begins or ends with" in " ".join(err.split())
