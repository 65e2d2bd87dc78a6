"""What results look like: plain data in, rich tables out. Nothing here prints or computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool import found, learned, repairs
from qtool.units import millions, percent, size, span

OUTLIERS_SHOWN = 5  # of each linear; JSON has all that the manifest lists


def facts(title: str, rows: Iterable[tuple[str, str | Text]]) -> RenderableType:
    """A title over aligned pairs."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row("  " + key, value)
    return Group(Text(title, style="bold"), grid)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], left: int = 1) -> Table:
    """A table whose first `left` columns are words and whose others are figures."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 1))
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", no_wrap=index > 0,
                        overflow="ellipsis" if index else "fold")
    for row in rows:
        made.add_row(*row)
    return made


def stacked(parts: Sequence[RenderableType]) -> RenderableType:
    """One below the other, a blank line between."""
    return Group(*[piece for part in parts for piece in (part, Text(""))][:-1])


def quantized(manifest: Mapping[str, Any], out: str, seconds: float, redone: int = 0) -> RenderableType:
    """The end of a run, or of a redo of so many linears."""
    totals = manifest["totals"]
    rows: list[tuple[str, str | Text]] = [
        ("to", Text(out, style="bold green")),
        ("size", f"{size(totals['source_bytes'])} → {size(totals['weight_bytes'])} "
                 f"({percent(totals['weight_bytes'] / max(totals['source_bytes'], 1))})"
                 f"{bits(totals['bits_per_weight'])}"),
        *rotated(manifest["rotation"]),
    ]
    rows += _scaled(manifest)
    rows += _allocated(manifest.get("allocation"))
    rows += [("learned", text) for text in learned.sentences(manifest["layers"], manifest.get("learned"))]
    kind, errors = errors_of(manifest["layers"])
    if errors:
        (worst, name), middle = errors[-1], errors[len(errors) // 2][0]
        rows.append(("error", f"median {percent(middle)} of the {kind}, worst {percent(worst)} in {name}"))
    for heading, names in repairs.listed(manifest["layers"]):
        rows.append(("note", Text(f"{len(names)} linear{'s' * (len(names) > 1)} {heading}: {', '.join(names[:3])}"
                                  f"{' ...' if len(names) > 3 else ''}", style="yellow")))
    rows.append(("time", span(seconds)))
    count = len(manifest["layers"])
    done = f"Quantized {count} linears" if count else "Rotated, not quantized"
    return facts(f"Redid {redone} of {count} linears" if redone else done, rows)


def bits(bits: float | None) -> str:
    return f", {bits:.4g} bits per quantized weight" if bits else ""


def rotated(rotation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the rotate step does."""
    if not rotation:
        return []
    parts = [f"residual stream by {rotation['residual']}"] if rotation["residual"] else []
    parts += [f"heads by {one}" for one in rotation["heads"]]
    parts += [f"{name} no longer shares the embedding" for name in rotation["untied"]]
    return [("rotated", ", ".join(parts))]


def _scaled(manifest: Mapping[str, Any]) -> list[tuple[str, str | Text]]:
    """What the steps that scale channels came to; that they found none is no error, but seldom what is wanted."""
    steps = [name for step in manifest["recipe"]["steps"] for name in step
             if getattr(found.load("methods", name), "SCALES_INPUTS", False)]
    count = sum(bool(layer.get("rescaled")) for layer in manifest["layers"])
    if not steps:
        return []
    if count:
        return [("scaled", f"channels of {count} linears, by {', '.join(steps)}")]
    return [("note", Text(f"{', '.join(steps)} did nothing: this model has no channels that can be scaled without "
                          "changing what it computes", style="yellow"))]


def _allocated(allocation: Mapping[str, Any] | None) -> list[tuple[str, str | Text]]:
    """What came of a budget."""
    if not allocation:
        return []
    return [("budget", f"{percent(allocation['bytes'] / allocation['limit_bytes'])} used; expected KL divergence "
                       f"{allocation['loss']:.3g} nats per token")]


def errors_of(layers: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[float, str]]]:
    """Which error the layers have ('outputs' or 'weights') and the sorted (error, name)."""
    for key, kind in (("relative_error", "outputs' energy"), ("weight_error", "weights' energy")):
        errors = sorted((layer[key], layer["name"]) for layer in layers if layer.get(key) is not None)
        if errors:
            return kind, errors
    return "", []


def inspected(data: Mapping[str, Any]) -> RenderableType:
    """The summary of a checkpoint (inspect.summary)."""
    rows: list[tuple[str, str | Text]] = [
        ("architecture", f"{data['architecture']}, {_blocks(data)}{millions(data['parameters'])} parameters, "
                         f"{data['dtype']}"),
        ("stored as", f"{data['format'] or 'plain weights'}, {size(data['weight_bytes'])}, "
                      f"{data['bits_per_parameter']:.4g} bits per parameter{_reached(data)}"),
    ]
    made = data["made_by"]
    if made:
        rows.append(("made by", f"qtool {made['qtool']} from {made['source']}, {made['method']}"
                                + (f", {made['tokens']} tokens of {made['calibration']}" if made["tokens"] else "")))
    rows += _allocated(data["allocation"])
    rows += [("learned", text) for text in learned.told_of(data["learned"])]
    error = data["error"]
    if error:
        rows.append(("error", f"median {percent(error['median'])} of the {error['of']}, "
                              f"worst {percent(error['worst'])} in {error['worst_name']}"))
    if data["kv_cache"]:
        rows.append(("kv cache", f"{data['kv_cache']}, calibrated scales for keys and values of every attention"))
    rows += _outliers_line(data["outliers"])
    rows += _checks(data)
    parts: list[RenderableType] = [facts(data["path"], rows)]
    columns = ("scheme", "linears", "weights", "size", "bits/weight")
    if data["schemes"]:
        parts.append(table(columns, [
            (one["scheme"], str(one["linears"]), millions(one["weights"]), size(one["bytes"]),
             f"{one['bits_per_weight']:.4g}") for one in data["schemes"]]))
    if data["schemes"] and data["not_quantized"]:
        parts.append(table(("not quantized", "why", "tensors", "size", "type"), [
            (one["name"], one["reason"], str(one["tensors"]), size(one["bytes"]), one["dtype"])
            for one in data["not_quantized"]], left=2))
    elif not data["schemes"]:
        title = "tensors, as they are read" if data["kind"] == "gguf" else "tensors"
        parts.append(table((title, "", "size", "type"), [
            (one["name"], str(one["tensors"]), size(one["bytes"]), one["dtype"]) for one in data["not_quantized"]]))
    return stacked(parts)


def _blocks(data: Mapping[str, Any]) -> str:
    return f"{data['blocks']} blocks, " if data.get("blocks") else ""


def _reached(data: Mapping[str, Any]) -> str:
    return f", {data['bits_per_weight']:.4g} per quantized weight" if data["schemes"] else ""


def _outliers_line(known: Mapping[str, Any] | None) -> list[tuple[str, str | Text]]:
    if known is None:
        return []
    limit = f"{known['threshold']:g}"
    if not known["threshold"]:
        text = "no input column is multiplied apart: the threshold is 0"
    elif known["features"] is None:
        text = f"input columns that reach {limit} are multiplied apart; --recipe llm-int8-outliers would list them"
    else:
        text = (f"{known['features']} input columns of {known['linears']} linears reach {limit} on the calibration "
                "text; --outliers lists them")
    return [("outliers", text)]


def outliers(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Of each linear with outlier features, those with the largest inputs."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        listed, count = row.get("outliers") or (), row.get("outlier_features") or 0
        for place, one in enumerate(listed[:OUTLIERS_SHOWN]):
            first = (row["name"], str(count)) if not place else ("", "")
            lines.append((*first, str(one["column"]), f"{one['largest']:.4g}", percent(one["share"])))
    if not lines:
        return Text("No linear has outlier features.")
    return table(("linear", "outlier features", "the largest: column", "|x|", "of the tokens"), lines)


def _checks(data: Mapping[str, Any]) -> list[tuple[str, str | Text]]:
    """What --against and --verify found."""
    rows: list[tuple[str, str | Text]] = []
    compared = data.get("comparison")
    if compared:
        changed = compared["changed_tensors"]
        text = f"with {compared['against']}: {compared['equal_tensors']} unquantized tensors are equal"
        if compared.get("rescaled"):
            text += (f", {compared['rescaled']} linears were rescaled together with what comes before them and have no "
                     "error like for like (eval --against tells what they do)")
        run = compared.get("outputs")
        text += f", outputs compared on {run['tokens']} tokens" if run else ""
        text += f"; outputs not compared: {compared['no_outputs']}" if compared.get("no_outputs") else ""
        if changed:
            text += f", {len(changed)} differ: {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}"
        rows.append(("compared", Text(text, style="yellow" if changed else "green")))
    told = data.get("predictions")
    if told:
        rows.append(("predictions", f"{told['kl']:.3g} nats of KL divergence from the original's on "
                                    f"{told['windows']} × {told['context']} tokens, {percent(told['top1_agreement'])} "
                                    f"of the first choices agree (absurd from {told['limit']:.3g} nats on)"))
    elif data.get("no_predictions"):
        rows.append(("predictions", Text(f"not compared: {data['no_predictions']}", style="yellow")))
    for one in data.get("loaders") or ():
        faults = len(one["problems"])
        text = f"{faults} faults" if faults else "finds every key in the dtype and shape that it wants"
        text += "".join(f"; limit: {limit}" for limit in one["limits"])
        rows.append((one["loader"], Text(text, style="red" if faults else "yellow" if one["limits"] else "green")))
    if data.get("problems") == []:
        hashes = "hashes, names" if data["made_by"] else "names (there is no manifest with hashes)"
        once = len(data.get("decoded_once") or ())
        few = f"; {once} linears by one decoder only" if once else ""
        rows.append(("verified", Text(f"{hashes}, types and shapes; every tensor decodes, quantized ones by two "
                                      f"decoders, and is finite{few}",
                                      style="yellow" if once else "green")))
    return rows


def system(data: Mapping[str, Any]) -> RenderableType:
    """The machine (inspect.system)."""
    devices = ", ".join(f"{one['name']} ({size(one['memory'])})" for one in data["devices"]) or "none"
    return facts(f"qtool {data['qtool']}", [
        ("python", f"{data['python']} on {data['platform']}"),
        ("torch", f"{data['torch']}, {data['threads']} threads"),
        ("transformers", data["transformers"]),
        ("kernels", data["ops"]),
        ("cpu", f"{data['cores']} cores, {data['cpu']}"),
        ("memory", f"{size(data['memory_free'])} free of {size(data['memory'])}"),
        ("gpu", devices),
    ])


def jobs(data: Mapping[str, Any]) -> RenderableType:
    """The jobs of a file, a line each, and why some failed (jobs.run)."""
    lines = data["jobs"]
    rows = [[line["out"], line["status"], "-" if line["seconds"] is None else span(line["seconds"]),
             *("-" if line.get(key) is None else size(line[key]) for key in ("peak_memory", "weight_bytes")),
             percent((line.get("error") or {}).get("median")), percent((line.get("error") or {}).get("worst"))]
            for line in lines]
    parts: list[RenderableType] = [
        table(["output", "status", "time", "peak memory", "size", "median error", "worst"], rows, left=2)]
    failures = [(line["out"], Text(line["message"], style="red")) for line in lines if line["message"]]
    return stacked([*parts, *([facts("Failed", failures)] if failures else [])])


def exported(data: Mapping[str, Any]) -> RenderableType:
    """The end of an export."""
    weights, written = data["from"] or "plain weights", size(data["weight_bytes"])
    what = f"{data['linears']} linears from " if data["linears"] else ""
    title, sizes = f"Exported {what}{weights} to {data['format']}", f"{size(data['source_bytes'])} → {written}"
    if data["format"] == "text":
        title, sizes = f"Wrote text with {weights}", written
    rows: list[tuple[str, str | Text]] = [("to", Text(data["out"], style="bold green")), ("size", sizes),
                                          ("checked", data["checked"])]
    rows += [("note", Text(text, style="yellow")) for text in data["notes"]]
    rows += [("pushed to", data["pushed"]["url"])] if "pushed" in data else []
    return facts(title, rows)


def pushed(data: Mapping[str, Any]) -> RenderableType:
    """The end of an upload without an export."""
    done = data["pushed"]
    return facts(f"Pushed {data['out']}", [("to", Text(done["url"], style="bold green")),
                                           ("files", f"{len(done['files'])}, as their manifest has them")])
