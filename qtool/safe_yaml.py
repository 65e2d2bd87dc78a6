"""YAML of recipes and jobs: plain data only."""

from __future__ import annotations

from typing import Any

import yaml

from qtool.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """safe_load without aliases (no exponential documents) and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not allowed, line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(f"key '{key_node.value}' is given twice, line {key_node.start_mark.line + 1}")
            seen.add(key_node.value if isinstance(key_node.value, str) else str(key_node.value))
        return super().construct_mapping(node, deep)


def parse(text: str, where: str) -> Any:
    """Raises RecipeError; where: what to call the text."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
