"""Two stages of a data set of images, trained to an optimum: where every experiment begins."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msif_lib.influence import FixedEmbeddingInfluence, UpdatedEmbeddingInfluence
from msif_lib.solvers import MinRes, Solver
from msif_lib.stage import Stage, cross_entropy
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.models.networks import build_model
from msif_lib.training import TrainingReport, train_kept

Case = Literal["fixed", "updated"]

#: What the cases are called in tables and figures.
LABELS: dict[Case, str] = {
    "fixed": "case 1, embedding fixed",
    "updated": "case 2, embedding updated",
}


@dataclass(frozen=True)
class Setting:
    """Networks and training of both stages. The paper's are not known; these are ours.

    Attributes
    ----------
    architecture, widths, head
        As for :func:`msif_lib.study.models.networks.build_model`.
    l2_pretrain, l2_finetune
        Weight decay of each stage.
    alpha
        α of case 2, the pull of the finetuned embedding towards the pretrained one.
    gradient_tol
        Gradient norm at which a training ends.
    epochs
        Epochs of Adam with which a training from random weights begins.
    device
        Where to train.
    """

    architecture: str = "cnn"
    widths: tuple[int, ...] = (2, 4)
    head: str = "linear"
    l2_pretrain: float = 0.02
    l2_finetune: float = 0.01
    alpha: float = 0.01
    gradient_tol: float = 1e-9
    epochs: int = 20
    device: str = "cpu"


@dataclass(frozen=True)
class Trained:
    """The trained stages, with what is asked of them.

    Attributes
    ----------
    pretrain
        The pretrained stage (W̄, Ū).
    finetuned
        By case, the finetuned stage: of case 1 (W̄, Θ*), of case 2 (W*, Θ*).
    test
        Test examples of the finetuning task, on the stages' device.
    alpha
        α of case 2.
    reports
        How the trainings ended: ``"pretraining"`` and each case's.
    """

    pretrain: Stage
    finetuned: dict[Case, Stage]
    test: tuple[Tensor, Tensor]
    alpha: float
    reports: dict[str, TrainingReport]

    def influence(
        self,
        case: Case,
        solver: Solver = MinRes(),  # noqa: B008
    ) -> FixedEmbeddingInfluence | UpdatedEmbeddingInfluence:
        """The influence function of a case, with one solver for all inverse Hessians."""
        finetuned = self.finetuned[case]
        if case == "fixed":
            return FixedEmbeddingInfluence(self.pretrain, finetuned, solver, progress=False)
        return UpdatedEmbeddingInfluence(
            self.pretrain, finetuned, self.alpha, solver, progress=False
        )

    def accuracy(self, case: Case) -> float:
        """Share of the test examples that the finetuned model of a case gets right."""
        stage, (inputs, targets) = self.finetuned[case], self.test
        with torch.no_grad():
            outputs = stage.outputs(stage.embedding_vector(), stage.head_vector(), inputs)
        return float((outputs.argmax(1) == targets).double().mean())

    def test_loss(self, case: Case) -> float:
        """Mean loss of the finetuned model of a case over the test examples."""
        stage = self.finetuned[case]
        with torch.no_grad():
            losses = stage.losses(stage.embedding_vector(), stage.head_vector(), *self.test)
        return float(losses.mean())


def try_out(
    dataset: str,
    pretrain_classes: Sequence[int] | None,
    finetune_classes: Sequence[int] | None,
    pretrain_size: int | None,
    finetune_size: int | None,
    test_size: int | None,
    architecture: str,
    networks: Sequence[Sequence[int]],
) -> TwoStageData:
    """Draw the data and build the networks, and train nothing, to see whether all fits together.

    Parameters
    ----------
    dataset, pretrain_classes, finetune_classes, pretrain_size, finetune_size, test_size
        As for :func:`msif_lib.study.data.datasets.two_stages`.
    architecture, networks
        As for :func:`msif_lib.study.models.networks.build_model`, which is called with each of the
        widths in `networks`.

    Returns
    -------
    TwoStageData
        The draw of seed 0.

    Raises
    ------
    ValueError
        What the two say of classes, sizes and widths.
    """
    data = two_stages(
        dataset, pretrain_classes, finetune_classes, pretrain_size, finetune_size, test_size
    )
    for widths in networks:
        try:
            build_model(architecture, "linear", data.images.image_shape, 2, 2, widths=widths)
        except ValueError as error:
            raise ValueError(f"widths {list(widths)}: {error}") from error
    return data


def train_two_stages(
    data: TwoStageData,
    setting: Setting = Setting(),
    seed: int = 0,
    cases: Sequence[Case] = ("fixed", "updated"),
    keep: Sequence[int] | Tensor | None = None,
    start: Trained | None = None,
    checkpoint: str | Path | None = None,
) -> Trained:
    """Pretrain, and finetune in each case, until the gradients vanish.

    Parameters
    ----------
    data
        The data of both stages.
    setting
        Networks and training.
    seed
        Of the initial weights and the order of mini-batches.
    cases
        ``"fixed"``: a new head on the kept embedding. ``"updated"``: embedding and head minimise
        α‖W − W̄‖² + F, from W̄ and the head of case 1.
    keep
        Positions in the pretraining data that are used; None: all.
    start
        Stages at whose parameters the trainings begin; None: random weights.
    checkpoint
        A folder that keeps each training; the same call again trains nothing.

    Returns
    -------
    Trained
        The stages.

    Raises
    ------
    ValueError
        Weight decay has shrunk the pretrained embedding to nothing, so that no example has
        influence.

    Warns
    -----
    TrainingWarning
        A training ended above the tolerance.
    """
    inputs, targets = data.pretrain if keep is None else (leaf[keep] for leaf in data.pretrain)
    embedding, pretrain_head, finetune_head = build_model(
        setting.architecture, setting.head, data.images.image_shape, len(data.pretrain_classes),
        len(data.finetune_classes), seed=seed, dtype=inputs.dtype, widths=setting.widths,
    )  # fmt: skip

    def on_device(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].to(setting.device), pair[1].to(setting.device)

    def stage(
        embedding: nn.Module, head: nn.Module, pair: tuple[Tensor, Tensor], l2: float
    ) -> Stage:
        embedding, head = (copy.deepcopy(part).to(setting.device) for part in (embedding, head))
        return Stage(embedding, head, cross_entropy, on_device(pair), l2=l2)

    def trained(stage: Stage, epochs: int, **more: Any) -> TrainingReport:
        return train_kept(
            stage, setting.gradient_tol, checkpoint=checkpoint, seed=seed, epochs=epochs, **more
        )

    epochs = setting.epochs if start is None else 0

    pretrain = stage(embedding, pretrain_head, (inputs, targets), setting.l2_pretrain)
    if start is not None:
        pretrain.load_vector(start.pretrain.vector())
    reports = {"pretraining": trained(pretrain, epochs)}
    w_bar = pretrain.embedding_vector()
    if w_bar.abs().max() < 1e-3:
        raise ValueError(
            f"seed {seed}: weight decay {setting.l2_pretrain} has shrunk the embedding to "
            "nothing, so that no example has influence; lower l2_pretrain"
        )
    fixed = stage(pretrain.embedding, finetune_head, data.finetune, setting.l2_finetune)
    if start is not None and "fixed" in start.finetuned:
        fixed.load_vector(torch.cat([w_bar, start.finetuned["fixed"].head_vector()]))
    reports["fixed"] = trained(fixed, epochs, head_only=True)
    finetuned: dict[Case, Stage] = {"fixed": fixed}
    if "updated" in cases:
        updated = stage(fixed.embedding, fixed.head, data.finetune, setting.l2_finetune)
        if start is not None and "updated" in start.finetuned:
            updated.load_vector(start.finetuned["updated"].vector())
        reports["updated"] = trained(updated, 0, towards=w_bar, alpha=setting.alpha)
        finetuned["updated"] = updated
    return Trained(
        pretrain=pretrain,
        finetuned={case: finetuned[case] for case in cases},
        test=on_device(data.test),
        alpha=setting.alpha,
        reports=reports,
    )
