"""What `qtool inspect` does: puts together what was asked for, shows it, fails when a check did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool import console, inspect, report
from qtool.decode import open_model
from qtool.errors import InputError, VerificationError

Rows = list[dict[str, Any]]
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Asked:
    """The arguments and options of the command."""

    path: str | None
    layers: bool = False
    outliers: bool = False
    against: str | None = None
    verify: bool = False
    system: bool = False
    json: bool = False
    csv: bool = False

    @property
    def quiet(self) -> bool:
        return self.json or self.csv


def run(asked: Asked) -> None:
    """Raises InputError for what does not go together, VerificationError when --verify found something."""
    refuse(asked)
    result: dict[str, Any] = {"schema": inspect.SCHEMA}
    rows: Rows = []
    if asked.system:
        result["system"] = inspect.system()
    if asked.path is not None:
        summary, rows = _inspected(asked, asked.path)
        result |= summary
    show(asked, result, rows)
    refuse_problems(asked.path, result.get("problems") or [])


def refuse(asked: Asked) -> None:
    if asked.json and asked.csv:
        raise InputError("--json and --csv exclude each other; choose one")
    if asked.path is None and not asked.system:
        raise InputError("give the PATH of a checkpoint, or --system")
    if asked.path is None and (asked.layers or asked.outliers or asked.against or asked.verify or asked.csv):
        raise InputError("--layers, --outliers, --against, --verify and --csv need the PATH of a checkpoint")


def _inspected(asked: Asked, path: str) -> tuple[dict[str, Any], Rows]:
    """The summary of a checkpoint, with all that was asked for; and its layers."""
    with console.working(f"reading {path}", asked.quiet):
        source = open_model(path)
        result = inspect.summary(source)
        rows = inspect.layers(source, inspect.record_of(source))
    if asked.outliers and (result["outliers"] or {}).get("features") is None:
        raise InputError(f"no outlier features are known of {path}: only a calibrated run with the step 'outliers' "
                         "lists them; quantize with --recipe llm-int8-outliers")
    if asked.against:
        base = open_model(asked.against)
        with console.steps("comparing", asked.quiet) as step:
            result["comparison"] = inspect.compare(source, base, rows, step)
    if asked.verify:
        with console.steps("verifying", asked.quiet) as step:
            result["problems"] = inspect.verify(source, rows, step)
    if asked.layers or asked.outliers:
        result["layers"] = rows
    return result, rows


def show(asked: Asked, result: Mapping[str, Any], rows: Rows) -> None:
    """As JSON, as CSV or as tables."""
    if asked.json:
        console.show_json(result)
        return
    if asked.csv:
        console.show_csv(rows, [key for key in inspect.FIRST if any(key in row for row in rows)])
        return
    parts = [report.system(result["system"])] if asked.system else []
    if asked.path is not None:
        parts += [report.inspected(result), *([report.layers(rows)] if asked.layers or asked.against else []),
                  *([report.outliers(rows)] if asked.outliers else [])]
    console.show(report.stacked(parts))


def refuse_problems(path: str | None, problems: list[str]) -> None:
    if problems:
        raise VerificationError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {path}:\n"
                                + "\n".join(problems[:PROBLEMS_SHOWN]))
