"""Cleansing a pretraining set: what is removed, and what the finetuned model then gets right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msif_lib.retraining import RetrainingSettings, retrain_without
from msif_lib.study.data.datasets import TwoStageData
from msif_lib.study.experiments.experiment import Case, Trained


@dataclass(frozen=True)
class Outcomes:
    """How finetuned models do on T test examples, after each of R removals and before any.

    Attributes
    ----------
    losses, correct
        Loss of each test example, and whether its label is the one predicted, ``(R, T)``.
    losses_before, correct_before
        The same with nothing removed, ``(T,)``.
    converged
        Whether both trainings reached the tolerance, ``(R,)``.
    """

    losses: Tensor
    correct: Tensor
    losses_before: Tensor
    correct_before: Tensor
    converged: Tensor


def outcomes_without(
    trained: Trained,
    case: Case,
    removals: Sequence[Sequence[int]],
    tol: float = 1e-9,
    models_at_once: int = 32,
    checkpoint: str | Path | None = None,
) -> Outcomes:
    """Train both stages again without sets of pretraining examples, and test the finetuned model.

    The trainings begin at the trained parameters; the objective is the mean over the examples
    that are left, as of one who never had the others.

    Parameters
    ----------
    trained
        The stages, trained on everything.
    case
        Whether finetuning keeps or updates the embedding.
    removals
        R sets of positions in the pretraining data.
    tol, models_at_once
        As of :class:`msif_lib.retraining.RetrainingSettings`.
    checkpoint
        As for :func:`msif_lib.retraining.retrain_without`.

    Returns
    -------
    Outcomes
        On the test examples of `trained`.

    Raises
    ------
    ValueError
        As :func:`msif_lib.retraining.retrain_without`.
    """
    stage, (inputs, targets) = trained.finetuned[case], trained.test
    with torch.no_grad():
        outputs = stage.outputs(stage.embedding_vector(), stage.head_vector(), inputs[:1])
    labels = torch.arange(outputs.shape[1], device=targets.device)
    # Every test example with every label: the label of the lowest cross-entropy is the predicted.
    every = inputs.repeat_interleave(len(labels), 0), labels.repeat(len(targets))
    settings = RetrainingSettings(tol=tol, models_at_once=models_at_once)
    after = retrain_without(
        trained.influence(case), removals, every, renormalise=True, settings=settings,
        checkpoint=checkpoint, progress=False,
    )  # fmt: skip

    def tested(losses: Tensor) -> tuple[Tensor, Tensor]:
        by_label = losses.unflatten(-1, (len(targets), len(labels)))
        own = targets.expand(by_label.shape[:-1])[..., None]
        return by_label.gather(-1, own)[..., 0], by_label.argmin(-1) == targets

    losses, correct = tested(after.losses)
    losses_before, correct_before = tested(after.losses_before)
    return Outcomes(losses, correct, losses_before, correct_before, after.converged)


def flip_labels(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give a share of the examples a wrong label, drawn evenly from the other classes.

    Parameters
    ----------
    labels
        Class numbers 0 to `classes` − 1, ``(m,)``.
    classes
        Number of classes, at least 2.
    share
        Of the examples, between 0 and 1; their number is rounded.
    seed
        Of the draw.

    Returns
    -------
    tuple of Tensor
        The new labels, and a mask of the examples whose label is wrong, both ``(m,)``.

    Raises
    ------
    ValueError
        A share outside [0, 1] or fewer than two classes.
    """
    if not 0 <= share <= 1 or classes < 2:
        raise ValueError(
            f"share must lie in 0..1 and classes be at least 2, not {share} and {classes}"
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    wrong = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    wrong[chosen] = True
    shift = torch.from_numpy(rng.integers(1, classes, len(chosen))).to(labels)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy, wrong


def unseen_images(
    data: TwoStageData, classes: Sequence[int], size: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images of the training part of the data set that neither stage is trained on.

    Parameters
    ----------
    data
        The two stages.
    classes
        Classes wanted, in the order in which labels count.
    size
        How many, drawn at random; None: all there are.
    seed
        Of the draw.

    Returns
    -------
    tuple of Tensor
        Normalised images (N, channels, height, width) and labels (N,), in random order.

    Raises
    ------
    ValueError
        If there are none, or fewer than `size`.
    """
    images = data.images
    free = torch.isin(images.train_targets, torch.tensor(classes))
    free[data.pretrain_indices] = False
    free[data.finetune_indices] = False
    positions = np.random.default_rng([seed, 0]).permutation(free.nonzero()[:, 0].numpy())
    if not len(positions) or (size is not None and not 0 < size <= len(positions)):
        raise ValueError(
            f"of the classes {tuple(classes)} {len(positions)} images are in neither stage; "
            f"make the stages smaller, or the size (now {size})"
        )
    chosen = torch.from_numpy(positions[:size])
    labels = torch.tensor([list(classes).index(int(c)) for c in images.train_targets[chosen]])
    return images.normalise(images.train_pixels[chosen], data.finetune[0].dtype), labels
