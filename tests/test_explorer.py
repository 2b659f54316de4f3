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
from msif_lib.solvers import Identity, MinRes
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.experiments.experiment import Setting, Trained, train_two_stages
from msif_lib.study.explorer.page import collect, fragment
from msif_lib.study.pages.browser import Browser, find_chromium

M, T = 24, 7
METHODS = ("fixed", "updated", "identity")

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
        case: trained.influence(case).scores(trained.test, per_test=True).values
        for case in ("fixed", "updated")
    }
    baseline = trained.influence("fixed", Identity()).scores(trained.test, per_test=True)
    # No retraining: any changes will do here.
    changes = {case: -values.sin() / M for case, values in scores.items()}
    return collect(data, trained, scores | {"identity": baseline.values}, changes)


def embedded(page: str) -> dict[str, Any]:
    """The values that a page holds."""
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_the_numbers_are_those_of_the_library(problem, values) -> None:
    data, trained = problem
    shown = embedded(fragment(values))
    stages = trained.pretrain, trained.finetuned["fixed"]
    runs = {
        "fixed": FixedEmbeddingInfluence(*stages, progress=False),
        "updated": UpdatedEmbeddingInfluence(
            trained.pretrain, trained.finetuned["updated"], 0.07, MinRes(), progress=False
        ),
        "identity": FixedEmbeddingInfluence(*stages, Identity(), progress=False),
    }
    for method, run in runs.items():
        rows = torch.tensor(shown["scores"][method], dtype=torch.float64)
        assert rows.shape == (T + 1, M)
        for row, scores in ((rows[0], run.scores(trained.test)), *(
            (rows[t + 1], run.scores((trained.test[0][t : t + 1], trained.test[1][t : t + 1])))
            for t in (0, T - 1)
        )):  # fmt: skip
            # Four digits are shown.
            torch.testing.assert_close(row, scores.values, rtol=6e-4, atol=1e-9)
    sines = -torch.tensor(shown["scores"]["fixed"], dtype=torch.float64)[1:].sin() / M
    changes = torch.tensor(shown["changes"]["fixed"], dtype=torch.float64)
    torch.testing.assert_close(changes[1:], sines, rtol=0, atol=1e-3)
    torch.testing.assert_close(changes[0], changes[1:].sum(0), rtol=0, atol=1e-2)
    assert shown["pretrain"]["digits"] == data.pretrain_original.tolist()
    assert len(shown["test"]["images"]) == T
    for row, r in enumerate(shown["agreement"]["fixed"]):
        pair = -torch.tensor(shown["scores"]["fixed"][row]), changes[row].float()
        assert r == pytest.approx(float(torch.corrcoef(torch.stack(pair))[0, 1]), abs=2e-3)


def test_values_of_another_shape_or_method_are_refused(problem, values) -> None:
    data, trained = problem
    good = torch.zeros(M, T)
    scores, changes = dict.fromkeys(METHODS, good), dict.fromkeys(("fixed", "updated"), good)
    with pytest.raises(ValueError, match=r"scores of identity have shape \(7, 24\), not \(m, T\)"):
        collect(data, trained, scores | {"identity": good.T}, changes)
    with pytest.raises(ValueError, match=r"changes of updated are needed, not scores of fixed"):
        collect(data, trained, scores, {"fixed": good})
    # A constant has no correlation, and JSON no NaN.
    assert collect(data, trained, scores, changes)["agreement"]["fixed"] == [None] * (T + 1)


def test_a_page_is_complete_and_small(values) -> None:
    page = fragment(values)
    assert len(page) < 2**20
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*['\"]?(?:https?:)?//", page), "from elsewhere"
    table = re.search(r"<table>.*</table>", page, re.S)[0]
    assert "{{" not in page
    assert table.count("<tr>") == 7, "a head, all test images together, and the first five"
    assert not re.search(r"<img (?![^>]*alt=)", table)


# --- in a browser --------------------------------------------------------------------------------


KEYS = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
        "ArrowDown": 40, " ": 32}  # fmt: skip


class Page(Browser):
    """A browser with a reader's hands."""

    def press(self, *keys: str) -> None:
        for key in keys:
            about = {"key": key, "code": "Space" if key == " " else key,
                     "windowsVirtualKeyCode": KEYS[key]}  # fmt: skip
            text = {"text": key} if key == " " else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def resize(self, width: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=1600, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def page(values, tmp_path_factory) -> Iterator[Page]:
    if find_chromium() is None:
        pytest.skip("there is no Chromium in PATH")
    folder = tmp_path_factory.mktemp("explorer")
    (folder / "page.html").write_text(
        '<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8"><title>x</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<body style='margin:0'>{fragment(values)}{fragment(values)}",
        encoding="utf-8",
    )
    with Page() as page:
        page.open(folder / "page.html")
        yield page


@pytest.fixture
def fresh(page: Page) -> Page:
    page.open(Path(page.evaluate("location.pathname")))
    page.resize(1200)
    return page


def text(page: Page, selector: str) -> str:
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def read(number: str) -> float:
    return float(number.replace("−", "-"))


def shown_point(page: Page) -> tuple[int, int, float, float, float]:
    told = text(page, ".msif-explorer .point p")
    found = re.fullmatch(
        r"Pretraining image (\d+), a (\d): score (\S+), predicted change (\S+), "
        r"true change (\S+)\.",
        told,
    )
    assert found, told
    return (int(found[1]), int(found[2]), *(read(found[k]) for k in (3, 4, 5)))


def check(page: Page, values: dict[str, Any], method: str, row: int) -> None:
    """The lists, the point and the status are those of the JSON."""
    case = "updated" if method == "updated" else "fixed"
    scores, changes = values["scores"][method][row], values["changes"][case][row]
    order = sorted(range(M), key=lambda i: (scores[i], i))
    for kind, wanted in (("helped", order[:6]), ("hurt", order[::-1][:6])):
        cards = page.evaluate(
            f"[...document.querySelector('.{kind}').querySelectorAll('button')].map("
            "b => [Number(b.dataset.point), b.querySelector('img').src, b.textContent])"
        )
        assert [scores[i] for i, *_ in cards] == [scores[i] for i in wanted]
        for i, image, told in cards:
            assert image == values["pretrain"]["images"][i]
            found = re.fullmatch(r"a (\d), I = (\S+?)predicted (\S+?)true (\S+)", told)
            assert int(found[1]) == values["pretrain"]["digits"][i]
            numbers = scores[i], -scores[i] / M, changes[i]
            assert [read(found[k]) for k in (2, 3, 4)] == [
                pytest.approx(number, rel=0.06) for number in numbers
            ]
    i, digit, *numbers = shown_point(page)
    assert digit == values["pretrain"]["digits"][i]
    assert numbers == [
        pytest.approx(number, rel=0.06) for number in (scores[i], -scores[i] / M, changes[i])
    ]
    status = text(page, ".msif-explorer .status")
    r = values["agreement"][method][row]
    assert f"r = {r:.3f}".replace("-", "−") in status
    label = next(m["label"] for m in values["methods"] if m["key"] == method)
    assert label in status
    assert status.startswith(f"Test image {row - 1}, a " if row else f"All {T} test images")


def test_it_starts_with_all_test_images_and_hides_the_table(fresh, values) -> None:
    assert fresh.evaluate("document.querySelector('.static').hidden")
    assert not fresh.evaluate("document.querySelector('.live').hidden")
    check(fresh, values, "fixed", 0)


def test_keys_choose_the_method_and_the_test_image(fresh, values) -> None:
    fresh.press("Tab", "ArrowRight")
    check(fresh, values, "updated", 0)
    fresh.press("ArrowRight")
    check(fresh, values, "identity", 0)
    fresh.press("Tab", "ArrowRight", "ArrowRight", "ArrowRight")
    check(fresh, values, "identity", 3)
    named = fresh.evaluate("document.activeElement.getAttribute('aria-label')")
    assert named.startswith(f"test image 2, a {values['test']['digits'][2]}")
    assert "outline" in fresh.evaluate(
        "const s = getComputedStyle(document.activeElement.nextSibling);"
        "s.outlineStyle === 'solid' && parseFloat(s.outlineWidth) >= 3 ? 'outline' : ''"
    )
    # The second explorer of the page is another one.
    assert (
        fresh.evaluate("document.querySelectorAll('.msif-explorer')[1].dataset.method") == "fixed"
    )


def test_keys_walk_along_the_points_of_the_plot(fresh, values) -> None:
    fresh.press("Tab", "ArrowRight", "Tab", "ArrowRight", *["Tab"] * 13)
    assert fresh.evaluate("document.activeElement.getAttribute('class')") == "dot"
    fresh.press("Home")
    scores = values["scores"]["updated"][1]
    order = sorted(range(M), key=lambda i: (-scores[i], i))
    assert shown_point(fresh)[0] == order[0]
    fresh.press("ArrowRight", "ArrowUp", "ArrowRight", "ArrowLeft")
    assert shown_point(fresh)[0] == order[2]
    check(fresh, values, "updated", 1)
    image = fresh.evaluate("document.querySelector('.point img').src")
    assert image == values["pretrain"]["images"][order[2]]
    spoken = fresh.evaluate("document.activeElement.getAttribute('aria-label')")
    assert f"{spoken}.".lower() == text(fresh, ".point p").lower()
    fresh.press("End", "ArrowDown")
    assert shown_point(fresh)[0] == order[-2]
    # One stop of the Tab key for the whole plot, and it is where one left.
    stops = "document.querySelector('.msif-explorer').querySelectorAll('.dot[tabindex=\"0\"]')"
    assert fresh.evaluate(f"{stops}.length") == 1


def test_the_pointer_shows_the_nearest_point_and_a_card_its_own(fresh, values) -> None:
    order = sorted(range(M), key=lambda i: -values["scores"]["fixed"][0][i])
    wanted = order[0]
    x, y = fresh.evaluate(
        f"(b => [b.x + b.width / 2, b.y + b.height / 2])"
        f"(document.querySelectorAll('.dot')[{wanted}].getBoundingClientRect())"
    )
    fresh.move(x - 5, y)
    assert shown_point(fresh)[0] == wanted
    assert fresh.evaluate("document.querySelectorAll('button[aria-pressed=true]').length") == 2, (
        "one in each explorer"
    )
    fresh.press("Tab", "Tab", "Tab", "Tab", " ")
    pressed = fresh.evaluate("Number(document.activeElement.dataset.point)")
    assert shown_point(fresh)[0] == pressed != wanted


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_a_telephone_and_is_legible_in_both_themes(fresh, theme, width) -> None:
    fresh.resize(width)
    # On a card of the other kind, as themes have them.
    card = "white" if theme == "dark" else "black"
    fresh.evaluate(
        f"document.documentElement.dataset.theme = '{theme}';"
        f"document.body.style.background = '{card}'"
    )
    assert fresh.evaluate("document.documentElement.scrollWidth") <= width
    sizes = fresh.evaluate(
        "[...document.querySelectorAll('.live p, .live span, .live label, .live legend')]"
        ".filter(n => n.textContent).map(n => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert min(sizes) >= 12.5
    *colors, paper = fresh.evaluate(
        "['--ink', '--accent', '--quiet', '--paper'].map(name => {"
        "const n = document.createElement('i'); n.style.color = `var(${name})`;"
        "document.querySelector('.msif-explorer').append(n);"
        "const c = getComputedStyle(n).color; n.remove(); return c.match(/\\d+/g).map(Number); })"
    )
    assert min(contrast(color, paper) for color in colors) >= 4.5
    behind = fresh.evaluate(
        "getComputedStyle(document.querySelector('.msif-explorer')).backgroundColor.match(/\\d+/g)"
    )
    assert [int(value) for value in behind] == paper


def contrast(one: list[int], other: list[int]) -> float:
    """The contrast of two colours after WCAG 2."""

    def luminance(color: list[int]) -> float:
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
            for c in (value / 255 for value in color)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_points_do_not_move_about_where_motion_is_unwanted(fresh) -> None:
    duration = "getComputedStyle(document.querySelector('.dot')).transitionDuration"
    for preference, moves in (("no-preference", True), ("reduce", False)):
        media = [{"name": "prefers-reduced-motion", "value": preference}]
        fresh.call("Emulation.setEmulatedMedia", features=media)
        assert (fresh.evaluate(duration) != "0s") is moves


def test_everything_that_takes_the_focus_has_a_name(fresh) -> None:
    fresh.call("Accessibility.enable")
    nodes = fresh.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"radio", "button", "option", "listbox", "image", "group", "region"}
    seen = set()
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node["ignored"] or role not in roles:
            continue
        seen.add(role)
        assert node["name"]["value"].strip(), node
    assert seen >= {"radio", "button", "option", "listbox", "image"}
    live = "document.querySelector('.status').getAttribute('aria-live')"
    assert fresh.evaluate(live) == "polite"
