"""Regular expressions that name a set of linears compactly, and the linears that loaders fuse into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from qtool.recipe import Scheme

# vLLM and SGLang run these as one matrix: (parts, name of the whole). All parts must be stored alike.
FUSED = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
)
Template = tuple[str, ...]


def patterns(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions, for re.match, that match every name in `wanted` and none in `others`.

    Names that differ only in numbers (layers, experts) become one expression: any number where no other name forbids
    it, else the numbers one by one.
    """
    wanted = list(dict.fromkeys(wanted))
    inside, outside = _by_template(wanted), _by_template(set(others).difference(wanted))
    return [expression for template, numbers in inside.items()
            for expression in _expressions(template, numbers, outside.get(template, []))]


def kind(linear_name: str) -> str:
    """The name inside its block: self_attn.q_proj of model.layers.3.self_attn.q_proj."""
    return re.sub(r"^.*?\.\d+\.", "", linear_name, count=1)


def fused_name(linear_name: str) -> str:
    """The matrix that engines make of a linear and others: x.qkv_proj of x.q_proj; else its own name."""
    parent, dot, last = linear_name.rpartition(".")
    return parent + dot + next((whole for parts, whole in FUSED if last in parts), last)


def with_fused(names: Sequence[str]) -> list[str]:
    """`names`, and the fused name wherever all its parts are among them (model.layers.0.self_attn.qkv_proj)."""
    present, result = set(names), list(names)
    for name in names:
        parent, _, last = name.rpartition(".")
        for parts, whole in FUSED:
            if last == parts[0] and all(f"{parent}.{part}" in present for part in parts):
                result.append(f"{parent}.{whole}")
    return result


def fused_sets(names: Iterable[str]) -> list[list[str]]:
    """`names` in sets that engines run as one matrix or one kernel: q/k/v, gate/up, all experts of a layer (vLLM)."""
    found: dict[str, list[str]] = {}
    for name in names:
        experts = re.match(r"(.*\.experts)\.\d+\.", name)
        found.setdefault(experts[1] if experts else fused_name(name), []).append(name)
    return list(found.values())


def fused_conflicts(schemes: Mapping[str, Scheme], skipped: Iterable[str] = ()) -> list[str]:
    """One sentence for each set of linears that vLLM fuses but that are not stored alike; it refuses such a file."""
    stored: dict[str, Scheme | None] = {**dict.fromkeys(skipped), **schemes}
    messages = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in stored):
        for parts, _whole in FUSED:
            labels = {part: scheme.label if scheme else "unquantized" for part in parts
                      for scheme in [stored.get(f"{parent}.{part}")] if f"{parent}.{part}" in stored}
            if len(set(labels.values())) > 1:
                pairs = ", ".join(f"{part} {label}" for part, label in labels.items())
                messages.append(f"{parent}: {pairs}; vLLM runs these as one matrix and wants one scheme for all")
    return messages


def _by_template(names: Iterable[str]) -> dict[Template, list[tuple[str, ...]]]:
    found: dict[Template, list[tuple[str, ...]]] = {}
    for name in names:
        pieces = re.split(r"(?<=\.)(\d+)(?=\.)", name)
        found.setdefault(tuple(pieces[::2]), []).append(tuple(pieces[1::2]))
    return found


def _expressions(template: Template, numbers: list[tuple[str, ...]], taken: list[tuple[str, ...]]) -> list[str]:
    text = [re.escape(piece) for piece in template]
    if not taken:
        return ["^" + r"\d+".join(text) + "$"]
    first: dict[tuple[str, ...], list[str]] = {}  # sets of the later numbers -> the first numbers that have them
    by_first: dict[str, list[tuple[str, ...]]] = {}
    for entry in numbers:
        by_first.setdefault(entry[0], []).append(entry[1:])
    for number, rests in by_first.items():
        full = not any(entry[0] == number for entry in taken)
        later = (_anything(text),) if full else tuple(_tail(text, rest) for rest in rests)
        first.setdefault(tuple(dict.fromkeys(later)), []).append(number)
    return [f"^{text[0]}{_any_of(starts)}{_any_of(tails)}$" for tails, starts in first.items()]


def _anything(text: list[str]) -> str:
    return r"\d+".join(text[1:])


def _tail(text: list[str], rest: tuple[str, ...]) -> str:
    return text[1] + "".join(number + piece for number, piece in zip(rest, text[2:], strict=True))


def _any_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"
