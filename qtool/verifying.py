"""`qtool inspect PATH --verify`: the files first, then what opens and decodes, with an original what it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from qtool import console, found, html_report, inspect
from qtool.checkpoint.header import AGAIN
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
from qtool.explained import Explained
from qtool.files import expanded

WINDOWS, CONTEXT = 4, 256  # of built-in text that never calibrates
LEAST_LIMIT = 1.0  # nats
CHANGE_OTHERS = ("SCALES_INPUTS", "ROTATES")  # steps that also change what is not quantized
PREDICTIONS = ("kl", "top1_agreement")


def guarded(path: str, look: Callable[[], html_report.Run], quiet: bool) -> html_report.Run:
    """What look() gives, its problems after those of the files; of files that cannot be opened, the problems alone.

    Raises what has nothing to do with the files.
    """
    try:
        expanded(path).stat()
    except OSError:
        return look()
    try:
        with console.steps("hashing", quiet) as step:
            problems = inspect.damage(path, step)
    except VerificationError as error:
        return _broken(path, [str(error)])
    try:
        with Explained(Path(path), "cannot be read any further", AGAIN) if problems else nullcontext():
            run = look()
    except QtoolError as error:
        if not problems and not isinstance(error, (CheckpointError, ModelError)):
            raise
        return _broken(path, [*problems, str(error)])
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
    figures = {**{key: row[key]["mean"] for key in PREDICTIONS}, "limit": limit, "windows": WINDOWS, "context": context}
    wrong = [] if figures["kl"] < limit else [
        f"{source.origin}: its predictions are {figures['kl']:.3g} nats of KL divergence away from those of "
        f"{base.origin}, no nearer than {limit:.3g}, where all tokens are alike to it; it is damaged, or its scheme is "
        "too coarse"]
    return {"predictions": figures, "no_predictions": None}, wrong


def unexplained(source: Source, base: Source, changed: list[str]) -> list[str]:
    """Tensors that were to stay as they are, but differ from the model that the manifest says they come from."""
    record = inspect.record_of(source)
    if record is None or not changed or source.kind == "gguf" or record["source"].get("files") != base.hashes():
        return []
    steps = [next(iter(step)) for step in (record["recipe"] or {}).get("steps", ())]
    if any(getattr(found.load("methods", step), mark, False) for step in steps for mark in CHANGE_OTHERS):
        return []
    return [f"{name}: is not quantized, but differs from that of {base.origin}" for name in changed]


def _vocabulary(base: Source) -> int:
    from qtool.models import skeleton

    return skeleton.build(base.directory, base.config, base.specs).vocabulary
