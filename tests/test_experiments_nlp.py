"""The experiment on sentences: models of a few parameters, and tables that are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from msif_lib import Chain
from msif_lib.evaluation import Estimate
from msif_lib.links import Frozen, Optimum
from msif_lib.retraining import Retraining
from msif_lib.solvers import Dense
from msif_lib.study.data.texts import two_stage_texts
from msif_lib.study.experiments.nlp import (
    METHODS,
    Design,
    Scored,
    Stages,
    datamodeling_score,
    extreme_rows,
    frequency_loss,
    groups_left_out,
    hold,
    mean_rank_correlation,
    over_seeds,
    score,
    specificity,
    two_stages,
    unknown_share,
    wrapped_table,
)
from msif_lib.study.models.language import PADDING, Sizes, Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DAMPING = 0.7


@pytest.fixture(scope="module")
def design() -> Design:
    size = Sizes(character_width=1, filters=((2, 2),), highways=0, projection=2, cells=2, layers=2)
    return Design(
        size, True, 3, 5, 1e-3, 1e-3, "zero", 2, 2e-2, 5, 1e-6, "dense", 3, 0.2, 1e-6, 5, 1e-2
    )


@pytest.fixture(scope="module")
def stages(design: Design) -> Stages:
    data = two_stage_texts("pydoc", 10, 8, 4, 8, 0)
    words = Vocabulary([text.tokens for text in data.pretrain], 12)
    return two_stages(design, data, words, 0, 3)


@pytest.fixture(scope="module")
def chain(stages: Stages) -> Chain:
    pretrain = Optimum(stages.pretrain, Dense(damping=DAMPING))
    return Chain([pretrain, Frozen(stages.finetune, Dense())], progress=False)


@pytest.fixture(scope="module")
def scored(design: Design, stages: Stages, chain: Chain) -> Scored:
    return score(design, stages, chain, DAMPING)


def test_scores_are_those_of_the_chain(stages: Stages, chain: Chain, scored: Scored) -> None:
    expected = chain.scores(stages.test, per_test=True)[0].values
    assert scored.values.shape == (10, 3)
    torch.testing.assert_close(scored.values, expected, rtol=1e-7, atol=1e-10)


def test_predictions_are_sums_over_the_groups(stages: Stages, scored: Scored) -> None:
    groups = [[0, 3], [9, 1]]
    change = torch.arange(6.0).reshape(2, 3).double()
    truth = Retraining(
        change + 5, torch.full((3,), 5.0).double(), torch.tensor([True, False]), True,
        torch.zeros(2, 2), torch.zeros(2, 2), "fixed weight", "warm", 0,
    )  # fmt: skip
    held = hold(stages, scored, groups, truth, 0.5, 1.0)
    np.testing.assert_allclose(held.change, 2 * change.numpy())
    expected = [-float(scored.values[group].sum()) / 10 for group in groups]
    np.testing.assert_allclose(held.predicted["influence"].sum(1), expected, atol=1e-12)
    assert held.predicted.keys() == held.scores.keys() == METHODS.keys()
    assert held.score_of(scored.values).value == pytest.approx(held.scores["influence"].value)
    assert held.ended == pytest.approx(2 / 3)


def test_sentences_of_extreme_influence_are_shown(stages: Stages, scored: Scored) -> None:
    rows = list(extreme_rows(stages, scored.values, 2))
    assert len(rows) == 4
    top = int(scored.values[:, 0].abs().argmax())
    assert rows[0]["pretraining sentence"] == stages.data.pretrain[top].text
    assert rows[0]["I"] == f"{float(scored.values[top, 0]):+.1g}"
    assert "&lt;b&gt;" in wrapped_table([{"a": "<b>"}])


def test_a_ranking_by_length_alone_is_not_specific(stages: Stages, scored: Scored) -> None:
    same = scored.gradient_norms[:, None] * torch.tensor([1.0, -2.0, 3.0])
    alike = dataclasses.replace(scored, scores=dataclasses.replace(scored.scores, values=same))
    found = specificity(stages, alike)
    assert found["on top"] == 1
    assert found["between texts"] == pytest.approx(1)
    assert found["gradient"] == pytest.approx(1)
    own = specificity(stages, scored)
    assert own["between texts"] < 1


def test_groups_have_the_share_asked_for_and_no_sentence_twice(design: Design) -> None:
    groups = groups_left_out(design, 20, seed=3)
    assert [len(set(group)) for group in groups] == [4, 4, 4]
    assert groups == groups_left_out(design, 20, seed=3) != groups_left_out(design, 20, seed=4)


def test_decay_to_the_start_vanishes_there(design: Design) -> None:
    head = nn.Linear(2, 1).double()
    assert design.decay(head, 0.1) == {"l2": 0.1}
    pulled = Design(**{**vars(design), "decay_to": "start"}).decay(head, 0.1)["regularizer"]
    named = {f"head.{name}": value.detach() for name, value in head.named_parameters()}
    assert float(pulled(named)) == 0
    moved = named | {"head.weight": named["head.weight"] + 2}
    assert float(pulled(moved)) == pytest.approx(0.05 * 2 * 4)


def test_frequencies_and_unknown_words(stages: Stages) -> None:
    targets = torch.tensor([[4, 5, PADDING], [4, 5, PADDING]])
    assert frequency_loss(targets) == pytest.approx(math.log(2))
    tokens, unknown = unknown_share(stages.data, stages.vocabulary)
    assert tokens == sum(len(text.tokens) for text in stages.data.pretrain)
    assert 0 < unknown < 1


def test_the_datamodeling_score_of_known_predictions() -> None:
    change = np.random.default_rng(0).normal(size=(12, 4))
    assert mean_rank_correlation(np.exp(change), change) == pytest.approx(1)
    assert mean_rank_correlation(np.ones_like(change), change) == 0
    half = np.concatenate([change[:, :2], -change[:, 2:]], 1)
    assert mean_rank_correlation(half, change) == pytest.approx(0)
    noisy = datamodeling_score(change + np.random.default_rng(1).normal(size=(12, 4)), change)
    assert noisy.low < noisy.value < noisy.high < 1


def test_intervals_over_seeds() -> None:
    one = Estimate(0.5, 0.4, 0.6)
    assert over_seeds([one]) is one
    several = over_seeds([one, Estimate(0.9, 0.8, 1.0)])
    assert (several.value, several.low, several.high) == (pytest.approx(0.7), -1.0, 1.0)
