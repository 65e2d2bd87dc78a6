"""Task accuracy through lm-eval: its tasks by name, or tasks from a folder of YAML files with their data beside them.

The models are those that perplexity is measured on, with everything that engines round while running; lm-eval makes
the prompts, the scores and the standard errors over questions. Against a base, the difference of each mean is taken
question by question, so that its error is that of a paired comparison.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool.decode import Source
from qtool.errors import InputError
from qtool.models import skeleton, tokenizer
from qtool.models.whole import load_model

INSTALL = "pip install 'qtool[tasks]'"
MAIN = ("acc_norm", "acc", "exact_match")  # what a table shows of a task with several metrics
RESAMPLES = 1000  # where lm-eval has no formula for an error
Step = Callable[[int, int, str], None]
# What lm-eval, datasets and the network underneath raise on tasks that cannot be had.
FAILURES: tuple[type[BaseException], ...] = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError,
                                             AttributeError)


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found, with their data. names: as asked for.  manager: lm-eval's.  folder: of the task files."""

    names: tuple[str, ...]
    manager: Any
    folder: Path | None
    limit: int | None


def prepare(names: Sequence[str], folder: Path | None, limit: int | None) -> Tasks:
    """Find the tasks and fetch their data, before anything is computed.

    folder: of YAML files; paths in them are relative to it, and without any other task of lm-eval's own nothing else is
    read. Raises InputError for unknown tasks, data that cannot be had, or where lm-eval is not installed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least 1 question is needed")
    if folder is not None and not any(folder.rglob("*.yaml")):
        raise InputError(f"--task-files {folder}: there is no .yaml file in this folder; lm-eval's guide to new tasks "
                         "says what one holds")
    with _hushed():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(f"--tasks needs lm-eval ({error}): {INSTALL}") from None
        manager = None
        if folder is not None:
            manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
        if manager is None or any(name not in manager.all_tasks for name in names):
            manager = TaskManager(include_path=str(folder.resolve()) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            raise InputError(f"task '{name}' is not known" + (f"; did you mean '{near[0]}'" if near else "")
                             + ("; --task-files DIR adds your own" if folder is None else ""))
    tasks = Tasks(tuple(names), manager, folder, limit)
    for name in names:
        with _hushed(), _inside(folder):
            try:
                manager.load([name])
            except FAILURES as error:
                raise InputError(f"task '{name}': it cannot be loaded: {_short(error)}; without network its data must "
                                 "be in the cache of datasets, or in --task-files DIR") from None
    return tasks


def measure(source: Source, tasks: Tasks, device: torch.device, dtype: torch.dtype,
            step: Step) -> tuple[list[dict[str, Any]], dict[Any, dict[int, float]]]:
    """A record for each task and metric (docs/json.md), and the scores of single questions for `compare`.

    Raises ModelError, CheckpointError, CalibrationError, InputError.
    """
    bones = skeleton.build(source.directory, source.config, source.specs)
    step(0, 1, f"loading {source.name}")
    model = load_model(bones, source.read, device, dtype, source.schemes, source.read_quantized, source.cache_scales())
    text_tokenizer = tokenizer.load(source.directory)
    with _hushed(), _inside(tasks.folder):
        import lm_eval
        from jinja2 import TemplateError

        adapter = _adapter(model, text_tokenizer, source.name, step)
        try:
            found = lm_eval.simple_evaluate(adapter, tasks=list(tasks.names), task_manager=tasks.manager,
                                            limit=tasks.limit, bootstrap_iters=RESAMPLES, log_samples=True)
        except (OSError, ValueError, KeyError, TemplateError) as error:
            raise InputError(f"lm-eval cannot run {', '.join(tasks.names)} on {source.origin}: {_short(error)}") \
                from None
    return _records(found), _scores(found)


def compare(records: Sequence[dict[str, Any]], scores: Mapping[Any, Mapping[int, float]],
            base: Mapping[Any, Mapping[int, float]]) -> None:
    """Add `difference` to each record: the mean over questions of what is gained on the base, and its standard error.

    None for what is no mean over questions (groups, F1 over a corpus and the like).
    """
    for record in records:
        key = (record["task"], record["metric"], record["filter"])
        ours, theirs = scores.get(key, {}), base.get(key, {})
        gained = [ours[question] - theirs[question] for question in sorted(ours.keys() & theirs.keys())]
        record["difference"] = None
        if gained and math.isclose(math.fsum(ours.values()) / len(ours), record["value"], abs_tol=1e-9):
            mean = math.fsum(gained) / len(gained)
            spread = math.fsum((one - mean) ** 2 for one in gained) / max(len(gained) - 1, 1)
            record["difference"] = {"mean": mean, "error": math.sqrt(spread / len(gained))}


def _adapter(model: Any, text_tokenizer: Any, name: str, step: Step) -> Any:
    """The model as lm-eval takes it, telling how far it is."""
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):
        asked, done = 1, 0

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            self._tell()
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            self._tell()
            return super()._model_generate(*args, **kwargs)

        def _tell(self) -> None:
            step(min(self.done, self.asked), self.asked, f"{name}: tasks")
            self.done += 1

        def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.asked, self.done = len(requests), 0
            return super().loglikelihood(requests, *args, **kwargs)

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.asked, self.done = len(requests), 0
            return super().generate_until(requests, *args, **kwargs)

    model.tie_weights = lambda *_args, **_kwargs: None  # they are tied already, the table in its stored type
    return Counted(pretrained=model, tokenizer=text_tokenizer, batch_size=1)


def _records(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups, records = found.get("groups") or {}, []
    inner = {member for members in (found.get("group_subtasks") or {}).values() for member in members}
    for task, figures in {**found["results"], **groups}.items():
        keys = [key for key, value in figures.items()
                if "," in key and "_stderr," not in key and isinstance(value, (int, float))]
        first = min(keys, key=lambda key: next((place for place, metric in enumerate(MAIN)
                                                if key.startswith(metric + ",")), len(MAIN)), default=None)
        for key in keys:
            metric, _, kind = key.partition(",")
            value, error = figures[key], figures.get(f"{metric}_stderr,{kind}")
            records.append({
                "task": task, "metric": metric, "filter": kind, "value": float(value),
                "error": float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None,
                "questions": (found.get("n-samples", {}).get(task) or {}).get("effective"),
                "shots": found.get("n-shot", {}).get(task), "main": key == first and task not in inner,
            })
    return records


def _scores(found: Mapping[str, Any]) -> dict[Any, dict[int, float]]:
    """(task, metric, filter) -> question -> score, where single questions have one."""
    scores: dict[Any, dict[int, float]] = {}
    for task, samples in (found.get("samples") or {}).items():
        for sample in samples:
            for metric in sample.get("metrics", ()):
                value = sample.get(metric)
                if isinstance(value, (int, float)):
                    scores.setdefault((task, metric, sample.get("filter", "none")), {})[sample["doc_id"]] = float(value)
    return scores


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the bars and warnings of lm-eval and datasets on stderr."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _inside(folder: Path | None) -> contextlib.AbstractContextManager[None]:
    """Paths in task files are relative to their folder."""
    return contextlib.chdir(folder) if folder is not None else contextlib.nullcontext()


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
