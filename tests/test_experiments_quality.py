"""The quality of harmful images: how it is measured, judged and put into words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msif_lib.evaluation import Estimate
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.experiments import quality
from msif_lib.study.experiments.experiment import Setting, Trained, train_two_stages
from msif_lib.study.records import write_record

SETTING = Setting("mlp", (2,), l2_pretrain=0.2, l2_finetune=0.2, gradient_tol=1e-6)


@pytest.fixture(scope="module")
def drawn() -> tuple[TwoStageData, Trained]:
    data = two_stages("digits", (0, 1, 2), (4, 5, 6, 7, 8, 9), 30, 24, 40)
    return data, train_two_stages(data, SETTING, cases=["fixed"])


def seeds_of(**means: tuple[float, float]) -> list[quality.Looked]:
    """Two seeds with these means of a group and measure; every other one is ½."""
    every = {(group, name): 0.5 for group in quality.GROUPS for name in quality.MEASURES}
    empty = np.zeros(0)
    one = quality.Looked(
        0, "fixed", 1, 2, empty, empty, empty, empty, every, distinct=1, both=0, size=0.1, sign=0.2
    )  # type: ignore[arg-type] # fmt: skip
    found = []
    for seed in (0, 1):
        own = {tuple(key.split("_")): values[seed] for key, values in means.items()}
        noise = {key: value + 1e-3 * seed for key, value in every.items()}
        found.append(replace(one, seed=seed, means=noise | own))
    return found


def test_an_image_among_others_of_another_class_has_low_quality(
    drawn: tuple[TwoStageData, Trained],
) -> None:
    data, trained = drawn
    found = quality.quality(data, trained, 5)
    assert {len(values) for values in found.values()} == {30}
    assert np.all((found["neighbours"] >= 0) & (found["neighbours"] <= 1))
    assert found["loss"].mean() == pytest.approx(float(trained.pretrain.example_losses().mean()))
    # Where the margin is negative another class has the larger output: its loss is above ln 2.
    assert np.all(found["loss"][found["margin"] < 0] > np.log(2))
    assert np.corrcoef(found["loss"], found["margin"])[0, 1] < -0.5


def test_equal_values_share_their_rank() -> None:
    assert quality.quantiles(np.array([5.0, 1.0, 3.0])).tolist() == [1, 0, 0.5]
    assert quality.quantiles(np.array([1.0, 1.0, 3.0])).tolist() == [0.25, 0.25, 1]


def test_the_wrong_images_come_by_their_loss(drawn: tuple[TwoStageData, Trained]) -> None:
    _, trained = drawn
    wrong, predictions = quality.wrong_images(trained, "fixed")
    targets = trained.test[1].numpy()
    assert sorted(wrong) == np.flatnonzero(predictions != targets).tolist()
    stage = trained.finetuned["fixed"].with_data(trained.test, "test")
    losses = stage.example_losses().numpy()[wrong]
    assert np.all(np.diff(losses) <= 0)


def test_the_ends_of_every_ranking_are_taken(drawn: tuple[TwoStageData, Trained]) -> None:
    data, trained = drawn
    (one,) = quality.examine(data, trained, 0, ["fixed"], 3, 2, 5)
    assert one.scores.shape == one.order.shape == (30, len(one.chosen)) and len(one.chosen) <= 3
    assert np.all(np.diff(np.take_along_axis(one.scores, one.order, 0), axis=0) <= 0)
    harmful = one.order[:2]
    assert one.distinct == len(set(harmful.ravel()))
    ranks = quality.quantiles(quality.quality(data, trained, 5)["loss"])
    assert one.means["harmful", "loss"] == pytest.approx(ranks[harmful].mean())
    assert one.means["helpful", "loss"] == pytest.approx(ranks[one.order[-2:]].mean())
    assert len(quality.rows([one])) == 9


def test_without_a_wrong_image_there_is_nothing_to_look_at(
    drawn: tuple[TwoStageData, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    none = np.zeros(0, dtype=int)
    monkeypatch.setattr(quality, "wrong_images", lambda trained, case: (none, none))
    with pytest.raises(ValueError, match="seed 7: no test image is misclassified"):
        quality.examine(*drawn, 7, ["fixed"], 3, 2, 5)


@pytest.mark.parametrize(
    ("name", "interval", "word"),
    [
        ("loss", (0.3, 0.2, 0.4), "lower"),  # a higher loss is a lower quality
        ("loss", (-0.3, -0.4, -0.2), "higher"),
        ("margin", (-0.3, -0.4, -0.2), "lower"),
        ("margin", (0.3, 0.2, 0.4), "higher"),
        ("neighbours", (0.3, 0.2, 0.4), "lower"),
        ("neighbours", (0.3, 0.0, 0.4), "not measurably different"),
    ],
)
def test_quality_is_judged_by_what_the_measure_means(
    name: str, interval: tuple[float, float, float], word: str
) -> None:
    assert quality.judged(Estimate(*interval), quality.MEASURES[name]) == word


def test_sentences_follow_the_numbers() -> None:
    harm = seeds_of(harmful_loss=(0.9, 0.9), helpful_loss=(0.9, 0.901), harmful_margin=(0.1, 0.1))
    first, second = quality.in_words(harm)
    assert first.startswith("case 1, against images at random: quality judged by the loss is lower")
    assert "quality judged by the margin is lower" in first
    assert "case 1, against the most helpful: quality judged by the loss is not meas" in second
    said = quality.answer(harm)
    assert "of **lower quality** compared with images at random" in said
    assert "So a large loss marks *influence*, of either sign, and not harm." in said
    more = quality.answer(seeds_of(harmful_loss=(0.9, 0.9), helpful_loss=(0.6, 0.6)))
    assert "their quality is **lower**" in more and "more than influence" in more
    none = quality.answer(seeds_of())
    assert "So a large loss is no mark of harm here." in none and "over 2 seeds" in none


def test_claims_and_the_tables_have_the_same_numbers(tmp_path: Path) -> None:
    looked = seeds_of(harmful_loss=(0.9, 0.8))
    found = quality.claims(looked)
    assert found["harmful_loss_quantile"]["value"] == pytest.approx(0.85)
    assert {"value", "low", "high", "seeds", "p"} == set(found["harmful_loss_quantile"])
    write_record(tmp_path / "mine.json", "4.1", "mnist", {"claims": found}, {}, [0, 1], 1.0)
    shown = quality.beside(looked, "digits", tmp_path)
    assert len(shown) == 2 * len(found)
    assert [row["data"] for row in shown[:: len(found)]] == ["digits", "mnist (recorded)"]
    (row, *_) = quality.compared(looked, {"loss": "own loss"})
    assert row["harmful"].startswith("0.85 [") and row["harmful − random"].startswith("0.35 [")
