"""The experiment of cleansing: a small run against chains, and tests of rows that are known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from msif_lib import Chain
from msif_lib.evaluation import Estimate
from msif_lib.links import Frozen, Optimum
from msif_lib.solvers import Dense
from msif_lib.study.experiments.cleansing import (
    METHODS,
    Design,
    Results,
    beside_row,
    cleanse,
    flip_labels,
    outcomes_without,
    p_value,
    plant,
    reading,
    removal_plans,
    share_estimate,
    signed,
)
from msif_lib.study.experiments.experiment import Setting

SEED = 2


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Design:
    return Design(
        "digits", None, None, 40, 30, 20, 25,
        Setting(widths=(2,), l2_pretrain=0.05, l2_finetune=0.02, gradient_tol=1e-7, epochs=10),
        ["fixed"], [0.05, 0.1], 0.1, 0.2, 3, Dense(),
        checkpoint=str(tmp_path_factory.mktemp("kept")),
    )  # fmt: skip


def test_plans_take_what_their_order_says() -> None:
    on_validation, on_test = np.array([0.1, -5, 3, 0, 1.0]), np.array([9, 8, 0, 0, -1.0])
    plans = removal_plans(on_validation, on_test, [0.2, 0.4], 0.4, seed=1)
    assert plans["harmful", 0.4].tolist() == [2, 4]
    assert plans["helpful", 0.4].tolist() == [1, 3]
    assert plans["paper", 0.4].tolist() == [0, 1]
    assert ("paper", 0.2) not in plans
    assert plans["random", 0.2].tolist() == plans["random", 0.4].tolist()[:1]
    other = [removal_plans(on_validation, on_test, [0.8], 0.8, s)["random", 0.8] for s in range(9)]
    assert len({tuple(some) for some in other}) > 1


def test_what_is_removed_is_chosen_by_the_chain_and_really_left_out(design: Design) -> None:
    rows, (base,), sizes = cleanse(design, SEED)
    data, validation = design.draw(SEED)
    trained = design.train(data, SEED)
    links = Optimum(trained.pretrain, Dense()), Frozen(trained.finetuned["fixed"], Dense())
    chain = Chain(list(links), progress=False)
    scores = chain.scores(validation)[0].values
    harmful = scores.argsort(descending=True)[:4]
    row = next(row for row in rows if (row["order"], row["share"]) == ("harmful", 0.1))
    after = outcomes_without(trained, "fixed", [harmful.tolist()], 1e-7)
    assert row["loss"] == pytest.approx(float(after.losses.mean()), abs=1e-7)
    assert row["gain"] == pytest.approx(row["accuracy"] - base["accuracy"])
    assert row["loss_change"] == pytest.approx(row["loss"] - base["loss"])
    # The mean over the 36 that are left: scores count from their own mean.
    of_test = chain.scores(trained.test)[0].values
    expected = -float((of_test - of_test.mean())[harmful].sum()) / 36
    assert row["predicted"] * 20 == pytest.approx(expected, rel=1e-6)
    assert row["mended"] - row["spoilt"] == pytest.approx(row["gain"] * 20 / 100)
    assert sizes["m"] == 40 and len(rows) == 3 * 2 + 1


def test_the_search_is_scored_by_pairs_of_wrong_and_right(design: Design) -> None:
    clean = {"fixed": {"accuracy": 50.0, "loss": 1.0}}
    rows, (base,) = plant(design, SEED, clean)
    assert {row["method"] for row in rows} == set(METHODS)
    data, _ = design.draw(SEED)
    _, wrong = flip_labels(data.pretrain[1], 4, 0.2, SEED + 20_000)
    noise = np.random.default_rng([SEED, 2]).random(40)
    pairs = itertools.product(noise[wrong.numpy()], noise[~wrong.numpy()])
    row = next(row for row in rows if row["method"] == "random")
    assert row["auc"] == pytest.approx(np.mean([a > b for a, b in pairs]))
    flagged = torch.as_tensor(np.argsort(-noise)[:8].copy())
    assert row["found"] == pytest.approx(float(wrong[flagged].double().mean()))
    assert base["clean_gain"] == pytest.approx(50.0 - base["accuracy"])
    loss = next(row for row in rows if row["method"] == "loss")
    assert loss["auc"] > 0.6  # a wrong label is hard to fit


def known() -> Results:
    """Three seeds out of order; gains 1, 2, 3 for harmful first, none at random."""
    seeds = [7, 5, 6]
    removed = [
        {"seed": seed, "case": "fixed", "order": order, "share": share,
         "gain": (seed - 4) * (order != "random") * share * 10,
         "loss_change": -0.1 * (seed - 4) * (order == "harmful")}
        for seed in seeds for order in ("harmful", "helpful", "random", "paper")
        for share in (0.1, 0.2)
    ]  # fmt: skip
    base = [{"seed": seed, "case": "fixed", "restart_gain": 0.5, "restart_loss_change": 0.0}
            for seed in seeds]  # fmt: skip
    detected = [
        {"seed": seed, "case": "fixed", "method": method, "gain": 1.0,
         "auc": 0.9 + 0.05 * (seed - 6)}
        for seed in seeds for method in METHODS
    ]  # fmt: skip
    planted: list[dict[str, Any]] = [
        {"seed": seed, "case": "fixed", "planted_gain": float(seed)} for seed in seeds
    ]
    frames = (pd.DataFrame(rows) for rows in (removed, base, detected, planted))
    return Results(*frames, {"m": 40}, 0.1)


def test_gains_are_of_the_reported_share_and_within_seeds() -> None:
    results = known()
    assert results.of("fixed", "harmful", 0.2, "gain") == pytest.approx([2.0, 4.0, 6.0])
    gain = results.gains("fixed", "harmful", "gain").difference
    assert gain.value == pytest.approx(2.0) and gain.low < 0 < 2 < gain.high
    assert results.gains("fixed", "restart", "gain").difference.value == pytest.approx(0.5)
    assert results.between("fixed", "paper", "harmful", "gain").difference.value == 0
    assert results.noise_gains("fixed", "planted", "gain").difference.value == pytest.approx(6)


def test_claims_and_the_row_that_shows_them() -> None:
    claims = known().claims("fixed", "_fixed")
    gain = claims["cleansing_accuracy_gain_10_fixed"]
    assert set(gain) == {"value", "low", "high", "seeds", "p", "wilcoxon"}
    assert gain["value"] == pytest.approx(2.0) and gain["seeds"] == 3
    assert claims["noise_auc_loss_fixed"]["high"] == 1.0
    row = beside_row("digits", "case 1", claims, "10", "_fixed")
    assert row["accuracy, harmful first"].startswith("+2.00 [-0.48, ")
    assert row["AUC, loss"].startswith("0.90 [")
    assert beside_row("digits", "case 1", claims, "20", "_fixed")["accuracy, random"] == ""


def test_numbers_in_words() -> None:
    assert signed(Estimate(0.2, -0.1, 0.5)) == "+0.20 [-0.10, +0.50]"
    assert [reading(Estimate(v, v - 1, v + 1)) for v in (2, 0, -2)] == [
        "above zero", "not told apart from zero", "below zero",
    ]  # fmt: skip
    alike = Estimate(0.0, 0.0, 0.0)
    assert (signed(alike), reading(alike)) == ("+0.00 (every seed)", "the same in every seed")
    assert (p_value(2e-5), p_value(0.0312)) == ("< 0.0001", "0.031")
    cut = share_estimate([0.9, 1.0, 1.0])
    assert cut.high == 1.0 and cut.low > 0
