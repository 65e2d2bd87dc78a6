"""Maps of figures per linear: where each linear stands, its colour, and what a terminal of 80 columns shows."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from qtool import heatmap
from qtool.errors import InputError

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def row(name: str, error: float | None = 0.01, size: int = 64) -> dict[str, Any]:
    return {"name": name, "relative_error": None, "weight_error": error, "shape": [8, 16], "bytes": size}


def dense(blocks: int, kinds: tuple[str, ...] = KINDS) -> list[dict[str, Any]]:
    return [row(f"model.layers.{block}.{kind}", 1e-4 * 1.3 ** (block + index))
            for block in range(blocks) for index, kind in enumerate(kinds)]


def printed(rows: list[dict[str, Any]], colours: bool, width: int = 80) -> list[str]:
    target = io.StringIO()
    console = Console(file=target, width=width, force_terminal=colours, color_system="truecolor" if colours else None)
    for one in heatmap.terminal("OUT", rows):
        console.print(one)
    return target.getvalue().splitlines()


def test_linears_stand_by_block_and_kind() -> None:
    names = ["lm_head", "model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj",
             *(f"model.layers.2.mlp.experts.{expert}.down_proj" for expert in range(3))]
    cells = heatmap.cells([row(name) for name in names])
    assert cells.blocks == (2, 10) and cells.kinds == ("mlp.up_proj", "mlp.experts.*.down_proj")
    assert [one["name"] for one in cells.outside] == ["lm_head"]
    assert len(cells.rows[2, "mlp.experts.*.down_proj"]) == 3
    assert (10, "mlp.experts.*.down_proj") not in cells.rows


def test_two_stacks_of_blocks_are_not_mixed() -> None:
    cells = heatmap.cells([row("text.layers.0.fc"), row("vision.blocks.0.fc")])
    assert cells.kinds == ("text.layers.*.fc", "vision.blocks.*.fc")
    assert all(len(rows) == 1 for rows in cells.rows.values())


def test_figures_of_a_cell() -> None:
    experts = [row("a", 0.4, 64), row("b", 0.1, 128), row("c", None, 64)]
    assert heatmap.median("weight_error")(experts) == 0.4 and heatmap.median("relative_error")(experts) is None
    assert heatmap.median("weight_error")([*experts, row("d", 0.2)]) == 0.2
    assert heatmap.bits(experts) == pytest.approx(8 * 256 / (3 * 128))


@pytest.mark.parametrize(("kinds", "names"), [
    (KINDS, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    (("mlp.experts.*.up", "mlp.shared.up", "mlp.gate"), ("*.up", "shared.up", "gate")),
    (("self.a.out", "cross.a.out"), ("self.a.out", "cross.a.out")),
    (("out", "a.out"), ("out", "a.out")),
])
def test_short_names_stay_different(kinds: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert heatmap.short(kinds) == dict(zip(kinds, names, strict=True))


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2, with its piecewise curve."""
    parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colours", [heatmap.VIRIDIS, heatmap.CIVIDIS])
def test_colours_grow_lighter_and_figures_on_them_are_readable(colours: tuple[str, ...]) -> None:
    scale = heatmap.Scale(colours, 0.001, 1.0, log=True)
    shown = [scale.colour(0.001 * 1000 ** (step / 50)) for step in range(51)]
    light = [luminance(colour) for colour in shown]
    assert light == sorted(light) and shown[0] == colours[0] and shown[-1] == colours[-1]
    for colour, value in zip(shown, light, strict=True):
        lighter, darker = sorted((value, luminance(heatmap.ink(colour))), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.3, colour


def test_one_tiny_error_leaves_colours_to_the_others() -> None:
    scale = heatmap.error_scale([1e-9, *(0.01 * (1 + step / 50) for step in range(50))])
    assert scale and scale.share(1e-9) == 0 and scale.share(0.0) == 0 and scale.share(0.0149) > 0.5
    assert heatmap.error_scale([0.0]) is None


def test_shares_of_scales_are_not_different_schemes() -> None:
    assert len({heatmap.bits_scale([4.25, 4.26]).colour(bits)[:3] for bits in (4.25, 4.26)}) == 1  # type: ignore[union-attr]
    mixed = heatmap.bits_scale([3.25, 4.25])
    assert mixed and (mixed.share(3.25), mixed.share(4.25)) == (0, 1)


def test_a_terminal_with_colours_shows_figures_on_them() -> None:
    lines = printed(dense(30), colours=True)
    assert all(len(ESCAPES.sub("", line)) <= 80 for line in lines)
    last = next(line for line in lines if ESCAPES.sub("", line).split()[:1] == ["29"])
    assert "48;2;253;231;37" in last and f"{100 * 1e-4 * 1.3 ** 35:.2g}" in last  # the last colour of viridis
    assert sum(bool(re.fullmatch(r" *\d+ .*", ESCAPES.sub("", line))) for line in lines) >= 30


def test_without_colours_figures_stay_and_where_there_is_no_room_shades() -> None:
    plain = printed(dense(3), colours=False)
    assert [line.split()[1] for line in plain if line.split()[:1] == ["0"]] == ["0.01"]
    assert not any("\x1b" in line for line in plain)
    many = tuple(f"mlp.part{index}" for index in range(20))
    narrow = printed(dense(3, many), colours=False)
    assert all(len(line) <= 80 for line in narrow)
    assert "@@@" in next(line for line in narrow if line.split()[:1] == ["2"])


def test_mixed_precision_has_a_map_of_bits_and_nothing_known_a_message() -> None:
    mixed = [row("layers.0.fc", None, 64), row("layers.1.fc", None, 128)]
    assert "Bits per weight" in printed(mixed, colours=False)[0]
    with pytest.raises(InputError, match="--against"):
        heatmap.terminal("OUT", [row("layers.0.fc", None), row("layers.1.fc", None)])
