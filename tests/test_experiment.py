"""Both stages of an experiment: where they begin, where they end, and what is kept of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msif_lib import FixedEmbeddingInfluence, UpdatedEmbeddingInfluence, training
from msif_lib.retraining import RetrainingSettings, retrain_without
from msif_lib.solvers import Dense
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.experiments.experiment import Setting, Trained, train_two_stages

SETTING = Setting(widths=(2,), alpha=0.07, gradient_tol=1e-10)
SEED = 1


@pytest.fixture(scope="module")
def data() -> TwoStageData:
    return two_stages("digits", None, None, 60, 50, 30, seed=SEED, dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(data: TwoStageData) -> Trained:
    return train_two_stages(data, SETTING, SEED)


def gradient_norms(trained: Trained) -> dict[str, float]:
    """Of the objectives written out, by autograd: what the three trainings minimise."""
    l2 = {"pretraining": SETTING.l2_pretrain, "fixed": SETTING.l2_finetune}
    w_bar = trained.pretrain.embedding_vector()
    norms = {}
    for name in ("pretraining", "fixed", "updated"):
        stage = trained.pretrain if name == "pretraining" else trained.finetuned[name]
        w, h = (part.requires_grad_() for part in (stage.embedding_vector(), stage.head_vector()))
        inputs, targets = stage.data
        value = torch.nn.functional.cross_entropy(stage.outputs(w, h, inputs), targets)
        value = value + 0.5 * l2.get(name, SETTING.l2_finetune) * (w @ w + h @ h)
        if name == "updated":
            value = value + SETTING.alpha * (w - w_bar) @ (w - w_bar)
        of_w, of_h = torch.autograd.grad(value, (w, h))
        norms[name] = float((of_h if name == "fixed" else torch.cat([of_w, of_h])).norm())
    return norms


def vectors(trained: Trained) -> list[Tensor]:
    return [stage.vector() for stage in (trained.pretrain, *trained.finetuned.values())]


def test_every_stage_ends_at_a_minimum_of_its_own_objective(trained: Trained) -> None:
    assert set(trained.reports) == {"pretraining", "fixed", "updated"}
    assert all(report.converged for report in trained.reports.values())
    assert max(gradient_norms(trained).values()) < 2e-10


def test_case_1_keeps_the_embedding_and_case_2_moves_it(trained: Trained) -> None:
    w_bar = trained.pretrain.embedding_vector()
    assert torch.equal(trained.finetuned["fixed"].embedding_vector(), w_bar)
    assert not torch.allclose(trained.finetuned["updated"].embedding_vector(), w_bar)
    modules = [stage.embedding for stage in (trained.pretrain, *trained.finetuned.values())]
    assert len({id(module) for module in modules}) == 3


def test_only_the_cases_asked_for_are_trained(data: TwoStageData, trained: Trained) -> None:
    for case in ("fixed", "updated"):
        alone = train_two_stages(data, SETTING, SEED, cases=[case])
        assert list(alone.finetuned) == [case]
        assert torch.equal(alone.finetuned[case].vector(), trained.finetuned[case].vector())
    assert "updated" not in train_two_stages(data, SETTING, SEED, cases=["fixed"]).reports


def test_a_seed_gives_the_same_models_and_another_seed_others(
    data: TwoStageData, trained: Trained
) -> None:
    again, other = (train_two_stages(data, SETTING, seed, ["fixed"]) for seed in (SEED, SEED + 1))
    assert torch.equal(again.pretrain.vector(), trained.pretrain.vector())
    assert not torch.allclose(other.pretrain.vector(), trained.pretrain.vector())


def test_scores_are_those_of_the_influence_functions(trained: Trained) -> None:
    exact = {
        "fixed": FixedEmbeddingInfluence(
            trained.pretrain, trained.finetuned["fixed"], Dense(), progress=False
        ),
        "updated": UpdatedEmbeddingInfluence(
            trained.pretrain, trained.finetuned["updated"], SETTING.alpha, Dense(), progress=False
        ),
    }
    for case, function in exact.items():
        expected = function.scores(trained.test).values
        found = trained.influence(case, Dense()).scores(trained.test).values
        assert torch.equal(found, expected)
        assert type(trained.influence(case)) is type(function)


def test_accuracy_and_loss_are_those_of_the_test_examples(trained: Trained) -> None:
    inputs, targets = trained.test
    for case, stage in trained.finetuned.items():
        with torch.no_grad():
            outputs = stage.head(stage.embedding(inputs))
        expected = float((outputs.argmax(1) == targets).double().mean())
        assert trained.accuracy(case) == pytest.approx(expected, abs=1e-12)
        loss = float(torch.nn.functional.cross_entropy(outputs, targets))
        assert trained.test_loss(case) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("case", ["fixed", "updated"])
def test_keeping_a_part_is_retraining_without_the_rest(
    data: TwoStageData, trained: Trained, case: str
) -> None:
    left_out = [3, 17]
    keep = [i for i in range(60) if i not in left_out]
    kept = train_two_stages(data, SETTING, SEED, ["fixed", "updated"], keep, start=trained)
    truth = retrain_without(
        trained.influence(case), [left_out], trained.test, renormalise=True,
        settings=RetrainingSettings(tol=1e-10), progress=False,
    )  # fmt: skip
    assert truth.converged.all()
    assert kept.pretrain.size == 58
    assert kept.test_loss(case) == pytest.approx(float(truth.losses.mean()), rel=1e-7)


def test_a_warm_start_trains_no_epochs_and_ends_at_the_same_minimum(
    data: TwoStageData, trained: Trained
) -> None:
    again = train_two_stages(data, SETTING, SEED, start=trained)
    assert {report.epochs for report in again.reports.values()} == {0}
    for found, expected in zip(vectors(again), vectors(trained), strict=True):
        assert torch.allclose(found, expected, atol=1e-7)


def test_a_folder_keeps_each_training(
    data: TwoStageData, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_two_stages(data, SETTING, SEED, checkpoint=tmp_path)
    assert len(list(tmp_path.glob("training-*.pt"))) == 3

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", refuse)
    again = train_two_stages(data, SETTING, SEED, checkpoint=tmp_path)
    for found, kept, without in zip(vectors(again), vectors(first), vectors(trained), strict=True):
        assert torch.equal(found, kept)
        assert torch.equal(kept, without)
    assert again.reports == first.reports
    for other, seed in (
        (dataclasses.replace(SETTING, alpha=0.08), SEED),
        (dataclasses.replace(SETTING, l2_pretrain=0.03), SEED),
        (SETTING, SEED + 1),
    ):
        with pytest.raises(AssertionError, match="trained again"):
            train_two_stages(data, other, seed, checkpoint=tmp_path)


def test_a_changed_label_is_another_training(data: TwoStageData, tmp_path: Path) -> None:
    before = train_two_stages(data, SETTING, SEED, ["fixed"], checkpoint=tmp_path)
    inputs, targets = data.pretrain
    labels = targets.clone()
    labels[0] = (labels[0] + 1) % 4
    noisy = dataclasses.replace(data, pretrain=(inputs, labels))
    after = train_two_stages(noisy, SETTING, SEED, ["fixed"], checkpoint=tmp_path)
    assert not torch.allclose(after.pretrain.vector(), before.pretrain.vector())


def test_an_embedding_that_weight_decay_has_switched_off_is_refused(data: TwoStageData) -> None:
    with pytest.raises(ValueError, match=r"shrunk the embedding to nothing.*lower l2_pretrain"):
        train_two_stages(data, dataclasses.replace(SETTING, l2_pretrain=10.0), SEED)
