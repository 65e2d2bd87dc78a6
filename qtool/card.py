"""README.md of an output: the model card. What it was made from, how, how large and how good it is, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from qtool.escape import code, fenced, markdown
from qtool.recipe import scheme_label

HUB_ORIGIN = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{7,64})")


def text(manifest: Mapping[str, Any], loaders: Sequence[tuple[str, str]]) -> str:
    """The card as Markdown. Depends on nothing but its arguments; a local path of the source is not told.

    loaders: (program, three lines that load DIR) of the format.
    """
    name, base = _base(manifest["source"])
    recipe, totals = manifest["recipe"], manifest["totals"]
    title = f"{name}, {_how(manifest)}"
    parts = [
        _front_matter(manifest, base), f"# {markdown(title)}\n",
        f"Made by qtool {markdown(manifest['qtool'])} from {_link(name, base)}. "
        "`manifest.json` holds the hashes of the source files"
        + (", the whole recipe and the error of every layer.\n" if manifest["layers"] else ".\n"),
        _sizes(totals), _errors(manifest["layers"]), _kept(manifest["kept"]), _loading(loaders),
    ]
    if recipe is not None:
        parts.append(f"## Recipe\n\n{fenced(yaml.safe_dump(_plain(recipe), sort_keys=False), 'yaml')}\n")
    parts += [_calibration(manifest["calibration"]), _redone(manifest.get("redone", ()))]
    return "\n".join(part for part in parts if part)


def _base(source: Mapping[str, Any]) -> tuple[str, str | None]:
    """(name, Hub id or None)"""
    found = HUB_ORIGIN.fullmatch(str(source.get("origin", "")))
    return str(source.get("name") or "model"), found["repository"] if found else None


def _link(name: str, base: str | None) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else code(name)


def _how(manifest: Mapping[str, Any]) -> str:
    labels = list(dict.fromkeys(scheme_label(layer["scheme"]) for layer in manifest["layers"]))
    recipe = manifest["recipe"]
    steps = "+".join(next(iter(step)) for step in recipe["steps"]) if recipe else ""
    form = "dense weights" if manifest["format"] == "hf" else f"({manifest['format']})"
    return " ".join(word for word in (steps, "/".join(labels), form) if word)


def _front_matter(manifest: Mapping[str, Any], base: str | None) -> str:
    lines = ["---"]
    if base:
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: quantized"]
    tags = ["qtool", *(["quantized", manifest["format"]] if manifest["layers"] else [])]
    library = "onnxruntime-genai" if manifest["format"] == "onnx" else "transformers"
    return "\n".join([*lines, f"library_name: {library}", "tags:", *(f"- {json.dumps(tag)}" for tag in tags),
                      "---", ""])


def _sizes(totals: Mapping[str, Any]) -> str:
    before, after = totals["source_bytes"], totals["weight_bytes"]
    rows = [("parameters", f"{totals['parameters']:,}"), ("weights before", f"{before / 1e6:,.1f} MB"),
            ("weights now", f"{after / 1e6:,.1f} MB ({100 * after / max(before, 1):.1f} %)")]
    if totals.get("bits_per_weight"):
        rows.append(("bits per quantized weight, scales included", f"{totals['bits_per_weight']:.3f}"))
    return "## Size\n\n| | |\n|---|---:|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)


def _errors(layers: Sequence[Mapping[str, Any]]) -> str:
    """One row per kind of linear: the median and the worst of its relative squared errors over the blocks."""
    key = "relative_error" if any(layer["relative_error"] is not None for layer in layers) else "weight_error"
    kinds: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for layer in layers:
        if layer[key] is not None:
            kind = re.sub(r"^.*?\.\d+\.", "", re.sub(r"\.experts\.\d+\.", ".experts.*.", layer["name"]), count=1)
            kinds.setdefault((kind, scheme_label(layer["scheme"])), []).append((layer[key], layer["name"]))
    if not kinds:
        return ""
    what = ("Squared error of a layer's outputs over their energy, on calibration text that was held out"
            if key == "relative_error" else "Squared error of the weights over their energy; no text was used")
    rows = []
    for (kind, scheme), errors in kinds.items():
        errors.sort()
        worst, where = errors[-1]
        rows.append(f"| {markdown(kind)} | {len(errors)} | {markdown(scheme)} | "
                    f"{100 * errors[len(errors) // 2][0]:.3g} % | {100 * worst:.3g} % | {markdown(where)} |\n")
    head = "| linear | count | scheme | median | worst | where |\n|---|---:|---|---:|---:|---|\n"
    return f"## Error\n\n{what}.\n\n{head}{''.join(rows)}"


def _kept(kept: Sequence[Mapping[str, str]]) -> str:
    reasons: dict[str, list[str]] = {}
    for one in kept:
        reasons.setdefault(one["reason"], []).append(one["name"])
    if not reasons:
        return ""
    lines = []
    for reason, names in reasons.items():
        shown = ", ".join(map(code, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"- {shown}: {markdown(reason)}\n")
    return "## Linears that are not quantized\n\n" + "".join(lines)


def _loading(loaders: Sequence[tuple[str, str]]) -> str:
    parts = ["## Loading\n\n`DIR` is this directory, or the Hub id under which it is published.\n"]
    parts += [f"\n{program}:\n\n```python\n{code}\n```\n" for program, code in loaders]
    return "".join(parts) if loaders else ""


def _calibration(used: Mapping[str, Any] | None) -> str:
    if not used:
        return ""
    return (f"Calibrated on {used['samples']} × {used['sequence_length']} tokens of {code(used['source'])} "
            f"(sha256 of the tokens: {code(used['sha256'])}).\n")


def _redone(entries: Sequence[Mapping[str, Any]]) -> str:
    """What was made again after the run, each time with what differs."""
    lines = []
    for one in entries:
        names, labels = list(one["linears"]), list(dict.fromkeys(map(scheme_label, one["linears"].values())))
        steps = "+".join(next(iter(step)) for step in one["recipe"]["steps"])
        used = one["calibration"]
        text = f", calibrated on {used['samples']} × {used['sequence_length']} tokens" if used else ""
        patterns = ", ".join(map(code, one["patterns"]))
        what = f"{', '.join(labels)} with {steps}"
        lines.append(f"- {patterns}: {len(names)} linears to {markdown(what)}{text}\n")
    return "## Redone\n\nThe linears that match, and nothing else, were made again from the original weights.\n\n" \
        + "".join(lines) if lines else ""


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Only what was said: keys without a value are left out."""
    return {key: _plain(value) if isinstance(value, Mapping) else value
            for key, value in recipe.items() if value is not None and value != []}
