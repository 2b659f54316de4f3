"""Removals, planted noise and the accuracy after retraining, each against another way to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from msif_lib.study.data.datasets import two_stages
from msif_lib.study.experiments.cleansing import flip_labels, outcomes_without, unseen_images
from msif_lib.study.experiments.experiment import Setting, Trained, train_two_stages

SETTING = Setting(widths=(2,), l2_pretrain=0.05, l2_finetune=0.02, alpha=0.03, epochs=10)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train_two_stages(two_stages("digits", None, None, 60, 60, 40, seed=1), SETTING, seed=1)


@pytest.mark.parametrize("case", ["fixed", "updated"])
def test_outcomes_are_those_of_training_on_what_is_left(trained: Trained, case: str) -> None:
    data = two_stages("digits", None, None, 60, 60, 40, seed=1)
    removed = [3, 10, 11, 40, 41, 59]
    outcomes = outcomes_without(trained, case, [removed, [0]])
    keep = [i for i in range(60) if i not in removed]
    direct = train_two_stages(data, SETTING, 1, (case,), keep=keep, start=trained)
    assert outcomes.converged.all()
    assert outcomes.losses.shape == outcomes.correct.shape == (2, 40)
    assert float(outcomes.losses[0].mean()) == pytest.approx(direct.test_loss(case), abs=1e-8)
    assert float(outcomes.correct[0].double().mean()) == direct.accuracy(case)
    assert float(outcomes.losses_before.mean()) == pytest.approx(trained.test_loss(case), abs=1e-8)
    assert float(outcomes.correct_before.double().mean()) == trained.accuracy(case)
    # The removal did something, so that the agreement above is one of changes.
    assert abs(float((outcomes.losses[0] - outcomes.losses_before).mean())) > 1e-5


def test_outcomes_hold_each_examples_own_loss(trained: Trained) -> None:
    stage = trained.finetuned["fixed"].with_data(trained.test, "test data")
    outcomes = outcomes_without(trained, "fixed", [[0]])
    assert torch.allclose(outcomes.losses_before, stage.example_losses(), atol=1e-8)


def test_influence_predicts_the_mean_over_what_is_left(trained: Trained) -> None:
    """The retraining convention is that of the renormalised group effect."""
    scores = trained.influence("fixed").scores(trained.test)
    outcomes = outcomes_without(trained, "fixed", [[int(scores.values.abs().argmax())], [5]])
    change = (outcomes.losses - outcomes.losses_before).sum(1)
    for removed, true in zip([[int(scores.values.abs().argmax())], [5]], change):
        predicted = scores.group_effect(removed, renormalise=True)
        assert float(true) == pytest.approx(float(predicted), rel=0.3, abs=2e-3)


def test_flipped_labels_are_all_wrong_and_as_many_as_asked() -> None:
    labels = torch.arange(500) % 4
    noisy, wrong = flip_labels(labels, 4, 0.1, seed=3)
    assert int(wrong.sum()) == 50
    assert torch.equal(noisy != labels, wrong)
    assert int(noisy.min()) >= 0 and int(noisy.max()) < 4
    assert torch.equal(flip_labels(labels, 4, 0.1, seed=3)[0], noisy)
    assert not torch.equal(flip_labels(labels, 4, 0.1, seed=4)[0], noisy)


def test_flipped_labels_fall_on_every_other_class_alike() -> None:
    labels = torch.zeros(30_000, dtype=torch.long)
    noisy, _ = flip_labels(labels, 3, 1.0, seed=0)
    share = (noisy == 1).double().mean()
    assert set(noisy.tolist()) == {1, 2}
    assert float(share) == pytest.approx(0.5, abs=0.02)


def test_impossible_noise_is_refused() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"share must lie in 0\.\.1"):
        flip_labels(labels, 2, 1.5, 0)
    with pytest.raises(ValueError, match="classes be at least 2"):
        flip_labels(labels, 1, 0.1, 0)


def test_noisy_labels_go_into_training() -> None:
    data = two_stages("digits", None, None, 60, 60, 40, seed=1)
    noisy, wrong = flip_labels(data.pretrain[1], 4, 0.2, seed=0)
    planted = dataclasses.replace(data, pretrain=(data.pretrain[0], noisy))
    trained = train_two_stages(planted, SETTING, 1, ("fixed",))
    losses = trained.pretrain.example_losses()
    assert float(losses[wrong].mean()) > float(losses[~wrong].mean())


def test_unseen_images_are_in_no_stage_and_have_their_labels() -> None:
    data = two_stages("digits", None, None, 60, 300, 40, seed=1)
    inputs, labels = unseen_images(data, data.finetune_classes, seed=1)
    assert len(inputs) == int((data.images.train_targets >= 4).sum()) - 300
    seen = torch.cat([data.pretrain[0], data.finetune[0], data.test[0]]).flatten(1)
    pairs = {tuple(image) for image in seen.tolist()}
    assert not any(tuple(image) in pairs for image in inputs.flatten(1).tolist())
    # The label is that of the original image, found again by its pixels.
    original = data.images.normalise(data.images.train_pixels, torch.float64).flatten(1)
    for image, label in list(zip(inputs.flatten(1), labels))[:20]:
        position = int((original - image).abs().sum(1).argmin())
        assert data.finetune_classes[int(label)] == int(data.images.train_targets[position])
    few, _ = unseen_images(data, data.finetune_classes, 10, seed=1)
    assert torch.equal(few, inputs[:10])


def test_too_many_unseen_images_are_refused() -> None:
    data = two_stages("digits", None, None, 60, 300, 40, seed=1)
    with pytest.raises(ValueError, match=r"561 images are in neither stage; .* \(now 562\)"):
        unseen_images(data, data.finetune_classes, 562)
