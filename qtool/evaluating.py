"""What `qtool eval` does: refuses what does not go together, opens the checkpoints, shows the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool import console
from qtool.errors import InputError


@dataclass(frozen=True)
class Asked:
    """The arguments and options of the command."""

    paths: Sequence[str]
    against: str | None = None
    text: str = "builtin"
    windows: int = 20
    context: int = 1024
    stream: bool | None = None
    cache: Path | None = None
    no_cache: bool = False
    device: str = "auto"
    memory_context: int | None = None
    memory_batch: int | None = None
    speed: bool = False
    tasks: str | None = None
    limit: int | None = None
    task_files: Path | None = None
    markdown: bool = False
    json: bool = False
    silent: bool = False

    @property
    def quiet(self) -> bool:
        return self.json or self.silent


def run(asked: Asked) -> None:
    """Raises InputError, CheckpointError, CalibrationError, ModelError, NumericalError."""
    refuse(asked)
    result = evaluated(asked)
    from qtool import report_eval

    if asked.json:
        console.show_json(result)
    elif asked.markdown:
        console.show_text(report_eval.markdown(result))
    elif not asked.silent:
        console.show(report_eval.evaluated(result))


def refuse(asked: Asked) -> None:
    """Raise InputError for what only the options say."""
    if asked.json and asked.markdown:
        raise InputError("--json and --markdown exclude each other; choose one")
    seen: set[Path] = set()
    for path in map(Path, asked.paths):
        if path in seen:
            raise InputError(f"{path} is given twice; name each PATH once")
        seen.add(path)
    if asked.memory_batch is not None and asked.memory_context is None:
        raise InputError("--memory-batch goes with --memory-context")
    if asked.tasks is None and (asked.limit is not None or asked.task_files is not None):
        raise InputError("--limit and --task-files go with --tasks")
    if asked.tasks is not None and not asked.tasks.replace(",", "").strip():
        raise InputError("--tasks names no task; write them as in --tasks arc_easy,hellaswag")
    if asked.stream and (asked.speed or asked.tasks):
        raise InputError("--speed and --tasks run the whole model, which --stream keeps out of memory; leave it out")
    if asked.cache is not None and asked.no_cache:
        raise InputError("--cache and --no-cache exclude each other; choose one")
    if asked.against is None and (asked.cache is not None or asked.no_cache):
        raise InputError("--cache and --no-cache are about the model that --against names; without it nothing is kept")


def evaluated(asked: Asked) -> dict[str, Any]:
    """What `--json` prints."""
    with console.working(f"reading {asked.paths[0]}", asked.quiet):
        from torch import float32

        from qtool import evaluate, footprint
        from qtool.decode import open_model
        from qtool.evaluate import beside, cache, tasks

        models = [open_model(path, gguf_dtype=float32) for path in asked.paths]
        base = open_model(asked.against, gguf_dtype=float32) if asked.against else None
        wanted = beside.Wanted(asked.memory_context, asked.memory_batch or 1, asked.speed, None)
        if wanted.memory_context is not None:
            footprint.refuse_empty(wanted.memory_context, wanted.memory_batch)
    if asked.tasks:
        with console.working("fetching tasks", asked.quiet):
            names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
            wanted = replace(wanted, tasks=tasks.prepare(names, asked.task_files, asked.limit))
    kept_in = None if base is None or asked.no_cache else asked.cache or cache.FOLDER
    with console.steps("evaluating", asked.quiet) as step:
        result = evaluate.evaluate(models, base, asked.text, asked.windows, asked.context, asked.device, step,
                                   asked.stream, kept_in)
        beside.add(result, models, base, wanted, step)
    return result
