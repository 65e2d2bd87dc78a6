"""What a plan looks like: what would be made, and what that needs of the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from qtool.recipe import scheme_label
from qtool.report import bits, facts, rotated, stacked, table
from qtool.units import millions, percent, size, span


def plan(data: Mapping[str, Any]) -> RenderableType:
    """A plan (Plan.to_json), as --dry-run shows it."""
    rows: list[tuple[str, str | Text]] = [("from", data["source"]), ("to", data["out"])]
    recipe = data["recipe"]
    method = " + ".join(next(iter(step)) for step in recipe["steps"])
    if data["samples"]:
        length = recipe["calibration"]["sequence_length"]
        method += f", calibrated on {data['samples']} × {length} tokens of {recipe['calibration']['source']}"
    rows.append(("method", method))
    rows += rotated(data["rotation"])
    if data["recipe"]["kv_cache"]:
        rows.append(("kv cache", f"{data['recipe']['kv_cache']}, scales for keys and values of every attention"))
    rows += [("quantized" if not index else "", line) for index, line in enumerate(_schemes(data["linears"]))]
    for one in (data.get("outputs") or [])[1:]:
        rows.append(("", f"{one['name']}: the same to {', '.join(one['schemes'])} ({one['format']}), "
                         f"{one['bits_per_weight']:.4g} bits"))
    if data["budget"]:
        rows += [("budget" if not index else "", line) for index, line in enumerate(_budget(data))]
    rows += [("kept" if not index else "", line) for index, line in enumerate(_kept(data["kept"]))]
    rows.append(("size", f"{size(data['source_bytes'])} → {size(data['weight_bytes'])} "
                         f"({percent(data['weight_bytes'] / max(data['source_bytes'], 1))})"
                         f"{bits(data['bits_per_weight'])}"))
    rows.append(("device", f"{data['device']}, computing in {data['compute_dtype']}"))
    rows += [("note", Text(text, style="yellow")) for text in data["warnings"]]
    return stacked([facts("Plan", rows), needs(data)])


def redo(data: Mapping[str, Any]) -> RenderableType:
    """What --redo --dry-run would make again (redo.described)."""
    moves: dict[str, int] = {}
    for one in data["linears"]:
        labels = [scheme_label(one[key]) for key in ("before", "scheme")]
        text = f"{labels[0]} → {labels[1]}" if labels[0] != labels[1] else f"{labels[0]} again"
        moves[text] = moves.get(text, 0) + 1
    method = " + ".join(next(iter(step)) for step in data["recipe"]["steps"])
    rows: list[tuple[str, str | Text]] = [
        ("in", data["out"]), ("from", data["source"]), ("method", method),
        ("linears", ", ".join(f"{count}: {text}" for text, count in moves.items())),
        ("blocks", "none is run" if data["statistics"] else f"{data['blocks']} are run"
         + (f", on {data['samples']} samples" if data["samples"] else "")),
        ("files", f"{', '.join(data['files'])} ({size(sum(data['files'].values()))}) again; "
                  f"{len(data['kept_files'])} others stay as they are"),
        ("size", f"{size(data['weight_bytes_before'])} → {size(data['weight_bytes'])}"),
    ]
    rows += [("note", Text(text, style="yellow")) for text in data["warnings"]]
    return facts("Redo", rows)


NEEDS = {"runtime": "program", "tensor": "largest tensor", "stream": "activations", "weights": "weights of a block",
         "statistics": "statistics of its inputs", "solve": "solving, with statistics", "forward": "a batch in a block",
         "read_ahead": "the next block, as read", "embedding": "embedding", "outside": "embedding or head, quantized",
         "trial": "trying rotations", "search": "search for schemes", "resume": "activations, to go on after a kill",
         "spilled": "activations past memory_budget_gb", "parts": "inputs and outputs of parts of a block",
         "learning": "learning", "kept": "freed, kept for the next", "distilling": "learning on the whole model"}


def needs(data: Mapping[str, Any]) -> RenderableType:
    """What a run needs, what of it is there, and what it is for (docs/json.md: the plan)."""
    has, short = data["machine"], {one["what"] for one in data["too_small"]}

    def line(name: str, count: int | None, key: str, parts: Mapping[str, int]) -> tuple[str | Text, ...]:
        known = ((value, NEEDS[part]) for part, value in parts.items() if part in NEEDS and value)
        largest = sorted(known, reverse=True)
        there = "-" if has[key] is None else size(has[key])
        shown = Text("unknown" if count is None else size(count), style="red" if key in short else "")
        return name, shown, there, ", ".join(f"{what} {size(value)}" for value, what in largest[:4])

    memory, temporary = data["memory"], data["temporary"]
    rows = [line("memory, at most", data["peak_memory"], "memory", memory)]
    if data["gpu_memory"] is not None:
        rows.append(line(f"memory of {data['device']}", data["gpu_memory"], "gpu_memory", {}))
    rows += [line("disk, output", sum(data["files"].values()), "disk", {}),
             *([line("disk, kept statistics", kept, "disk", {})] if (kept := data["statistics_bytes"]) else []),
             line("disk, while running", temporary["peak"], "disk", temporary)]
    took = "unknown: the device is not here" if data["seconds"] is None else f"about {span(data['seconds'])}"
    probe = data["probe"]
    how = "a rough estimate; --probe times a block" if probe is None else (
        "from " + ", ".join(f"block {one['block']} in {span(one['seconds'])}" for one in probe["blocks"]))
    rows.append(("time", Text(took), "", how if data["seconds"] is not None else ""))
    made = table(("", "needs", "free here", "of which"), rows)
    made.columns[3].justify = "left"
    return made


def _budget(data: Mapping[str, Any]) -> list[str]:
    budget, wanted = data["budget"], data["recipe"]["budget"]
    asked = f"{wanted['bits']:g} bits per quantized weight" if wanted["bits"] else f"{size(wanted['size'])} in all"
    least, most = (f"{budget[key]:.4g}" for key in ("least_bits", "most_bits"))
    return [f"at most {asked}, scales included; {least} to {most} bits are possible",
            f"with {', '.join(budget['schemes'])}",
            f"chosen while running, by their expected loss on {budget['samples']} calibration sequences"]


def _schemes(linears: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, list[int]] = {}
    for one in linears:
        label = scheme_label(one["scheme"]) if one["scheme"] else "schemes still to be chosen"
        found.setdefault(label, []).append(one["shape"][0] * one["shape"][1])
    blocks = len({one["block"] for one in linears})
    return [f"{len(weights)} linears to {name}, {millions(sum(weights))} weights"
            + (f", in {blocks} blocks" if len(found) == 1 else "") for name, weights in found.items()]


def _kept(kept: Sequence[Mapping[str, str]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for one in kept:
        reasons.setdefault(one["reason"], []).append(one["name"])
    return [f"{_some(names)}: {reason}" for reason, names in reasons.items()]


def _some(names: Sequence[str]) -> str:
    patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    shown = ", ".join(patterns[:3]) + (", ..." if len(patterns) > 3 else "")
    return shown if len(names) == len(patterns) else f"{shown} ({len(names)} linears)"
