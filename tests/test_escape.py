"""What a checkpoint says is shown as text: read back by parsers of Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qtool import card, console, escape, report_eval
from tests.cli.test_card import made

HOSTILE = (
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://evil/pixel.png)", "a|b|c", "`rm -rf /`",
    "*a* _b_ **c** ~~d~~", "&lt;&#60;", "https://evil.example/x www.evil.example", "me@evil.example", "$x^2$",
    "line\n# heading\n\n- list\n", "```\nclosed\n```", "a\\", "``` ``` `", "<!-- -->", "a\x1b[31m\u202eb\ud800c",
    "---\nbase_model: evil\n---", "'; DROP", "  lead and trail  ", "__init__", "x.weight_y",
)


def flat(text: str) -> list[str]:
    """The words of a text as it is to be shown."""
    return escape.clean(escape.LINE_END.sub(" ", text)).split()


def tokens(text: str) -> list[str]:
    """Types of everything but plain text in the HTML-free tree of a Markdown text."""
    parsed = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(text)
    return [one.type for part in parsed for one in (part.children or [part])]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_in_markdown(text: str) -> None:
    parsed = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(f"Name {escape.markdown(text)} end")
    assert [one.type for one in parsed] == ["paragraph_open", "inline", "paragraph_close"]
    assert {one.type for one in parsed[1].children or []} <= {"text", "text_special"}
    shown = "".join(one.content for one in parsed[1].children or [])
    assert shown.split() == ["Name", *flat(text), "end"]


@given(st.text(max_size=60))
def test_any_text_is_text_in_markdown(text: str) -> None:
    test_hostile_text_is_text_in_markdown(text)


@given(st.text(max_size=40))
def test_any_text_is_one_code_span(text: str) -> None:
    parsed = MarkdownIt().parse(f"x {escape.code(text)} y")
    spans = [one.content for one in parsed[1].children or [] if one.type == "code_inline"]
    assert len(parsed) == 3 and len(spans) == 1 and spans[0].split() == flat(text)


@given(st.text(max_size=80))
def test_no_text_closes_its_fence(text: str) -> None:
    parsed = MarkdownIt().parse(escape.fenced(text, "yaml") + "\n\nafter")
    assert [one.type for one in parsed] == ["fence", "paragraph_open", "inline", "paragraph_close"]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_card_shows_hostile_names_as_text(text: str) -> None:
    layer = {**made()["layers"][0], "name": f"model.layers.0.{text}"}
    record = made(layers=[layer], kept=[{"name": text, "reason": text}], qtool=text,
                  source={"name": text, "origin": "x", "files": {}},
                  recipe={"steps": [{text: {"note": text}}], "name": text, "rules": [{"match": text}]},
                  calibration={"source": text, "samples": 1, "sequence_length": 2, "sha256": text},
                  redone=[{"patterns": [text], "linears": {text: layer["scheme"]}, "calibration": None,
                           "recipe": {"steps": [{text: {}}]}}])
    written = card.text(record, ())
    front = re.match(r"---\n(.*?)\n---\n", written, re.DOTALL)
    assert front and yaml.safe_load(front[1]) == {"library_name": "transformers",
                                                  "tags": ["qtool", "quantized", "gptq"]}
    types = set(tokens(written[front.end():]))
    assert not types & {"html_block", "html_inline", "link_open", "image", "em_open", "strong_open", "s_open"}, types
    parsed = MarkdownIt("gfm-like", {"linkify": False}).parse(written[front.end():])
    assert [one.content for one in parsed if one.type == "fence" and one.info == "yaml"] \
        and sum(one.type == "heading_open" for one in parsed) == 6
    assert yaml.safe_load(next(one.content for one in parsed if one.type == "fence"))["rules"] == [
        {"match": escape.clean(text)}] or "\\" in next(one.content for one in parsed if one.type == "fence")


@pytest.mark.parametrize("text", HOSTILE)
def test_the_tables_of_eval_show_hostile_names_as_text(text: str) -> None:
    row = {"name": text, "scheme": text, "weight_bytes": 5, "bits_per_weight": 4.0, "of_fp16": 0.5, "perplexity": 8.0,
           "perplexity_interval": None, "use_for": text}
    data = {"text": {"windows": 1, "context": 2, "source": text}, "compute_dtype": "float32", "device": "cpu",
            "against": None, "models": [row], "notes": []}
    parsed = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(report_eval.markdown(data))
    cells = [part for part in parsed if part.type == "td_open"]
    assert len(cells) == 7 and {one.type for part in parsed for one in part.children or []} <= {"text", "text_special"}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n=1", " =1",
                                  "=cmd|' /C calc'!A0", "\ufeff=1"])
def test_no_cell_of_a_csv_is_a_formula(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.show_csv([{"name": text, "error": -0.5, "scheme": "int4"}], ["name", "error", "scheme"])
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["name", "error", "scheme"] and rows[1][1:] == ["-0.5", "int4"] and len(rows) == 2
    assert rows[1][0].startswith("'") and rows[1][0].endswith(text.strip()[-1])
