"""YAML of recipes and jobs: plain data only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from qtool.errors import RecipeError, printable

WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
NUMBER = re.compile(r"[-+]?(\.[0-9]{1,40}|[0-9]{1,400}(\.[0-9]{0,40})?)([eE][-+]?[0-9]{1,4})?"
                    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
KEPT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null")


class _Loader(yaml.SafeLoader):
    """safe_load of what JSON could say too: no tags, no aliases (no exponential documents), no duplicate keys, no
    dates, and numbers as YAML 1.2 has them (not base 60, in which a long text is slow)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag in KEPT]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not allowed, line {line}")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags ({event.tag}) are not allowed, line {line}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is a word, not a list or a mapping, line {key.start_mark.line + 1}")
            if key.value in seen:
                raise yaml.YAMLError(f"key '{key.value}' is given twice, line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{WHOLE.pattern})$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{NUMBER.pattern})$"), list("-+.0123456789"))


def line_of(text: str, path: Sequence[str | int]) -> int:
    """The line, from 1, of what lies at `path` (keys and positions) in a text that parses, as far as that is there."""
    node, line = yaml.compose(text, Loader=_Loader), 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part], node.value[part]
        else:
            found = None
        if found is not None:
            line, node = found[0].start_mark.line + 1, found[1]
    return line


def parse(text: str, where: str) -> Any:
    """Raises RecipeError; where: what to call the text."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{where}: not valid YAML: {printable(' '.join(str(error).split()), 300)}") from None
