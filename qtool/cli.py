"""The command line: parses, calls, shows. Heavy imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

import qtool
from qtool import console, failures, flags, heap
from qtool import options as o
from qtool.errors import InputError, QtoolError

app = typer.Typer(
    name="qtool", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turns Hugging Face checkpoints into quantized ones, block by block, on machines far smaller than the model.",
)

LEAST = 16 << 20  # bytes of memory for any command: with less, libraries in Rust would end the process
GOES_ON = {
    "quantize": "; finished blocks are kept, the same command goes on from there",
    "jobs": "; finished blocks are kept, the same command goes on from there",
    "export": "; what was written is kept, the same command goes on from there",
    "eval": "; the same command starts again, with what the cache has of the original",
}
_stopped_by: list[int] = []  # the signal that ends this process


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; no Exception, so that nothing on the way mistakes it for a failure."""

    def __init__(self, number: int) -> None:
        self.number = number


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"qtool {qtool.__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, metavar=" ",
                                                help="Print the version.")] = False) -> None: ...


@app.command(epilog="Examples:\n\nqtool quantize Qwen/Qwen3-8B --method gptq --bits 4\n\n"
                    "qtool quantize ./model --recipe gptq-int4 --set calibration.samples=256 --dry-run")
def quantize(
    model: o.Model, method: o.Method = None, recipe: o.RecipeName = None, bits: o.Bits = None, budget: o.Budget = None,
    group_size: o.GroupSize = None, symmetric: o.Symmetric = False, asymmetric: o.Asymmetric = False,
    double_quant: o.DoubleQuant = False, kv_cache: o.KvCache = None, format_: o.Format = None,
    calibration: o.Text = None, samples: o.Samples = None, sequence_length: o.Length = None, dtype: o.Dtype = None,
    seed: o.Seed = None, set_: o.Settings = None, imatrix: o.NoImatrix = None, out: o.Out = None,
    device: o.Device = "auto",
    dry_run: o.DryRun = False, probe: o.Probe = False, redo: o.Redo = None, restart: o.Restart = False,
    keep_statistics: o.KeepStatistics = False,
    json: o.Json = False, quiet: o.Quiet = False,
) -> None:
    """Quantize MODEL into a new directory.

    The same command goes on where an earlier one stopped.
    """
    flags.refuse_imatrix(model, method, imatrix)
    whole, budget = flags.bits_or_budget(bits, budget)
    typed = {"--bits": ("scheme.bits", whole), "--budget": ("budget", budget),
             "--group-size": ("scheme.group_size", flags.group_size(group_size)),
             "--symmetric": ("scheme.symmetric", flags.symmetric(symmetric, asymmetric)),
             "--format": ("format", format_), "--kv-cache": ("kv_cache", kv_cache),
             "--double-quant": ("scheme.double_quant", double_quant or None),
             "--calibration": ("calibration.source", calibration), "--samples": ("calibration.samples", samples),
             "--sequence-length": ("calibration.sequence_length", sequence_length), "--dtype": ("dtype", dtype),
             "--seed": ("seed", seed), "--keep-statistics": ("keep_statistics", keep_statistics or None)}
    if probe and not dry_run:
        raise InputError("--probe goes with --dry-run")
    from qtool import quantizing

    given = flags.Given(method, recipe, typed, set_ or [])
    if redo:
        quantizing.redo(quantizing.Wanted(model, out, device, dry_run, probe, restart, json, quiet), given, redo)
    else:
        quantizing.quantize(quantizing.Wanted(model, out, device, dry_run, probe, restart, json, quiet), given)


@app.command(epilog="Examples:\n\nqtool inspect ./Qwen3-8B-gptq-int4-g128 --against Qwen/Qwen3-8B --sort error\n\n"
                    "qtool inspect Qwen/Qwen3-8B --memory --context 32768 --batch 4 --kv fp8\n\n"
                    "qtool inspect OUT --layers --json | jq -r '.layers[] | select(.sqnr_db < 15) | .name'\n\n"
                    "qtool inspect OUT OUT2 --report report.html")
def inspect(
    paths: o.MaybeCheckpoints = None, layers: o.Layers = False, heatmap: o.Heatmap = False,
    headers_only: o.HeadersOnly = False, sort: o.Sort = None,
    top: o.Top = None, outliers: o.Outliers = False, against: o.Original = None, tokens: o.Tokens = None,
    diff: o.Diff = None, memory: o.Memory = False, context: o.ContextTokens = None, batch: o.Batch = None,
    kv: o.Kv = None, verify: o.Verify = False, report: o.Report = None, system: o.System = False,
    json: o.Json = False, csv: o.Csv = False,
) -> None:
    """Show what is in a checkpoint: schemes, sizes, bits per weight, errors; and what it needs to run."""
    with console.working("reading", json or csv):
        from qtool import inspecting

    inspecting.run(inspecting.Asked(tuple(paths or ()), layers, heatmap, headers_only, sort, top, outliers, against,
                                    tokens, diff, memory, context, batch, kv, verify, report, system, json, csv))


@app.command("eval", epilog="Examples:\n\n"
                            "qtool eval ./Qwen3-8B-gptq-int4-g128 --against Qwen/Qwen3-8B --text wiki.test.txt\n\n"
                            "qtool eval ./A ./B ./C --against MODEL --speed --memory-context 32768 --markdown\n\n"
                            "qtool eval ./A --against MODEL --tasks arc_easy,hellaswag --limit 200")
def evaluate(
    paths: o.Checkpoints, against: o.Reference = None, text: o.Corpus = "builtin", windows: o.Windows = 20,
    context: o.Context = 1024, stream: o.Stream = None, cache: o.CacheFolder = None, no_cache: o.NoCache = False,
    device: o.Device = "auto", memory_context: o.MemoryContext = None, memory_batch: o.MemoryBatch = None,
    speed: o.Speed = False, tasks: o.Tasks = None, limit: o.Limit = None, task_files: o.TaskFiles = None,
    markdown: o.Markdown = False, json: o.Json = False, quiet: o.Quiet = False,
) -> None:
    """Measure perplexity, and with --against how far the predictions moved; several PATHs side by side."""
    from qtool import evaluating

    evaluating.run(evaluating.Asked(paths, against, text, windows, context, stream, cache, no_cache, device,
                                    memory_context, memory_batch, speed, tasks, limit, task_files, markdown, json,
                                    quiet))


@app.command(epilog="Examples:\n\nqtool export ./Qwen3-8B-gptq-int4-g128 --to gptq\n\n"
                    "qtool export ./Qwen3-8B-awq --to mlx --requantize int4-g64\n\n"
                    "qtool export Qwen/Qwen3-8B --to gguf --type q4_k_m\n\n"
                    "qtool export Qwen/Qwen3-8B --to imatrix --calibration wiki.train.txt\n\n"
                    "qtool export Qwen/Qwen3-0.6B --to text --samples 256 --out own.jsonl\n\n"
                    "qtool export ./Qwen3-8B-gptq-int4-g128 --push-to me/Qwen3-8B-gptq --private")
def export(path: o.Checkpoint, to: o.Target = None, requantize: o.Requantize = None, out: o.ExportOut = None,
           type: o.GgufType = None, imatrix: o.Imatrix = None, accuracy_level: o.AccuracyLevel = None,
           dtype: o.GraphDtype = None, calibration: o.ExportText = None, samples: o.ExportSamples = None,
           sequence_length: o.ExportLength = None, device: o.ExportDevice = None, push_to: o.PushTo = None,
           private: o.Private = False, restart: o.Restart = False, json: o.Json = False,
           quiet: o.Quiet = False) -> None:
    """Write a checkpoint in another format, a quantized one with the same codes and scales; or upload it.

    Also what a model's inputs look like (--to imatrix), and text that it makes up for its calibration (--to text).
    """
    if to is None and push_to is None:
        raise InputError("give --to FORMAT, --push-to NAMESPACE/NAME, or both")
    if (out is not None and to is None) or (private and push_to is None):
        raise InputError("--out goes with --to, and --private with --push-to")
    if push_to is not None:
        from qtool import push

        push.refuse_bad_name(push_to)
    result: dict[str, Any] = {"schema": 1, "out": path}
    if to is not None:
        from qtool import exports

        wanted = exports.Wanted(to, out, requantize, type, imatrix, accuracy_level, dtype, calibration, samples,
                                sequence_length, device, restart)
        result = exports.exported(path, wanted, json or quiet)
    if push_to is not None:
        result["pushed"] = push.push(Path(result["out"]), push_to, private, json or quiet)
    _show(result, "exported" if to else "pushed", json, quiet)


@app.command(epilog="Examples:\n\nqtool jobs nightly.yaml --dry-run\n\n"
                    "qtool jobs nightly.yaml --json | jq '.jobs[] | {out, status, message}'")
def jobs(file: o.JobsFile, device: o.Device = "auto", ray: o.Ray = None, dry_run: o.DryRun = False,
         restart: o.Restart = False, json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Quantize many: a YAML file lists jobs, or models × recipes.

    One that fails does not stop the others; the exit status is then 1. The same command again does what is missing.
    """
    from qtool import jobs as batch

    if dry_run:
        summary = batch.planned(file, device, restart)
    else:
        with batch.runner(ray) as runner:
            summary = batch.run(file, device, restart, lambda text: console.note(text, json or quiet), runner)
    _show(summary, "jobs", json, quiet)
    batch.refuse_failed(summary)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 failed, 2 bad input, 3 not verified, 130 and 143 stopped, 141 when the
    reader of stdout has gone. The only broad except."""
    console.reopen()
    given = list(sys.argv[1:] if arguments is None else arguments)
    told = "--traceback" in given  # hidden; works anywhere on the line
    given = [word for word in given if word != "--traceback"]
    for package in ("transformers", "gguf"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets ?, not a crash
    try:
        with _stoppable():
            heap.reserve(LEAST)
            app(given, prog_name="qtool")
    except Stopped as stop:
        _leave(stop.number, given)
    except Exception as error:
        if _stopped_by:  # what an import made of it
            _leave(_stopped_by[0], given)
        if told:
            traceback.print_exc()
        sys.exit(_explained(error, told))
    finally:
        console.settle()


def _explained(error: Exception, told: bool) -> int:
    """Print the message of a failed command; returns the exit status."""
    if isinstance(error, QtoolError):
        console.error(str(error))
        return error.exit_status
    text, title = failures.described(error)
    if title == failures.BUG and not told:
        text += "; the same command with --traceback shows where"
    console.error(text, title)
    return 1


def _leave(number: int, given: Sequence[str]) -> NoReturn:
    """Say how to go on after a signal, and end; threads are not waited for, one may be in the middle of a download."""
    goes_on = GOES_ON.get(given[0], "") if given and not {"--dry-run", "--help"}.intersection(given) else ""
    console.error(f"stopped by {signal.Signals(number).name}{goes_on}", "stopped")
    atexit._run_exitfuncs()  # temporary folders
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(128 + number)


@contextmanager
def _stoppable() -> Iterator[None]:
    """The first SIGINT or SIGTERM becomes Stopped, so that files are closed and locks released on the way out; another
    one meanwhile ends the process, which harms as little as SIGKILL."""
    def stop(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        _stopped_by.append(number)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if _stopped_by else handler)


def _show(result: dict[str, Any], how: str, json: bool, quiet: bool) -> None:
    from qtool import report

    if json:
        console.show_json(result)
    elif not quiet:
        console.show(getattr(report, how)(result))
