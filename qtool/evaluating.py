"""What `qtool eval` does: refuses what does not go together, opens the checkpoints, shows the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    if asked.cache is not None and asked.no_cache:
        raise InputError("--cache and --no-cache exclude each other; choose one")
    if asked.against is None and (asked.cache is not None or asked.no_cache):
        raise InputError("--cache and --no-cache are about the model that --against names; without it nothing is kept")


def evaluated(asked: Asked) -> dict[str, Any]:
    """What `--json` prints."""
    with console.working(f"reading {asked.paths[0]}", asked.quiet):
        from qtool import evaluate
        from qtool.decode import open_model
        from qtool.evaluate import cache

        models = [open_model(path) for path in asked.paths]
        base = open_model(asked.against) if asked.against else None
    kept_in = None if base is None or asked.no_cache else asked.cache or cache.FOLDER
    with console.steps("evaluating", asked.quiet) as step:
        return evaluate.evaluate(models, base, asked.text, asked.windows, asked.context, asked.device, step,
                                 asked.stream, kept_in)
