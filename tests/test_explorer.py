"""The explorer shows the library's numbers, and answers to keys and pointer without a server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from msif_lib import FixedEmbeddingInfluence, UpdatedEmbeddingInfluence
from msif_lib.solvers import MinRes
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.experiments.experiment import LABELS, Setting, Trained, train_two_stages
from msif_lib.study.explorer.page import collect, fragment
from msif_lib.study.pages.browser import Browser, find_chromium

M, T = 24, 7
STATIC = Path(__file__).resolve().parents[1] / "book" / "_static"

# The stages are trained, and the browser started, once.
pytestmark = pytest.mark.xdist_group("explorer")


@pytest.fixture(scope="module")
def problem() -> tuple[TwoStageData, Trained]:
    data = two_stages("digits", pretrain_size=M, finetune_size=30, test_size=T, seed=3)
    return data, train_two_stages(data, Setting(widths=(2,), gradient_tol=1e-6, alpha=0.07), 3)


@pytest.fixture(scope="module")
def values(problem: tuple[TwoStageData, Trained]) -> dict[str, Any]:
    data, trained = problem
    scores = {
        case: trained.influence(case).scores(trained.test, per_test=True).values for case in LABELS
    }
    # No retraining: any changes will do here.
    changes = {
        case: {0.5: -score.sin() / M / 3, 0.0: -score.sin() / M} for case, score in scores.items()
    }
    return collect(data, trained, scores, changes)


def embedded(page: str) -> dict[str, Any]:
    """The values that a page holds."""
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_the_numbers_are_those_of_the_library(problem, values) -> None:
    data, trained = problem
    shown = embedded(fragment(values))
    runs = {
        "fixed": FixedEmbeddingInfluence(
            trained.pretrain, trained.finetuned["fixed"], progress=False
        ),
        "updated": UpdatedEmbeddingInfluence(
            trained.pretrain, trained.finetuned["updated"], 0.07, MinRes(), progress=False
        ),
    }
    for case, run in runs.items():
        rows = torch.tensor(shown["scores"][case], dtype=torch.float64)
        assert rows.shape == (T + 1, M)
        for row, scores in ((rows[0], run.scores(trained.test)), *(
            (rows[t + 1], run.scores((trained.test[0][t : t + 1], trained.test[1][t : t + 1])))
            for t in (0, T - 1)
        )):  # fmt: skip
            # Four digits are shown.
            torch.testing.assert_close(row, scores.values, rtol=6e-4, atol=1e-9)
    assert shown["weights"] == [0.5, 0]
    sines = -torch.tensor(shown["scores"]["fixed"], dtype=torch.float64)[1:].sin() / M
    half, whole = torch.tensor(shown["changes"]["fixed"], dtype=torch.float64)
    torch.testing.assert_close(whole[1:], sines, rtol=0, atol=1e-3)
    torch.testing.assert_close(half, whole / 3, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(whole[0], whole[1:].sum(0), rtol=0, atol=1e-2)
    assert shown["pretrain"]["digits"] == data.pretrain_original.tolist()
    assert len(shown["test"]["images"]) == T
    for row, r in enumerate(shown["agreement"]["fixed"]):
        pair = -torch.tensor(shown["scores"]["fixed"][row]), whole[row].float()
        assert r == pytest.approx(float(torch.corrcoef(torch.stack(pair))[0, 1]), abs=2e-3)


def test_values_of_another_shape_case_or_weight_are_refused(problem) -> None:
    data, trained = problem
    good = torch.zeros(M, T)
    scores = dict.fromkeys(LABELS, good)
    changes = {case: {0.0: good} for case in LABELS}
    with pytest.raises(ValueError, match=r"updated, scores: shape \(7, 24\), not \(m, T\)"):
        collect(data, trained, scores | {"updated": good.T}, changes)
    with pytest.raises(ValueError, match="needed of fixed and updated, no more"):
        collect(data, trained, scores, {"fixed": {0.0: good}})
    for other in ({0.5: good}, {0.5: good, 0.0: good}):
        with pytest.raises(ValueError, match="the same weights in both cases, 0 among them"):
            collect(data, trained, scores, changes | {"updated": other})
    # A constant has no correlation, and JSON no NaN.
    assert collect(data, trained, scores, changes)["agreement"]["fixed"] == [None] * (T + 1)


def test_a_fragment_takes_nothing_from_elsewhere_and_has_a_table(values) -> None:
    page = fragment(values)
    assert len(page) < 2**20
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*['\"]?(?:https?:)?//", page)
    table = re.search(r"<table>.*</table>", page, re.S)[0]
    assert "{{" not in page
    assert table.count("<tr>") == 7, "a head, all test images together, and the first five"
    assert not re.search(r"<img (?![^>]*alt=)", table)


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("there is no Chromium in PATH")
    with Browser() as browser:
        yield browser


def standalone(path: Path, theme: str, *fragments: str) -> Path:
    """A page as the book has it: with its charts beside it."""
    ground = {"light": "#ffffff", "dark": "#14181e"}[theme]
    path.write_text(
        f'<!doctype html><html lang="en" data-theme="{theme}"><meta charset="utf-8">'
        '<title>x</title><meta name="viewport" content="width=device-width">'
        f'<link rel="stylesheet" href="{(STATIC / "charts.css").as_uri()}">'
        f'<script src="{(STATIC / "charts.js").as_uri()}"></script>'
        f"<body style='margin: 0; background: {ground}; font-family: sans-serif'>"
        f"{''.join(fragments)}",
        encoding="utf-8",
    )
    return path


def wait(browser: Browser, charts: int) -> None:
    browser.page.wait_for_function(f"document.querySelectorAll('.chart svg').length === {charts}")


@pytest.fixture
def shown(browser: Browser, values: dict[str, Any], tmp_path: Path) -> Browser:
    browser.open(standalone(tmp_path / "page.html", "light", fragment(values), fragment(values)))
    wait(browser, 12)
    return browser


def read(number: str) -> float:
    return float(number.replace("−", "-"))


def check(browser: Browser, values: dict[str, Any], row: int, i: int) -> None:
    """What the first explorer of the page says of a test image and a pretraining image."""
    page = browser.page
    told = page.locator(".status").first.text_content()
    which = f"Test image {row - 1}, a " if row else f"All {T} test images"
    assert told.startswith(which)
    assert f"and pretraining image {i}, a {values['pretrain']['digits'][i]}. " in told
    found = re.findall(
        r"r = (\S+) over .*? predicted (\S+), true (\S+); test image (\d+), a \d, moves most "
        r"\((\S+)\)",
        told,
    )
    for case, numbers, column in zip(LABELS, found, page.locator(".panels > section").all()):
        scores = values["scores"][case]
        changes = values["changes"][case][-1]
        assert read(numbers[0]) == pytest.approx(values["agreement"][case][row], abs=6e-4)
        assert read(numbers[1]) == pytest.approx(-scores[row][i] / M, rel=0.06)
        assert read(numbers[2]) == pytest.approx(changes[row][i], rel=0.06)
        most = max(range(T), key=lambda t: abs(changes[t + 1][i]))
        assert int(numbers[3]) == most
        assert read(numbers[4]) == pytest.approx(changes[most + 1][i], rel=0.06)
        order = sorted(range(M), key=lambda k: scores[row][k])
        for kind, wanted in enumerate((order[:4], order[::-1][:4])):
            names = (
                column.locator("ul")
                .nth(kind)
                .locator("button")
                .evaluate_all("all => all.map(one => one.ariaLabel)")
            )
            assert [scores[row][int(re.search(r"image (\d+)", name)[1])] for name in names] == [
                scores[row][k] for k in wanted
            ]
    assert len(found) == 2
    picked = (
        page.locator("section")
        .first.locator("fieldset input")
        .evaluate_all("all => all.map((one, k) => one.checked ? k : -1).filter(k => k >= 0)")
    )
    assert picked == [row, T + 1 + i]


def test_keys_choose_a_test_image_and_a_pretraining_image(shown, values) -> None:
    page = shown.page
    assert page.locator(".static").first.is_hidden()
    first = values["scores"]["fixed"][0]
    start = first.index(min(first))
    check(shown, values, 0, start)
    page.keyboard.press("Tab")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    check(shown, values, 3, start)
    name = page.evaluate("document.activeElement.ariaLabel")
    assert name.startswith(f"test image 2, a {values['test']['digits'][2]}")
    outline = "getComputedStyle(document.activeElement.nextSibling)"
    assert page.evaluate(f"{outline}.outlineStyle") == "solid"
    assert page.evaluate(f"parseFloat({outline}.outlineWidth)") >= 3
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    check(shown, values, 3, (start + 1) % M)
    # A button of the ends chooses as well.
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    check(shown, values, 3, min(range(M), key=lambda i: values["scores"]["fixed"][3][i]))
    # The second explorer of the page is another one.
    assert page.locator(".status").nth(1).text_content().startswith("All ")


def test_a_click_on_a_point_or_a_picture_chooses_it(shown, values) -> None:
    page = shown.page
    page.set_viewport_size({"width": 1400, "height": 3000})
    chart = page.locator("section section .chart")
    changes = values["changes"]["fixed"][-1][0]
    lowest = min(range(M), key=lambda i: changes[i])
    points = chart.nth(0).locator(".mark-symbol.role-mark path")
    boxes = points.evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(b => [b.x + b.width / 2, "
        "b.y + b.height / 2])"
    )
    page.mouse.click(*max(boxes[:M], key=lambda box: box[1]))
    check(shown, values, 0, lowest)
    pictures = chart.nth(1).locator("image")
    assert pictures.count() == T
    effects = [values["changes"]["fixed"][-1][t + 1][lowest] for t in range(T)]
    boxes = pictures.evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(b => [b.x + b.width / 2, "
        "b.y + b.height / 2])"
    )
    page.mouse.click(*min(boxes, key=lambda box: box[1]))
    check(shown, values, max(range(T), key=lambda t: effects[t]) + 1, lowest)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_takes_the_colours_of_the_page(browser, values, tmp_path, theme, width) -> None:
    browser.open(standalone(tmp_path / "page.html", theme, fragment(values)), theme, width)
    wait(browser, 6)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    sides = browser.evaluate(
        "[...document.querySelectorAll('.panels > section')].map(n => n.getBoundingClientRect().y)"
    )
    assert (sides[0] == sides[1]) is (width > 1000), "side by side where there is room"
    sizes = browser.evaluate(
        "[...document.querySelectorAll('.live p, .live button, .live label, .live text')]"
        ".filter(n => n.textContent).map(n => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert min(sizes) >= 12
    ink = {"light": "rgb(31, 35, 40)", "dark": "rgb(230, 237, 243)"}[theme]
    assert browser.evaluate("getComputedStyle(document.querySelector('.chart text')).fill") == ink


def test_everything_that_takes_the_focus_has_a_name(shown) -> None:
    seen = set()
    for node in shown.call("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if node["ignored"] or role not in {"radio", "button", "image", "group", "region"}:
            continue
        seen.add(role)
        assert node["name"]["value"].strip(), node
    assert seen == {"radio", "button", "image", "group", "region"}


def test_without_the_charts_the_table_remains(browser, values, tmp_path) -> None:
    page = standalone(tmp_path / "page.html", "light", fragment(values))
    page.write_text(page.read_text(encoding="utf-8").replace("charts.js", "none.js"), "utf-8")
    browser.open(page)
    assert browser.page.locator(".live").is_hidden()
    assert browser.page.locator(".static table").is_visible()
