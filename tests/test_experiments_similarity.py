"""Like and unlike tasks: scores against the chain's own, ratios against a table of known ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from msif_lib import Chain
from msif_lib.links import Frozen, Optimum
from msif_lib.solvers import Dense
from msif_lib.study.experiments.experiment import Setting
from msif_lib.study.experiments.similarity import (
    SAME,
    Design,
    Square,
    all_pairs,
    beside_row,
    measure,
    shared_classes,
    tasks_of,
)

SEEDS = (4, 3)  # not in their order


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Design:
    return Design(
        "digits", [(0, 1), (2, 5)], (10, 8, 6),
        Setting(widths=(2,), l2_pretrain=0.02, gradient_tol=1e-6), ["fixed"], Dense(),
        tmp_path_factory.mktemp("kept"),
    )  # fmt: skip


def table(likeness: float, spread: float = 0.0) -> pd.DataFrame:
    """Sizes whose logarithm is a task effect of either stage, and `likeness` where both agree."""
    return pd.DataFrame(
        {
            "seed": seed, "pretraining": p, "finetuning": f, "case": "fixed",
            "size": np.exp(0.3 * p - 1.1 * (p if f == SAME else f) + 0.2 * seed
                           + (p == f or f == SAME) * (likeness + spread * (seed == 4))
                           + 0.5 * (f == SAME)),
        }
        for seed in SEEDS for p in range(3) for f in (0, 1, 2, SAME)
    )  # fmt: skip


def test_task_effects_cancel_in_the_square() -> None:
    square = Square(table(0.7, spread=0.1), SEEDS)
    assert square.log_ratios("fixed", "size") == pytest.approx([0.8, 0.7])
    assert square.log_ratios("fixed", "size", same=True) == pytest.approx([1.3, 1.2])


def test_single_comparisons_keep_the_task_effects() -> None:
    square = Square(table(0.7), SEEDS)
    singles = square.single_ratios("fixed")
    assert len(singles) == 2 * 3 * 2
    assert singles.max() == pytest.approx(np.exp(0.7 + 2.2))  # the first task against the last
    assert square.first_tasks("fixed").value == pytest.approx(np.exp(0.7 + 1.1))
    assert np.log(square.grid("fixed")[0, 1]) == pytest.approx(-1.1 + 0.2 * 3.5)


def test_a_summary_is_shown_beside_a_record_of_the_same_form() -> None:
    entries = Square(table(0.7, spread=0.1), SEEDS).summary("fixed")
    recorded = entries | {name: vars(entries[name]) for name in ("ratio", "single")}
    row = beside_row("digits", "fixed", entries, 2)
    assert row == beside_row("digits", "fixed", recorded, 2)
    assert row["ratio, all pairs"].startswith("2.12 [")
    assert float(row["mean |I|, like"]) == pytest.approx(entries["like"], rel=1e-2)


def test_scores_of_a_pair_are_those_of_the_chain(design: Design) -> None:
    data = design.cut(design.draw(1), *design.tasks)
    trained = design.train(data, 1)
    finetune = trained.finetuned["fixed"]
    chain = Chain([Optimum(trained.pretrain, Dense()), Frozen(finetune, Dense())], progress=False)
    expected = chain.scores(trained.test)[0].values.numpy()
    measured = measure(trained.pretrain, {("other", "fixed"): trained}, Dense())
    (row,) = measured.rows
    np.testing.assert_allclose(measured.scores["other", "fixed"], expected, rtol=1e-6, atol=1e-9)
    assert row["size"] == pytest.approx(np.abs(expected).mean())
    assert row["size"] == pytest.approx(row["length"] * row["reach"])
    assert row["per loss"] * row["loss"] * len(data.test[1]) == pytest.approx(row["size"])
    assert measured.converged == [True, True]


def test_every_task_is_finetuned_on_every_pretraining(design: Design) -> None:
    found = all_pairs(design, 1)
    names = {(row["pretraining"], row["finetuning"]) for one in found for row in one.rows}
    assert names == {(p, f) for p in (0, 1) for f in (0, 1, SAME)}
    assert {row["seed"] for one in found for row in one.rows} == {1}
    # Pretraining and finetuning, for each of three finetunings.
    assert [len(one.converged) for one in found] == [6, 6]


def test_the_classes_shared_grow_from_none_to_all(design: Design, monkeypatch) -> None:
    seen = []
    train = Design.train

    def remember(self, data, *arguments, **settings):
        seen.append((set(data.pretrain_classes), set(data.finetune_classes)))
        return train(self, data, *arguments, **settings)

    monkeypatch.setattr(Design, "train", remember)
    measured = shared_classes(design, 2, 2, "fixed")
    assert [len(own & others) for own, others in seen] == [0, 1, 2]
    assert len({frozenset(own) for own, _ in seen}) == 1
    assert [(row["seed"], row["finetuning"]) for row in measured.rows] == [(2, 0), (2, 1), (2, 2)]


def test_the_papers_tasks_come_first_on_its_data() -> None:
    assert tasks_of("cifar10")[:2] == [(2, 6), (1, 4)]
    assert tasks_of("digits") == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


def test_more_images_are_drawn_than_a_task_needs(design: Design) -> None:
    draw = design.draw(0)
    counts = np.bincount(draw.pretrain_original.numpy())
    assert len(counts) == 10 and counts.min() >= 10
    assert len(design.cut(draw, *design.tasks).pretrain[1]) == 20
