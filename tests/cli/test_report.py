"""The page of inspect --report, as files and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtool import decode, html_report, inspect, manifest
from tests import chromium
from tests.chromium import Browser
from tests.cli.conftest import Run, make

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
DIRECTORY = Path("<b>&<") / "script><script>alert(3)<" / "script>"  # together a path with </script>
needs_browser = pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(gptq: Path) -> Path:
    out = gptq.with_name("one.html")
    make("inspect", gptq, "--report", out)
    return out


@pytest.fixture(scope="module")
def pages(gptq: Path, rtn: Path) -> Path:
    """Two checkpoints, one of them with hostile names wherever a checkpoint has names."""
    bad = gptq.parent / DIRECTORY
    shutil.copytree(rtn, bad)
    record = manifest.load(bad)
    record["source"]["name"] = HOSTILE + "\ufffe\x1b\u202e"
    record["recipe"]["name"] = record["recipe"]["steps"][0]["rtn"]["note"] = HOSTILE
    for one in record["kept"]:
        one["reason"] = HOSTILE
    (bad / manifest.NAME).write_text(json.dumps(record))
    out = gptq.with_name("two.html")
    make("inspect", gptq, bad, "--report", out)
    return out


def test_what_is_written(run: Run, gptq: Path, rtn: Path, page: Path, tmp_path: Path) -> None:
    status, out, _ = run("inspect", gptq, "--report", tmp_path / "again.html", "--json")
    told = json.loads(out)
    assert status == 0 and told["report"] == {"path": str(tmp_path / "again.html"), "bytes": page.stat().st_size}
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()  # same input, same bytes
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href|srcset|action)\s*=|@import|https?://(?!www\.w3\.org)", text)
    for word in ("median error", "gptq", "int4-g32", "group_size: 32", "model.layers.2.mlp.down_proj"):
        assert word in text, word
    status, out, _ = run("inspect", gptq, rtn, "--report", tmp_path / "two.html", "--json")
    assert [one["path"] for one in json.loads(out)["checkpoints"]] == [str(gptq), str(rtn)]


def test_without_a_manifest_the_page_has_what_is_known(run: Run, rtn: Path, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(rtn, bare)
    (bare / manifest.NAME).unlink()
    assert run("inspect", bare, "--report", tmp_path / "bare.html")[0] == 0
    text = (tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "no manifest.json" in text and "Bits per weight" in text and "Error of the" not in text
    assert run("inspect", bare, "--against", model, "--report", tmp_path / "bare.html")[0] == 0
    text = (tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "Error of the outputs" in text and "measured from the files" in text


def test_experts_of_a_block_are_one_cell(gptq: Path) -> None:
    source = decode.open_model(str(gptq))
    rows = inspect.layers(source, inspect.record_of(source))
    for number, row in enumerate(rows):
        row["name"] = f"model.layers.{row['block']}.mlp.experts.{number % 7}.up_proj"
    text = html_report.page([html_report.Run(inspect.summary(source), rows, None)]).decode()
    block = [row for row in rows if row["block"] == 1]
    errors = sorted(row["relative_error"] for row in block)
    worst = next(row for row in block if row["relative_error"] == errors[-1])
    told = (f"{block[0]['name']} and 6 more\n{100 * errors[3]:.2g} % of the outputs' energy, the median\n"
            f"worst {100 * errors[-1]:.2g} % of the outputs' energy: {worst['name']}</title>")
    assert told in text and text.count("<title>") == 1 + 2 * 2 * 3  # the page's; two maps in two forms of three cells


@pytest.mark.parametrize(("words", "message"), [
    (["MODEL", "--report", "r.html"], "nothing is quantized"),
    (["OUT", "--report", "missing/r.html"], "does not exist"),
    (["OUT", "--report", "."], "is a directory"),
    (["OUT", "OUT"], "several PATHs go with --report"),
    (["OUT", "OUT", "--layers", "--report", "r.html"], "several PATHs go with --report"),
    (["--system", "--heatmap"], "--heatmap need the PATH"),
    (["MODEL", "--heatmap"], "--against"),
])
def test_one_message_for_what_cannot_be(run: Run, model: Path, rtn: Path, words: list[str], message: str,
                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = run("inspect", *({"MODEL": model, "OUT": rtn}.get(word, word) for word in words))
    assert status == 2 and message in error and not list(tmp_path.iterdir())


def test_without_the_library_the_extra_is_named(run: Run, rtn: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    status, _, error = run("inspect", rtn, "--report", tmp_path / "r.html")
    assert status == 2 and "qtool[report]" in error


def test_heatmap_in_the_terminal(run: Run, gptq: Path) -> None:
    status, out, _ = run("inspect", gptq, "--heatmap")
    record = manifest.load(gptq)
    assert status == 0 and "Error per linear" in out and "Bits per weight" not in out
    figures = [f"{100 * one['relative_error']:.2g}" for one in record["layers"] if one["block"] == 2]
    assert figures in [line.split()[1:] for line in out.splitlines()]


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_charts_are_drawn_and_readable(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    assert browser.requests == [page.as_uri()] and browser.complaints == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    charts = browser.value("""[...document.querySelectorAll('svg')].map(svg => {
        const box = svg.getBoundingClientRect(), marks = [...svg.querySelectorAll('.mark')];
        return {width: box.width, height: box.height, marks: marks.length,
                drawn: marks.filter(mark => mark.getBoundingClientRect().width > 4).length};
    }).filter(chart => chart.width > 0)""")
    assert len(charts) == 2  # error and bits, each in the form for this width
    for chart in charts:
        assert 250 < chart["width"] <= width and chart["height"] > 100
        assert chart["marks"] == chart["drawn"] == 3 * 7
    colours = browser.value("""['main', '.lead', '.role-axis-label text', '.label', 'summary'].map(name => {
        const style = getComputedStyle(document.querySelector(name));
        return name.includes('role') ? style.fill : style.color})""")
    behind = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (luminance(behind) < 0.05) == (scheme == "dark")
    for colour in colours:
        lighter, darker = sorted((luminance(colour), luminance(behind)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, (colour, behind)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of rgb(r, g, b)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_browser
def test_every_chart_has_its_figures_as_a_table_and_beside_the_pointer(browser: Browser, page: Path,
                                                                      gptq: Path) -> None:
    browser.open(page)
    layers = manifest.load(gptq)["layers"]
    tables = browser.value("""[...document.querySelectorAll('figure + details')].map(fold => [
        ...fold.querySelectorAll('tbody tr')].map(row => [...row.cells].map(cell => cell.textContent)))""")
    errors, bits = tables
    for block in range(3):
        own = [layer for layer in layers if layer["block"] == block]
        assert errors[block] == [str(block), *(f"{100 * layer['relative_error']:.2g}" for layer in own)]
        widths = [8 * layer["bytes"] / (layer["shape"][0] * layer["shape"][1]) for layer in own]
        assert bits[block] == [str(block), *(f"{width:.3g}" for width in widths)]
    worst = max(layers, key=lambda layer: layer["relative_error"])
    place = browser.value(f"""(() => {{
        const mark = [...document.querySelectorAll('.wide .mark')].find(mark => mark.textContent.startsWith(
            {json.dumps(worst["name"])}));
        const box = mark.getBoundingClientRect();
        return {{x: box.x + box.width / 2, y: box.y + box.height / 2, fill: mark.getAttribute('fill')}} }})()""")
    assert place["fill"] == "rgb(253, 231, 37)"  # the end of viridis
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place["x"], y=place["y"])
    tip = browser.value("[getComputedStyle(tip).visibility, tip.textContent]")
    assert tip[0] == "visible" and tip[1].startswith(worst["name"])
    assert f"{100 * worst['relative_error']:.2g} %" in tip[1]


@needs_browser
def test_what_a_checkpoint_says_is_text(browser: Browser, pages: Path) -> None:
    browser.open(pages)
    assert browser.requests == [pages.as_uri()] and browser.complaints == []
    assert browser.value("document.scripts.length") == 1
    assert browser.value("document.querySelectorAll('img, b, body script ~ script, iframe').length") == 0
    text = browser.value("document.body.textContent")
    assert text.count(HOSTILE) >= 3 and "</script>" in text and "\x1b" not in text and "\u202e" not in text
    assert browser.value("document.querySelectorAll('.scatter.wide .mark').length") == 2
    assert browser.value("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


@needs_browser
def test_the_page_itself_forbids_every_request(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value("document.body.append(Object.assign(new Image(), {src: 'https://example.com/x.png'}))")
    browser.value("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert browser.value("window.ran === undefined")
    assert len(browser.complaints) == 2 and all("Content Security Policy" in text for text in browser.complaints)


@needs_browser
def test_it_prints_in_ink_on_white(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, "dark")
    pdf = browser.printed()
    assert pdf.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 4
    browser.ask("Emulation.setEmulatedMedia", media="print",
                features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("document.querySelector('.wide').getBoundingClientRect().width") > 250
