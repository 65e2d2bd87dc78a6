"""Tasks made on the spot, run by the real lm-eval on tiny models, against answers that transformers alone gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.cli import main
from qtool.errors import InputError
from qtool.evaluate import tasks
from tests import tiny

QUESTIONS = [("one two", [" three", " four", " lazy"]), ("for index in range", ["(10)", "(left)", " dog"]),
             ("The quick brown", [" fox", " dog", " model"]), ("def add", ["(left, right)", " model", "10"]),
             ("a smaller model guesses", [" almost", " Tuesday", " on"]), ("print", ["(index)", " over", "0123"])]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: data/write.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 4, do_sample: false, until: ["<never>"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, a quantized one with a cache in FP8, and two tasks: what is right is what the model itself says."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tasks")
    tiny.make(folder / "base", "qwen2", num_hidden_layers=2)
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(folder / "base"), "--method", "rtn", "--bits", "3", "--group-size", "32", "--quiet",
              "--kv-cache", "fp8", "--samples", "2", "--sequence-length", "32", "--out", str(folder / "int3")])
    assert not stopped.value.code
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    (folder / "files" / "data").mkdir(parents=True)
    for name, config in (("choice", CHOICE), ("write", WRITE)):
        (folder / "files" / f"{name}.yaml").write_text(config)
    choice = [{"question": text, "choices": choices, "answer": likeliest(model, text, choices) if number % 3 else
               (likeliest(model, text, choices) + 1) % 3} for number, (text, choices) in enumerate(QUESTIONS)]
    write = [{"question": text, "answer": written(model, text) if number < 2 else "nothing of the kind"}
             for number, (text, _) in enumerate(QUESTIONS)]
    for name, lines in (("choice", choice), ("write", write)):
        (folder / "files" / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@torch.inference_mode()
def likeliest(model: Any, text: str, choices: list[str]) -> int:
    tokenizer, scores = tiny.tokenizer(), []
    for choice in choices:
        start, whole = (tokenizer(words).input_ids for words in (text, text + choice))
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(float(logs[place - 1, whole[place]]) for place in range(len(start), len(whole))))
    return scores.index(max(scores))


def written(model: Any, text: str) -> str:
    ids = torch.tensor([tiny.tokenizer()(text).input_ids])
    made = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1]:]
    return str(tiny.tokenizer().decode(made, skip_special_tokens=True))


@pytest.fixture
def own_cache(lm_eval: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_tasks_of_a_folder(made: Path, own_cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "eval", str(made / "int3"), "--against", str(made / "base"), "--windows", "2",
                           "--context", "32", "--no-cache", "--tasks", "tiny_choice,tiny_write", "--task-files",
                           str(made / "files"), "--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    base = {(one["task"], one["metric"]): one for one in data["against"]["tasks"]}
    assert base["tiny_choice", "acc"]["value"] == pytest.approx(4 / 6)  # two answers are one too far
    assert base["tiny_choice", "acc"]["error"] == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 5))
    assert base["tiny_write", "exact_match"]["value"] == pytest.approx(2 / 6)
    assert base["tiny_write", "exact_match"]["questions"] == 6 and not base["tiny_write", "exact_match"]["shots"]
    assert base["tiny_choice", "acc_norm"]["main"] and not base["tiny_choice", "acc"]["main"]
    for one in data["models"][0]["tasks"]:
        other = base[one["task"], one["metric"]]
        assert one["difference"]["mean"] == pytest.approx(one["value"] - other["value"])
        assert one["difference"]["error"] >= 0


def test_table_and_limit(made: Path, own_cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "eval", str(made / "int3"), "--windows", "2", "--context", "32", "--tasks",
                           "tiny_choice", "--task-files", str(made / "files"), "--limit", "2", "--markdown")
    assert (status, err) == (0, "") and "| tiny_choice acc_norm |" in out


def test_generation_keeps_rounded_keys_and_values(made: Path) -> None:
    """Token by token with a cache gives the logits of whole sequences, in which every key and value is rounded too."""
    from qtool.decode import open_model
    from qtool.models import skeleton
    from qtool.models.whole import load_model

    source = open_model(str(made / "int3"))
    ids = torch.tensor([tiny.tokenizer()("The quick brown fox jumps over").input_ids])
    logits = {}
    for name, scales in (("rounded", source.cache_scales()), ("plain", {})):
        bones = skeleton.build(source.directory, source.config, source.specs)
        model = load_model(bones, source.read, torch.device("cpu"), torch.float32, source.schemes,
                           source.read_quantized, scales)
        with torch.inference_mode():
            logits[name], past, last = model(ids, use_cache=False).logits[0, -1], None, None
            for token in ids[0]:
                output = model(token.view(1, 1), past_key_values=past, use_cache=True)
                past, last = output.past_key_values, output.logits[0, -1]
        assert last is not None and torch.allclose(last, logits[name], atol=1e-5)
    assert (logits["rounded"] - logits["plain"]).abs().max() > 1e-4


def test_paired_differences() -> None:
    record = {"task": "t", "metric": "acc", "filter": "none", "value": 0.5}
    other = {"task": "t", "metric": "f1", "filter": "none", "value": 0.9}
    scores = {("t", "acc", "none"): {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}, ("t", "f1", "none"): {0: 1.0, 1: 0.0}}
    tasks.compare([record, other], scores, {("t", "acc", "none"): {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0}})
    assert record["difference"] == {"mean": -0.25, "error": pytest.approx(0.25)}  # of 0, -1, 0, 0
    assert other["difference"] is None  # no mean over questions


@pytest.mark.parametrize(("names", "folder", "limit", "message"), [
    (["tiny_choise"], "files", None, "task 'tiny_choise' is not known; did you mean 'tiny_choice'"),
    (["tiny_choice"], "files", 0, "--limit 0: at least 1 question"),
    (["tiny_choice"], "base", None, "--task-files .*base: there is no .yaml file"),
    (["broken"], "files", None, "task 'broken': it cannot be loaded: .*--task-files DIR"),
])
def test_bad_input(names: list[str], folder: str, limit: int | None, message: str, made: Path, own_cache: None,
                   monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: TaskManager(
        **{**options, "include_defaults": False}))  # its 14,000 files take long to read
    (made / "files" / "broken.yaml").write_text(CHOICE.replace("tiny_choice", "broken").replace("choice.jsonl", "no"))
    with pytest.raises(InputError, match=message):
        tasks.prepare(names, made / folder, limit)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"--tasks needs lm-eval .*pip install 'qtool\[tasks\]'"):
        tasks.prepare(["arc_easy"], None, None)
