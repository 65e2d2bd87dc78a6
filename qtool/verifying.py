"""`qtool inspect PATH --verify`: the files first, then what opens and decodes, with an original what it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtool import console, html_report, inspect
from qtool.checkpoint.explained import UNUSABLE
from qtool.decode import Source
from qtool.errors import (
    CalibrationError,
    CheckpointError,
    InputError,
    ModelError,
    NumericalError,
    QtoolError,
    VerificationError,
)

WINDOWS, CONTEXT = 4, 256  # of built-in text that never calibrates
LEAST_LIMIT = 1.0  # nats
PREDICTIONS = ("kl", "top1_agreement")


def guarded(path: str, look: Callable[[], html_report.Run], quiet: bool) -> html_report.Run:
    """What look() gives, its problems after those of the files; of files that cannot be opened, the problems alone.

    Raises what has nothing to do with the files.
    """
    if not Path(path).expanduser().exists():
        return look()
    try:
        with console.steps("hashing", quiet) as step:
            problems = inspect.damage(path, step)
    except VerificationError as error:
        return _broken(path, [str(error)])
    try:
        run = look()
    except (QtoolError, *UNUSABLE) as error:
        if not problems and not isinstance(error, (CheckpointError, ModelError)):
            raise
        return _broken(path, [*problems, f"{type(error).__name__}: {error}" if not isinstance(error, QtoolError)
                              else str(error)])
    run.summary["problems"] = [*problems, *run.summary["problems"]]
    return run


def _broken(path: str, problems: list[str]) -> html_report.Run:
    return html_report.Run({"schema": inspect.SCHEMA, "path": path, "problems": problems, "loaders": []}, [], None)


def predictions(source: Source, base: Source, step: inspect.Step) -> tuple[dict[str, Any], list[str]]:
    """How far what `source` predicts is from what `base` does, on a few windows; and what is wrong with that.

    Wrong is a mean KL divergence that is not finite, or not below ln(vocabulary) less the base's own loss, about how
    far the uniform distribution is from the base: such a model knows less than one for which all tokens are alike.
    A base that knows hardly more itself (random weights) gives no such limit; then it is 1 nat.
    """
    from qtool import evaluate

    positions = base.config.get("max_position_embeddings")
    context = min(CONTEXT, positions) if isinstance(positions, int) else CONTEXT
    try:
        told = evaluate.evaluate([source], base, windows=WINDOWS, context=context, step=step)
    except NumericalError as error:
        return {"predictions": None, "no_predictions": str(error)}, [str(error)]
    except (CalibrationError, ModelError, InputError) as error:
        return {"predictions": None, "no_predictions": str(error)}, []
    row, loss = told["models"][0], told["against"]["nll"]
    limit = max(LEAST_LIMIT, math.log(_vocabulary(base)) - loss)
    found = {**{key: row[key]["mean"] for key in PREDICTIONS}, "limit": limit, "windows": WINDOWS, "context": context}
    wrong = [] if found["kl"] < limit else [
        f"{source.origin}: its predictions are {found['kl']:.3g} nats of KL divergence away from those of "
        f"{base.origin}, no nearer than {limit:.3g}, where all tokens are alike to it; it is damaged, or its scheme is "
        "too coarse"]
    return {"predictions": found, "no_predictions": None}, wrong


def _vocabulary(base: Source) -> int:
    from qtool.models import skeleton

    return skeleton.build(base.directory, base.config, base.specs).vocabulary
