"""What the page knows of the checkpoints that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qtool import heatmap
from qtool.heatmap import Row, Scale

MEANINGS = {
    "output_error": ("Error of the outputs", "Squared error of the outputs of each linear over their energy, measured "
                     "from the files on the inputs that it has in the original."),
    "relative_error": ("Error of the outputs", "Squared error of the outputs of each linear over their energy, on "
                       "held-out calibration text."),
    "weight_error": ("Error of the weights", "Squared error of the weights of each linear over their energy."),
}
NAMES = {"output_error": "output error, measured", "relative_error": "output error",
         "weight_error": "weight error"}


@dataclass(frozen=True)
class Run:
    """A checkpoint as `inspect` sees it: its summary, a row per linear, the manifest if there is one."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    record: dict[str, Any] | None


@dataclass(frozen=True)
class Scales:
    """One scale of colours for all runs of a page, so that maps can be compared; by key of the error."""

    errors: Mapping[str, Scale]
    bits: Scale | None


def scales(runs: Sequence[Run]) -> Scales:
    placed = [heatmap.cells(run.rows) for run in runs]

    def figures(measure: heatmap.Measure) -> list[float]:
        return [value for cells in placed for value in heatmap.known(cells, measure)]

    errors = {key: scale for key in heatmap.ERRORS if (scale := heatmap.error_scale(figures(heatmap.median(key))))}
    return Scales(errors, heatmap.bits_scale(figures(heatmap.bits)))


def names(runs: Sequence[Run]) -> list[str]:
    """What the runs are called: the last word of their path, with the one before it where two are alike."""
    paths = [PurePath(run.summary["path"]) for run in runs]
    last = [path.name or str(path) for path in paths]
    return [name if last.count(name) == 1 else "/".join(path.parts[-2:])
            for name, path in zip(last, paths, strict=True)]


def model(run: Run) -> str:
    """The model that a checkpoint was made from, as far as it is known."""
    made = run.summary["made_by"]
    return str(made["source"]) if made and made["source"] else names([run])[0]


def source_bytes(run: Run) -> int | None:
    """Bytes of the original's tensors, from the manifest."""
    return ((run.record or {}).get("totals") or {}).get("source_bytes")


def spread(rows: Sequence[Row], key: str) -> tuple[float, float, str] | None:
    """(median, worst, name of the worst) of one kind of error; None where it is not known."""
    known = sorted((row[key], row["name"]) for row in rows if row.get(key) is not None)
    return (known[len(known) // 2][0], *known[-1]) if known else None


def common_error(runs: Sequence[Run]) -> str | None:
    """The error that every run knows: of the outputs, else of the weights; None where they have none in common."""
    return next((key for key in heatmap.ERRORS
                 if all(any(row.get(key) is not None for row in run.rows) for run in runs)), None)


def kept(run: Run) -> dict[tuple[int, str], str]:
    """Linears of blocks that stayed as they were: where they stand in the map, and why."""
    told = {one["name"]: one["reason"] for one in (run.record or {}).get("kept") or []}
    whole = heatmap.cells([*run.rows, *({"name": name, "kept": reason} for name, reason in told.items())])
    return {place: f"{rows[0]['name']}\nnot quantized: {rows[0]['kept']}" for place, rows in whole.rows.items()
            if all("kept" in row for row in rows)}


def format_name(run: Run) -> str:
    return "GGUF" if run.summary["kind"] == "gguf" else str(run.summary["format"])


def how(run: Run) -> str:
    """Method, schemes and format in a line."""
    made = run.summary["made_by"]
    labels = [one["scheme"] for one in sorted(run.summary["schemes"], key=lambda one: one["bits_per_weight"])]
    schemes = ", ".join(labels) if len(labels) < 4 else f"{len(labels)} schemes from {labels[0]} to {labels[-1]}"
    return " · ".join(part for part in (made["method"] if made else "", schemes, format_name(run)) if part)
