"""Charts with a slider: the copies of Vega are what they say they are, and keys move the charts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import altair as alt
import nbformat
import numpy as np
import pytest

from msif_lib.study import charts
from msif_lib.study.pages.browser import Browser, find_chromium
from msif_lib.study.runner import ROOT, executed_path, find_notebooks, run

# The notebooks run once, in one worker.
pytestmark = pytest.mark.xdist_group("notebooks")

CHAPTERS = ["case2", "centre", "damping", "steps"]
STATIC = ROOT / "book" / "_static"
VENDOR = STATIC / "vendor"
VEGA = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")


def vendored() -> dict[str, list[str]]:
    """The rows of the list of copies, by file."""
    text = (VENDOR / "README.md").read_text(encoding="utf-8")
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows[2:]}


def test_every_copy_is_the_published_file() -> None:
    listed = vendored()
    assert {path.name for path in VENDOR.iterdir()} == {*listed, "README.md", "LICENSES.txt"}
    licences = (VENDOR / "LICENSES.txt").read_text(encoding="utf-8")
    for name, (package, version, _, _, digest) in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
        assert f"{package} {version}" in licences


def test_vega_is_small_and_that_of_altair() -> None:
    assert sum((VENDOR / name).stat().st_size for name in VEGA) < 1_500_000
    assert f"v{vendored()['vega-lite.min.js'][1]}" == alt.SCHEMA_VERSION


@pytest.fixture(scope="module")
def figure() -> str:
    rows = [{"place": place, "x": x, "y": place * x} for place in range(3) for x in range(4)]
    chart = charts.at_place(alt.Chart(alt.Data(values=rows)).mark_line(point=True)).encode(
        alt.X("x:Q"), alt.Y("y:Q").scale(domain=[0, 6]), alt.ColorValue("var(--chart-2)")
    )
    positions = ["none", "α = 1 < 2", "α = 2"]
    sentences = ["Nothing & flat.", "It rises to 3.", "It rises to 6."]
    page = charts.slider({"A line": chart, "The same": chart}, "pull α", positions, sentences, 1)
    return page.data


def test_without_scripts_the_figure_is_a_table(figure: str) -> None:
    assert '<div class="live" hidden>' in figure
    assert '<th scope="row">α = 1 &lt; 2</th><td>It rises to 3.</td>' in figure
    assert "Nothing &amp; flat." in figure


@pytest.mark.parametrize(
    ("panels", "positions", "sentences", "start", "message"),
    [
        ({}, ["a", "b"], ["A.", "B."], 0, "needs a panel"),
        ({"x": alt.Chart().mark_point()}, ["a"], ["A."], 0, "two at least, got 1 and 1"),
        ({"x": alt.Chart().mark_point()}, ["a", "b"], ["A."], 0, "equally many"),
        ({"x": alt.Chart().mark_point()}, ["a", "b"], ["A.", "B."], 2, r"0\.\.1, got 2"),
    ],
)
def test_what_makes_no_figure_is_refused(panels, positions, sentences, start, message) -> None:
    with pytest.raises(ValueError, match=message):
        charts.slider(panels, "l", positions, sentences, start)


def test_places_are_stacked_in_order() -> None:
    found = charts.stacked({"x": np.array([1.0, 2.0]), "y": y, "name": "a"} for y in (0.5, 0.7))
    assert found.place.tolist() == [0, 0, 1, 1]
    assert found.x.tolist() == [1, 2, 1, 2]
    assert found.y.tolist() == [0.5, 0.5, 0.7, 0.7]
    assert set(found.name) == {"a"}


def test_the_axes_of_a_scatter_hold_all_points_of_all_places() -> None:
    data = charts.stacked({"x": np.array([-1.0, 3.0]), "y": np.array([0.0, top])} for top in (1, 7))
    equality, points = charts.scatter(data, "x", "y").to_dict()["layer"]
    for layer in (equality, points):
        for axis in "xy":
            low, high = layer["encoding"][axis]["scale"]["domain"]
            assert -2 < low < -1 and 7 < high < 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("there is no Chromium in PATH")
    with Browser() as browser:
        yield browser


def standalone(path: Path, figure: str, theme: str = "light") -> Path:
    """A page with a figure, on the ground that the book has in a theme."""
    ground = {"light": "#ffffff", "dark": "#14181e"}[theme]
    path.write_text(
        f'<!doctype html><html lang="en" data-theme="{theme}"><meta charset="utf-8">'
        '<title>x</title><meta name="viewport" content="width=device-width">'
        f'<link rel="stylesheet" href="{(STATIC / "charts.css").as_uri()}">'
        f'<script src="{(STATIC / "charts.js").as_uri()}"></script>'
        f"<body style='background: {ground}; font-family: sans-serif'><main><h1>x</h1>{figure}",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def shown(browser: Browser, figure: str, tmp_path: Path) -> Browser:
    show(browser, standalone(tmp_path / "page.html", figure))
    return browser


def show(browser: Browser, page: Path, theme: str = "light", width: int = 1400) -> None:
    browser.open(page, theme, width)
    failed = browser.evaluate(
        "msif.ready.then(all => all.filter(one => one.reason).map(one => String(one.reason)))"
    )
    assert failed == []


def press(browser: Browser, key: str) -> None:
    browser.page.keyboard.press(key)
    browser.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")


LINES = (
    "[...document.querySelectorAll('.panel')]"
    ".map(panel => panel.querySelector('.mark-line path').outerHTML)"
)


def test_keys_move_the_slider_the_sentence_and_all_panels(shown: Browser) -> None:
    press(shown, "Tab")
    assert shown.evaluate("document.activeElement.matches('.msif-chart input[type=range]')")
    seen = [shown.evaluate(LINES)]
    for key, value, says in (
        ("ArrowRight", "α = 2", "It rises to 6."),
        ("Home", "none", "Nothing & flat."),
    ):
        press(shown, key)
        assert shown.evaluate("document.querySelector('.says').textContent") == says
        assert shown.evaluate("document.querySelector('output').textContent") == value
        assert shown.evaluate("document.activeElement.ariaValueText") == value
        seen.append(shown.evaluate(LINES))
    for panel in zip(*seen, strict=True):
        assert len(set(panel)) == 3


@pytest.fixture(scope="module")
def of_chapters() -> dict[str, str]:
    """The figure of each chapter that has one, from the smoke profile."""
    notebooks = find_notebooks(ROOT, CHAPTERS)
    failed = {o.notebook.name: o.error for o in run(ROOT, "smoke", CHAPTERS) if o.error}
    assert not failed, failed
    found = {}
    for notebook in notebooks:
        cells = nbformat.read(executed_path(ROOT, "smoke", notebook), as_version=4).cells
        (output,) = next(cell.outputs for cell in cells if cell.id == "chart")
        found[notebook.name] = output.data["text/html"]
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_figure_of_a_chapter_moves_at_every_step(browser, of_chapters, tmp_path, chapter):
    show(browser, standalone(tmp_path / "page.html", of_chapters[chapter]))
    rows = browser.evaluate(
        "[...document.querySelectorAll('.msif-chart tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    press(browser, "Tab")
    press(browser, "Home")
    drawn = []
    for place, (position, says) in enumerate(rows):
        if place:
            press(browser, "ArrowRight")
        assert browser.evaluate("document.activeElement.ariaValueText") == position
        assert browser.evaluate("document.querySelector('.says').textContent") == says
        drawn.append(browser.evaluate("document.querySelector('.panels').innerHTML"))
    assert len(rows) >= 2 and len(set(drawn)) == len(rows)
    marks = "[...document.querySelectorAll('.panel')].map(p => p.querySelectorAll('path').length)"
    assert min(browser.evaluate(marks)) > 3
    assert "NaN" not in drawn[-1]


def test_what_a_screen_reader_hears(shown: Browser) -> None:
    shown.call("Accessibility.enable")
    nodes = shown.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            role = node["role"]["value"]
            names.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert names["slider"] == ["pull α"]
    assert names["image"] == ["A line", "The same"], "a panel is one image, not each of its marks"
    assert not [role for role in names if role.startswith("graphics")]
    assert shown.evaluate("document.querySelector('.says').getAttribute('role')") == "status"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_takes_the_colours_of_the_page(browser, figure, tmp_path, theme, width) -> None:
    show(browser, standalone(tmp_path / "page.html", figure, theme), theme, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(
        "[...document.querySelectorAll('.panel')].every(panel => {"
        "const box = panel.getBoundingClientRect();"
        "const svg = panel.querySelector('svg').getBoundingClientRect();"
        "return svg.width > 200 && svg.right <= box.right + 1; })"
    )
    ink, line = browser.evaluate(
        "[getComputedStyle(document.querySelector('.panel text')).fill,"
        " getComputedStyle(document.querySelector('.mark-line path')).stroke]"
    )
    assert (ink, line) == {
        "light": ("rgb(31, 35, 40)", "rgb(194, 78, 0)"),
        "dark": ("rgb(230, 237, 243)", "rgb(240, 144, 77)"),
    }[theme]


def test_without_the_copies_of_vega_the_table_remains(browser, figure, tmp_path) -> None:
    (tmp_path / "charts.js").write_text((STATIC / "charts.js").read_text(encoding="utf-8"))
    page = standalone(tmp_path / "page.html", figure)
    page.write_text(page.read_text().replace((STATIC / "charts.js").as_uri(), "charts.js"))
    browser.open(page)
    outcome = browser.evaluate("msif.ready.then(all => all.map(one => one.status))")
    assert outcome == ["rejected"]
    assert browser.evaluate("document.querySelector('.live').hidden")
    assert not browser.evaluate("document.querySelector('.without').hidden")
