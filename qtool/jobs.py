"""Many runs from one file: a list, or every model with every recipe.

Each job is `qtool quantize` in a process of its own (processes.py), here or on a Ray cluster (on_ray.py). First all are
planned; then those that can run do. The state of a job is in its output folder, so the same command again does what is
missing. The summary is a report: it alone has times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from qtool import manifest, processes, recipe, storage
from qtool.errors import QtoolError, RecipeError, RunError
from qtool.processes import Ended, Task

SCHEMA = 1
SUMMARY = "jobs-summary.json"
DONE, THERE, FAILED, WAITING = "done", "already there", "failed", "waiting"
UNKNOWN = {"status": WAITING, "message": "", **dict.fromkeys((
    "seconds", "peak_memory", "source_bytes", "weight_bytes", "bits_per_weight", "error", "planned_memory",
    "planned_seconds", "device", "samples", "host", "log"))}
Runner = Callable[[Sequence[Task]], Iterator[Ended]]
Tell = Callable[[str], None]


class How(recipe.Strict):
    """One of recipe and method, as `quantize` takes them; set: keys of the recipe.  name: in the output's name."""

    recipe: str | None = None
    method: str | None = None
    set: dict[str, Any] = {}
    name: str | None = None
    cpus: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> How:
        if (self.recipe is None) == (self.method is None):
            raise ValueError("a job has recipe (a file or a ready recipe) or method, one of the two")
        return self

    @property
    def label(self) -> str:
        return self.name or (Path(self.recipe).stem if self.recipe else self.method or "")


class Job(How):
    """out: in the folder of all outputs; without, MODEL-NAME."""

    model: str
    out: str | None = None

    @property
    def output(self) -> str:
        model = Path(self.model.partition("@")[0] if not Path(self.model).exists() else self.model)
        return self.out or f"{model.stem if model.suffix == '.gguf' else model.absolute().name}-{self.label}"


class Matrix(recipe.Strict):
    """Every model with every recipe."""

    models: tuple[str, ...] = Field(min_length=1)
    recipes: tuple[How, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("recipes"), list):
            return value
        return {**value, "recipes": [{"recipe": one} if isinstance(one, str) else one for one in value["recipes"]]}


class Jobs(recipe.Strict):
    """A jobs file. out: the folder of all outputs.  set: for every job, before its own."""

    jobs: tuple[Job, ...] = Field(min_length=1)
    out: Path = Path()
    set: dict[str, Any] = {}


@dataclass
class Entry:
    """One job on its way: what is asked for, and what is known so far."""

    job: Job
    out: Path
    known: dict[str, Any] = field(default_factory=lambda: dict(UNKNOWN))


def load(path: Path) -> Jobs:
    """Read a jobs file. Raises RecipeError, also for two jobs that would write to one place."""
    try:
        made = Jobs.model_validate(_listed(recipe.document(path, "jobs file")))
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(map(_complaint, error.errors()))) from None
    places: dict[Path, int] = {}
    for number, job in enumerate(made.jobs, 1):
        try:
            folder, place = made.out.resolve(), (made.out / job.output).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(f"{path}: job {number} names no possible file: {error}; see its model, out and "
                              "name") from None
        if folder not in place.parents:
            raise RecipeError(f"{path}: job {number} would write to {made.out / job.output}, outside of {made.out}, "
                              "the folder of all outputs; give it a name in there")
        if place in places:
            raise RecipeError(f"{path}: jobs {places[place]} and {number} would both write to {made.out / job.output}; "
                              "give one of them an out, or its recipe a name")
        places[place] = number
    return made


def _listed(data: Any) -> Any:
    """A matrix as the list that it stands for."""
    if not isinstance(data, Mapping) or not isinstance(data.get("jobs"), Mapping):
        return data
    matrix = Matrix.model_validate(data["jobs"])
    hows = [how.model_dump(exclude_unset=True) for how in matrix.recipes]
    return {**data, "jobs": [{"model": model, **how} for model in matrix.models for how in hows]}


def planned(path: Path, device: str, restart: bool) -> dict[str, Any]:
    """Plan every job, in this process; returns the summary, in which those that can run are "waiting"."""
    # what is imported takes seconds, and memory that a waiting process need not hold
    from qtool import devices, prepare
    from qtool.outputs import make_plan

    began, made = time.monotonic(), load(path)
    entries = entries_of(made)
    for entry in entries:
        try:
            job = entry.job
            asked = recipe.load(job.recipe) if job.recipe else recipe.preset(job.method or "")
            checkpoint = prepare.open_source(job.model)
            plan = make_plan(checkpoint, recipe.override(asked, {**made.set, **job.set}, "set"), entry.out, device)
            devices.refuse_missing(plan.device)
            entry.known |= _planned(prepare.dry_run(checkpoint, plan), entry.out, restart)
        except QtoolError as error:
            entry.known |= {"status": FAILED, "message": str(error)}
    return _summary(path, made.out, entries, began)


@contextmanager
def runner(ray: str | None) -> Iterator[Runner]:
    """What runs tasks: this machine, one after the other, or the Ray cluster at this address."""
    if ray is None:
        yield processes.one_by_one
        return
    from qtool import on_ray

    with on_ray.cluster(ray) as there:
        yield there


def run(path: Path, device: str, restart: bool, tell: Tell, runner: Runner) -> dict[str, Any]:
    """Plan all jobs, run those that are missing; returns the summary, which also lies in the folder of the outputs.

    Raises RecipeError for a bad jobs file and OutputError for a bad folder; a job that fails is a line of the summary.
    """
    began, made = time.monotonic(), load(path)
    entries, options = entries_of(made), ["--device", device, *(["--restart"] if restart else [])]
    tell(f"planning {len(entries)} jobs")
    words = ("jobs", str(path), *options, "--dry-run", "--json")
    plans = next(runner([Task(0, words, Path.cwd(), gpus=int(device.startswith("cuda")))]))
    if not plans.said:
        raise RunError(f"the jobs could not be planned: {plans.message}")
    for entry, line in zip(entries, json.loads(plans.said)["jobs"], strict=True):
        entry.known = {key: line[key] for key in UNKNOWN}
        if entry.known["status"] != WAITING:
            tell(_line(entry))
    tasks = [_task(number, entry, made, options) for number, entry in enumerate(entries)
             if entry.known["status"] == WAITING]
    _save(_summary(path, made.out, entries, began))
    for count, ended in enumerate(runner(tasks), 1):
        entry = entries[ended.number]
        entry.known |= _outcome(entry.out, ended)
        tell(f"{count}/{len(tasks)} {_line(entry)}")
        _save(_summary(path, made.out, entries, began))
    return _summary(path, made.out, entries, began)


def refuse_failed(summary: Mapping[str, Any]) -> None:
    """Raise RunError when a job failed."""
    failed = [entry["out"] for entry in summary["jobs"] if entry["status"] == FAILED]
    if failed:
        raise RunError(f"{len(failed)} of {len(summary['jobs'])} jobs failed: {', '.join(failed)}; the same command "
                       "again does what is missing")


def entries_of(made: Jobs) -> list[Entry]:
    return [Entry(job, made.out / job.output) for job in made.jobs]


def _planned(plan: Mapping[str, Any], out: Path, restart: bool) -> dict[str, Any]:
    """What a plan tells of its job."""
    known = {"planned_memory": plan["peak_memory"], "planned_seconds": plan["seconds"],
             "source_bytes": plan["source_bytes"], "weight_bytes": plan["weight_bytes"],
             "bits_per_weight": plan["bits_per_weight"], "device": plan["device"], "samples": plan["samples"]}
    state, changed = plan["output"]["state"], plan["output"]["differs"]
    if state == "finished":
        return {**known, "status": THERE, **_results(out)}
    if state == "other" or (changed and not restart):
        what = "an unfinished run of something else" if state == "unfinished" else "something else"
        remedy = "--restart discards it" if state == "unfinished" else "remove it"
        return {**known, "status": FAILED, "message": f"{out} holds {what}: {'; '.join(changed[:5])}; {remedy}, or "
                                                      "give the job another out or name"}
    return {**known, "status": WAITING}


def _task(number: int, entry: Entry, made: Jobs, options: Sequence[str]) -> Task:
    """The run, with its resources: memory as planned, a GPU where it computes on one, cores where text is run."""
    job, known = entry.job, entry.known
    words = ["quantize", *(["--recipe", job.recipe] if job.recipe else ["--method", job.method or ""])]
    for key, value in {**made.set, **job.set}.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()
        words += ["--set", f"{key}={text}"]
    known["log"] = f"{entry.out}.log"
    return Task(number, (*words, "--out", str(entry.out), *options, "--", job.model), Path.cwd(), Path(known["log"]),
                job.cpus or (2 if known["samples"] else 1), int(known["device"].startswith("cuda")),
                known["planned_memory"])


def _outcome(out: Path, ended: Ended) -> dict[str, Any]:
    return {"status": FAILED if ended.status else DONE, "seconds": round(ended.seconds, 3), "message": ended.message,
            "peak_memory": ended.peak_memory or None, "host": ended.host, **({} if ended.status else _results(out))}


def _results(out: Path) -> dict[str, Any]:
    """Sizes and errors from the manifest of a finished output."""
    made = manifest.load(out)
    return {"source_bytes": made["totals"]["source_bytes"], "weight_bytes": made["totals"]["weight_bytes"],
            "bits_per_weight": made["totals"]["bits_per_weight"], "error": manifest.errors(made["layers"])}


def _summary(path: Path, folder: Path, entries: Sequence[Entry], began: float) -> dict[str, Any]:
    lines = [{"model": entry.job.model, "recipe": entry.job.recipe, "method": entry.job.method, "set": entry.job.set,
              "out": str(entry.out), **entry.known} for entry in entries]
    counts = {status.replace(" ", "_"): sum(line["status"] == status for line in lines)
              for status in (DONE, THERE, FAILED)}
    return {"schema": SCHEMA, "file": str(path), "out": str(folder), **counts,
            "seconds": round(time.monotonic() - began, 3), "jobs": lines}


def _save(summary: Mapping[str, Any]) -> None:
    folder = Path(summary["out"])
    try:
        for place in {folder, *(Path(line["out"]).parent for line in summary["jobs"])}:
            place.mkdir(parents=True, exist_ok=True)
        manifest.write_json(folder / SUMMARY, summary)
    except OSError as error:
        raise storage.unusable(error, folder / SUMMARY, "cannot be written", "out") from None


def _line(entry: Entry) -> str:
    message = entry.known["message"].partition("\n")[0]
    return f"{entry.out}: {entry.known['status']}" + (f": {message}" if message else "")


def _complaint(entry: Any) -> str:
    key = ".".join(map(str, entry["loc"]))
    if entry["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    return f"{key or 'a jobs file'}: {entry['msg'].removeprefix('Value error, ')}"

