"""Training in the reader's browser ends where the library's retraining ends."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_explorer import standalone

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.links import Optimum, Proximal, Unrolled
from msif_lib.retraining import retrain_without, with_weights
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.explorer.retrain import collect, fragment
from msif_lib.study.models.networks import linear_head, tanh_mlp
from msif_lib.study.pages.browser import Browser, find_chromium
from msif_lib.training import SGD, AdamW, descend

M, T, HIDDEN, EPOCHS = 30, 8, 5, 6
RULE = SGD(0.1, 0.5)

pytestmark = pytest.mark.xdist_group("explorer")


def train(rule: Any = RULE) -> tuple[TwoStageData, Chain]:
    data = two_stages("digits", pretrain_size=M, finetune_size=20, test_size=T, seed=1)
    embedding = tanh_mlp(data.images.image_shape, [HIDDEN], 1)
    links = []
    for part, classes in ((data.pretrain, 4), (data.finetune, 6)):
        embedding = copy.deepcopy(embedding)
        head = linear_head(HIDDEN, classes, classes)
        stage = Stage(embedding, head, cross_entropy, part, l2=0.002)
        links.append(Unrolled(stage, descend(stage, rule, EPOCHS, 7, classes, progress=False)))
    return data, Chain(links, progress=False)


@pytest.fixture(scope="module")
def problem() -> tuple[TwoStageData, Chain, torch.Tensor]:
    data, chain = train()
    return data, chain, chain.scores(data.test, per_test=True)[0].values


@pytest.fixture(scope="module")
def truth(problem) -> torch.Tensor:
    data, chain, _ = problem
    everyone = [[i] for i in range(M)]
    return retrain_without(chain, everyone, data.test, stage=0, progress=False).per_test_change


@pytest.fixture(scope="module")
def page(problem, truth, tmp_path_factory) -> Iterator[Any]:
    if find_chromium() is None:
        pytest.skip("there is no Chromium in PATH")
    body = fragment(collect(*problem), truth)
    path = standalone(tmp_path_factory.mktemp("retrain") / "page.html", "light", body)
    with Browser() as browser:
        browser.open(path)
        browser.page.wait_for_selector(".bend svg")
        yield browser.page


@pytest.fixture
def fresh(page) -> Any:
    page.locator(".back").click()
    return page


#: What happens in the page, and then what its next training says.
TRAINED = """async (act) => {
    const root = document.querySelector('.msif-explorer');
    const next = new Promise((resolve) => {
        root.addEventListener('msif-trained', ({ detail }) => resolve(detail), { once: true });
    });
    new Function(act)();
    return await next;
}"""
CHOOSE = "document.querySelectorAll('.images input')[{}].click();"
WEIGH = (
    "const slider = document.querySelector('.weight'); slider.value = {};"
    "slider.dispatchEvent(new Event('input'));"
)


def relative(found: list[float], wanted: torch.Tensor) -> float:
    error = torch.tensor(found, dtype=torch.float64) - wanted
    return float(error.norm() / wanted.norm())


@pytest.mark.parametrize("i", [0, 11, M - 1])
def test_without_an_image_it_ends_where_the_library_ends(fresh, problem, truth, i) -> None:
    fresh.evaluate(TRAINED, CHOOSE.format(i))
    told = fresh.evaluate(TRAINED, WEIGH.format(0))
    assert told["weights"] == [0 if k == i else 1 for k in range(M)]
    # 1e-3 is asked for; in double precision nine digits are there.
    assert relative(told["changes"], truth[i]) < 1e-9
    assert relative(told["predicted"], -problem[2][i] / M) < 1e-5
    mean = float(truth[i].mean())
    shown = re.search(r"true (\S+)\.$", fresh.locator(".status").text_content())[1]
    assert float(shown.replace("−", "-")) == pytest.approx(mean, rel=0.06)


def test_weights_of_several_images_between_one_and_zero(fresh, problem) -> None:
    data, chain, scores = problem
    weights = torch.ones(M, dtype=torch.float64)
    for i, weight in ((3, 0.35), (8, 0.8)):
        weights[i] = weight
        fresh.evaluate(TRAINED, CHOOSE.format(i))
        told = fresh.evaluate(TRAINED, WEIGH.format(weight))
    assert told["weights"] == weights.tolist()
    before, after = (
        link.stage.losses(*link.stage.split(link.vector()), *data.test)
        for link in (chain.links[1], with_weights(chain, weights, progress=False).links[1])
    )
    assert relative(told["changes"], (after - before).detach()) < 1e-9
    assert relative(told["predicted"], (weights - 1) @ scores / M) < 1e-5
    fresh.locator(".back").click()
    assert fresh.locator(".status").text_content().endswith("predicted 0, true 0.")


def distances(page: Any) -> list[float]:
    """How far the test images are from their predicted places, in pixels."""
    return page.locator(".chart.tests .mark-rule.role-mark line").evaluate_all(
        "all => all.map(one => Math.abs(one.y2.baseVal.value))"
    )


def drawn(page: Any) -> None:
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")


def test_points_leave_their_predicted_places_step_by_step(fresh) -> None:
    fresh.emulate_media(reduced_motion="no-preference")
    seen = fresh.evaluate(
        """async () => {
            const [root, seen] = [document.querySelector('.msif-explorer'), []];
            const done = new Promise((resolve) => {
                root.addEventListener('msif-trained', resolve, { once: true });
            });
            let going = true;
            const look = () => {
                seen.push(Number(document.querySelector('.step').value));
                if (going) requestAnimationFrame(look);
            };
            document.querySelector('.out').click();
            look();
            await done;
            going = false;
            return seen;
        }"""
    )
    fresh.emulate_media(reduced_motion="reduce")
    assert seen == sorted(seen)
    assert len(set(seen)) > 10, "the training is seen on its way"
    drawn(fresh)
    assert max(distances(fresh)) > 1
    # The slider goes back through the steps: at first all stand where their scores put them.
    slider = fresh.locator(".step")
    slider.focus()
    fresh.keyboard.press("Home")
    drawn(fresh)
    assert max(distances(fresh)) < 1e-6
    steps = int(slider.get_attribute("max"))
    assert fresh.locator(".step + output").text_content() == f"0 of {EPOCHS * 5} of pretraining"
    fresh.keyboard.press("End")
    assert fresh.locator(".step + output").text_content() == (
        f"{steps - EPOCHS * 5} of {EPOCHS * 3} of finetuning"
    )


def test_where_motion_is_unwanted_it_ends_at_once(fresh) -> None:
    steps = fresh.evaluate(
        "document.querySelector('.out').click(), document.querySelector('.step').value"
    )
    assert steps == fresh.locator(".step").get_attribute("max")


def test_keys_choose_an_image_and_lower_its_weight(fresh) -> None:
    fresh.locator(".images input").nth(4).focus()
    fresh.keyboard.press("ArrowRight")
    fresh.keyboard.press("Tab")
    fresh.keyboard.press("ArrowLeft")
    told = fresh.locator(".status").text_content()
    assert told.startswith("Pretraining image 5, a ")
    assert ", has weight 0.95. " in told
    name = fresh.locator(".images input").nth(5).get_attribute("aria-label")
    assert name.endswith(", weight 0.95")
    fresh.keyboard.press("Tab")
    fresh.keyboard.press("Enter")
    assert ", has weight 0. " in fresh.locator(".status").text_content()
    assert fresh.locator("[role=status]").count() == 1


@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_the_window(page, width) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_what_the_page_cannot_train_is_refused(problem) -> None:
    data, chain, scores = problem
    first, second = chain.links
    with pytest.raises(ValueError, match=r"scores have shape \(8, 30\), not \(m, T\) with m = 30"):
        collect(data, chain, scores.T)
    optima = Chain([Optimum(first.stage), Proximal(second.stage, 0.1)], float("inf"))
    for other in (
        optima,
        Chain([first]),
        train(SGD(0.1, 0.5, nesterov=True))[1],
        train(AdamW(0.01))[1],
        train(SGD(0.1, clip=1.0))[1],
    ):
        with pytest.raises(ValueError, match="the page can take two Unrolled links"):
            collect(data, other, scores)


def test_the_table_without_scripts_has_what_the_scores_say_most_of(problem, truth) -> None:
    page = fragment(collect(*problem), truth)
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*['\"]?(?:https?:)?//", page)
    assert "{{" not in page
    rows = re.findall(r"pretraining image (\d+)\".*?<td>(\S+?)</td><td>(\S+?)</td>", page)
    means = -problem[2].mean(1) / M
    order = means.abs().argsort(descending=True).tolist()
    assert [int(row[0]) for row in rows] == order[:6]
    for i, predicted, true in rows:
        assert float(predicted) == pytest.approx(float(means[int(i)]), rel=0.06)
        assert float(true) == pytest.approx(float(truth[int(i)].mean()), rel=0.06)
