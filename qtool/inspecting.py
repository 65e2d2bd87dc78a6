"""What `qtool inspect` does: puts together what was asked for, shows it, fails when a check did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qtool import console, heatmap, html_report, inspect, report, verifying
from qtool.decode import Source, open_model
from qtool.errors import CheckpointError, InputError, VerificationError
from qtool.inspect import graph, loaders, statistics, tables
from qtool.units import size

Rows = list[dict[str, Any]]
PROBLEMS_SHOWN = 20
TOKENS = 512  # that outputs are compared on
CONTEXT = 4096


@dataclass(frozen=True)
class Asked:
    """The arguments and options of the command; None: not given."""

    paths: tuple[str, ...] = ()
    layers: bool = False
    heatmap: bool = False
    headers_only: bool = False
    sort: str | None = None
    top: int | None = None
    outliers: bool = False
    against: str | None = None
    tokens: int | None = None
    diff: tuple[str, str] | None = None
    memory: bool = False
    context: int | None = None
    batch: int | None = None
    kv: str | None = None
    verify: bool = False
    report: Path | None = None
    system: bool = False
    json: bool = False
    csv: bool = False

    @property
    def path(self) -> str | None:
        return self.paths[0] if self.paths else None

    @property
    def several(self) -> bool:
        return len(self.paths) > 1

    @property
    def quiet(self) -> bool:
        return self.json or self.csv

    @property
    def lists(self) -> bool:
        """Whether the layers are shown."""
        return self.layers or self.sort is not None or self.top is not None


def run(asked: Asked) -> None:
    """Raises InputError for what does not go together, VerificationError when --verify found something."""
    refuse(asked)
    if asked.diff:
        _diff(asked, *asked.diff)
        return
    result: dict[str, Any] = {"schema": inspect.SCHEMA}
    rows: Rows = []
    if asked.system:
        result["system"] = inspect.system()
    if asked.path is not None:
        runs = [_run(asked, path) for path in asked.paths]
        result |= {"checkpoints": [run.summary for run in runs]} if asked.several else runs[0].summary
        rows = inspect.arranged(runs[0].rows, asked.sort, asked.top)
        if asked.lists or asked.outliers:
            result["layers"] = rows
        if asked.report is not None:
            with console.working("drawing", asked.quiet):
                result["report"] = {"path": str(asked.report), "bytes": html_report.write(asked.report, runs)}
    show(asked, result, rows)
    refuse_problems(asked.path, result.get("problems") or [])


def refuse(asked: Asked) -> None:
    of_path = {"--layers": asked.layers, "--outliers": asked.outliers, "--against": asked.against,
               "--verify": asked.verify, "--heatmap": asked.heatmap, "--report": asked.report,
               "--memory": asked.memory, "--sort": asked.sort, "--top": asked.top}
    given = [name for name, value in of_path.items() if value]
    sizes = {"--context": asked.context, "--batch": asked.batch, "--kv": asked.kv}
    if asked.json and asked.csv:
        raise InputError("--json and --csv exclude each other; choose one")
    if asked.diff and (asked.path or given or asked.system):
        raise InputError(f"--diff A B compares two checkpoints and goes with --json and --csv alone; leave "
                         f"{asked.path or ', '.join(given) or '--system'} out")
    if not asked.diff and asked.path is None and not asked.system:
        raise InputError("give the PATH of a checkpoint, --diff A B, or --system")
    if not asked.diff and asked.path is None and (given or asked.csv):
        raise InputError(f"{', '.join([*given, *(['--csv'] if asked.csv else [])])} need the PATH of a checkpoint")
    for name, value in sizes.items():
        if value is not None and not asked.memory:
            raise InputError(f"{name} goes with --memory")
    if asked.tokens is not None and not asked.against:
        raise InputError("--tokens is what outputs are compared on; it goes with --against MODEL")
    if asked.several and (asked.report is None or asked.csv or {*given} - {"--report", "--against"}):
        raise InputError("several PATHs go with --report, and with --against and --json beside it; for all else "
                         "give one")
    if asked.report is not None:
        html_report.refuse(asked.report)
    if asked.headers_only and not asked.lists:
        raise InputError("--headers-only goes with --layers")


def _run(asked: Asked, path: str) -> html_report.Run:
    look = partial(_graph if graph.is_graph(path) else _inspected, asked, path)
    return verifying.guarded(path, look, asked.quiet) if asked.verify else look()


def _inspected(asked: Asked, path: str) -> html_report.Run:
    """The summary of a checkpoint, with all that was asked for; its layers; its manifest."""
    with console.working(f"reading {path}", asked.quiet):
        source = open_model(path)
        result, record = inspect.summary(source), inspect.record_of(source)
        rows = inspect.layers(source, record)
        if asked.memory:
            result["memory"] = inspect.memory(source, *_sizes(asked), asked.kv)
    if asked.outliers and (result["outliers"] or {}).get("features") is None:
        raise InputError(f"no outlier features are known of {path}: only a calibrated run with the step 'outliers' "
                         "lists them; quantize with --recipe llm-int8-outliers")
    _measure(asked, source, rows, result)
    return html_report.Run(result, rows, record)


def _graph(asked: Asked, path: str) -> html_report.Run:
    """The same of an ONNX decoder."""
    others = {"--against": asked.against, "--memory": asked.memory, "--outliers": asked.outliers}
    given = [name for name, value in others.items() if value]
    if given:
        raise InputError(f"{path} is an ONNX decoder; {', '.join(given)} is for checkpoints: ask of the one that it "
                         "was exported from")
    with console.working(f"reading {path}", asked.quiet):
        opened = graph.open_graph(path)
        result, rows = graph.summary(opened), graph.layers(opened)
    if asked.verify:
        with console.steps("verifying", asked.quiet) as step:
            result["problems"], result["loaders"] = graph.verify(opened, step), []
    if (asked.lists or asked.csv) and not asked.headers_only:
        for row, (node, told) in zip(rows, opened.products(), strict=True):
            row.update(statistics.describe(graph.decoded(opened, node, told)))
    return html_report.Run(result, rows, opened.record)


def _sizes(asked: Asked) -> tuple[int, int]:
    """Context and batch of --memory."""
    return CONTEXT if asked.context is None else asked.context, 1 if asked.batch is None else asked.batch


def _measure(asked: Asked, source: Source, rows: Rows, result: dict[str, Any]) -> None:
    """What reads the weights."""
    base, tokens = _original(asked), TOKENS if asked.tokens is None else asked.tokens
    if base is not None:
        with console.steps("comparing", asked.quiet) as step:
            result["comparison"] = inspect.compare(source, base, rows, step, tokens)
    if (asked.lists or (asked.csv and not asked.memory)) and not asked.headers_only:
        with console.steps("measuring", asked.quiet) as step:
            statistics.add(source, rows, step)
    if asked.verify:
        result["decoded_once"] = {}
        with console.steps("verifying", asked.quiet) as step:
            result["problems"] = inspect.verify(source, rows, step, result["decoded_once"])
        result["loaders"] = loaders.check(source)
        result["problems"] += dict.fromkeys(problem for one in result["loaders"] for problem in one["problems"])
        if base is not None:
            result["problems"] += verifying.unexplained(source, base, result["comparison"]["changed_tensors"])
        if base is not None and tokens:
            with console.steps("predicting", asked.quiet) as step:
                told, wrong = verifying.predictions(source, base, step)
            result |= told
            result["problems"] += wrong


def _original(asked: Asked) -> Source | None:
    """The model of --against. Raises InputError."""
    try:
        return open_model(asked.against) if asked.against else None
    except CheckpointError as error:
        raise InputError(f"--against: {error}") from None


def _diff(asked: Asked, first: str, second: str) -> None:
    with console.working(f"reading {first} and {second}", asked.quiet):
        pair = open_model(first), open_model(second)
    with console.steps("comparing", asked.quiet) as step:
        result = inspect.difference(*pair, step)
    if asked.json:
        console.show_json(result)
    elif asked.csv:
        flat = [{"name": one["name"], **{f"{key}_{side}": one[key][place] for key in ("scheme", "bytes", "error")
                                         for place, side in enumerate("ab")}, "equal_tensors": one["equal_tensors"]}
                for one in result["linears"]]
        console.show_csv(flat, ["name", "scheme_a", "scheme_b", "bytes_a", "bytes_b", "error_a", "error_b",
                                "equal_tensors"])
    else:
        console.show(tables.difference(result))


def show(asked: Asked, result: Mapping[str, Any], rows: Rows) -> None:
    """As JSON, as CSV or as tables."""
    if asked.json:
        console.show_json(result)
    elif asked.path is not None and not asked.several and "format" not in result:
        return  # could not be opened; refuse_problems says why
    elif asked.csv and asked.memory:
        lines = [{**row, "methods": " ".join(row["methods"])} for row in result["memory"]["schemes"]]
        console.show_csv(lines, list(lines[0]))
    elif asked.csv:
        console.show_csv(rows, [key for key in inspect.FIRST if any(key in row for row in rows)])
    else:
        parts = [report.system(result["system"])] if asked.system else []
        if asked.path is not None and not asked.several:
            parts += [report.inspected(result), *([tables.layers(rows)] if asked.lists or asked.against else []),
                      *([report.outliers(rows)] if asked.outliers else []),
                      *([tables.memory(result)] if asked.memory else []),
                      *(heatmap.terminal(asked.path, rows) if asked.heatmap else [])]
        if asked.report is not None:
            page = result["report"]
            parts.append(report.facts("Report", [("to", page["path"]), ("size", size(page["bytes"]))]))
        console.show(report.stacked(parts))


def refuse_problems(path: str | None, problems: list[str]) -> None:
    if problems:
        raise VerificationError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {path}:\n"
                                + "\n".join(problems[:PROBLEMS_SHOWN]))
