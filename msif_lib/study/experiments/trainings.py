"""Trainings that the formulas do not describe: plain finetuning, and pretraining that stops early.

Both are scored by the formulas of an optimum all the same, and by a walk back through the steps.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch

from msif_lib.curvature import Hessian
from msif_lib.evaluation import Agreement, Estimate, compare
from msif_lib.influence import Chain, UpdatedEmbeddingInfluence
from msif_lib.links import Frozen, Optimum, Unrolled
from msif_lib.scores import Scores
from msif_lib.solvers import Solver, SolverWarning
from msif_lib.stage import Stage
from msif_lib.study.data.datasets import TwoStageData
from msif_lib.study.experiments.agreement import Truth, largest, median_range, over_seeds
from msif_lib.study.experiments.experiment import Setting, Trained
from msif_lib.study.models.networks import build_model
from msif_lib.study.records import read_record
from msif_lib.training import SGD, AdamW, descend, train
from msif_lib.training import Path as Steps

_ADAM_RATE, _BATCH = 0.005, 64  # of pretraining that stops early


@dataclass(frozen=True)
class Plain:
    """Case 2 finetuned by steps without a pull, in one seed and of one length.

    Attributes
    ----------
    seed
        Which.
    length
        Of finetuning, in units of the length that fits α.
    steps
        How many those were.
    gradient_norm
        Where they ended.
    optimum, there, through
        Agreement with the truth of plain finetuning: of eq. 12 at its own optimum, of eq. 12
        where the steps ended, and of the chain with the steps as a link.
    proximal
        Agreement of the truth of eq. 12 with that of plain finetuning.
    same
        Agreement of eq. 12 with its own truth, of the same examples.
    """

    seed: int
    length: float
    steps: int
    gradient_norm: float
    optimum: Agreement
    there: Agreement
    through: Agreement
    proximal: Agreement
    same: Agreement

    def row(self) -> dict[str, Any]:
        """What a record keeps."""
        row = {name: value for name, value in vars(self).items() if name != "gradient_norm"}
        return row | {"gradient norm": self.gradient_norm}


def fitting_steps(stage: Stage, alpha: float, momentum: float, length: float) -> tuple[float, int]:
    """Learning rate and number of the steps that α stands for: 2α = (1 − β) / (ηT).

    Parameters
    ----------
    stage
        The finetuning stage where the steps begin.
    alpha
        The pull of eq. 12.
    momentum
        β.
    length
        1 for that T, less for a share of it.

    Returns
    -------
    rate : float
        η, one over the largest eigenvalue of the stage's Hessian.
    steps : int
        At least one.
    """
    operator = Hessian(stage).to_scipy()
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    (highest,) = scipy.sparse.linalg.eigsh(
        operator, 1, which="LA", v0=start, return_eigenvectors=False
    )
    rate = 1 / float(highest)
    return rate, max(1, round(length * (1 - momentum) / (2 * alpha * rate)))


def finetuned_plainly(
    headed: Stage, rate: float, momentum: float, steps: int, seed: int
) -> tuple[Stage, Steps]:
    """Finetune embedding and head together, by full-batch steps without a pull.

    Parameters
    ----------
    headed
        Case 1's stage, whose head is trained on the pretrained embedding. It stays as it is.
    rate, momentum, steps, seed
        Of :func:`msif_lib.training.descend`.

    Returns
    -------
    stage : Stage
        Where the steps ended.
    path : Path
        The steps.
    """
    copied = copy.deepcopy(headed)
    stage = Stage.of(copied.model, copied.loss, copied.data, l2=copied.l2)
    return stage, descend(stage, SGD(rate, momentum), steps, stage.size, seed, progress=False)


def measure_plain(
    trained: Trained,
    seed: int,
    lengths: Sequence[float],
    removals: int,
    momentum: float,
    solver: Solver,
    truth: Truth,
) -> list[Plain]:
    """Finetune plainly, remove the examples of largest |I| by eq. 12, and compare.

    Parameters
    ----------
    trained, seed
        The stages of both cases.
    lengths
        Of finetuning, in units of the length that fits α.
    removals
        How many examples.
    momentum
        Of the steps.
    solver
        For the inverse Hessians.
    truth
        How examples are removed.

    Returns
    -------
    list of Plain
        One a length.
    """
    pretrain, headed, test = trained.pretrain, trained.finetuned["fixed"], trained.test
    proximal = trained.influence("updated", solver)
    effect = truth.predicted(proximal.scores(test))
    indices = largest(effect, removals)
    effect, modelled = effect[indices], truth.change(proximal, indices, test)
    found = []
    for length in lengths:
        rate, steps = fitting_steps(headed, trained.alpha, momentum, length)
        tuned, path = finetuned_plainly(headed, rate, momentum, steps, seed)
        stopped = copy.deepcopy(headed)
        stopped.load_vector(tuned.vector())
        through = Chain(
            [Optimum(pretrain, solver), Frozen(headed, solver), Unrolled(tuned, path)],
            progress=False,
        )
        there = UpdatedEmbeddingInfluence(
            pretrain, stopped, trained.alpha, solver, stationarity_tol=math.inf, progress=False
        )
        change = truth.change(through, indices, test)
        found.append(
            Plain(
                seed, length, steps, float(stopped.gradient().norm()),
                optimum=compare(effect, change),
                there=compare(truth.predicted(_as_it_is(there, test))[indices], change),
                through=compare(truth.predicted(through.scores(test)[0])[indices], change),
                proximal=compare(modelled, change),
                same=compare(effect, modelled),
            )
        )  # fmt: skip
    return found


def _as_it_is(influence: Any, test: Any) -> Scores:
    """Scores where a gradient does not vanish: that is looked into here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        scores = influence.scores(test)
    return scores if isinstance(scores, Scores) else scores[0]


@dataclass(frozen=True)
class Early:
    """Case 1 whose pretraining stopped after some epochs.

    Attributes
    ----------
    epochs
        Of Adam; None at the optimum.
    gradient_norm
        Of pretraining, where it stopped.
    same
        Agreement of the formulas, which take the place for an optimum.
    through, partial
        Agreement of the walk back through the steps, with full removal and with partial; None at
        the optimum, to which no steps are recorded.
    """

    epochs: int | None
    gradient_norm: float
    same: Agreement
    through: Agreement | None = None
    partial: Agreement | None = None

    @property
    def stopped(self) -> str:
        """Where, in words."""
        return "at the optimum" if self.epochs is None else f"after {self.epochs} epochs of Adam"

    def row(self) -> dict[str, Any]:
        """What a record keeps."""
        return {
            "stopped": self.stopped, "epochs": self.epochs, "gradient norm": self.gradient_norm,
            "same": self.same, "through": self.through, "partial": self.partial,
        }  # fmt: skip


def measure_early(
    trained: Trained,
    data: TwoStageData,
    setting: Setting,
    seed: int,
    epochs: Sequence[int],
    removals: int,
    fraction: float,
    solver: Solver,
    truth: Truth,
) -> list[Early]:
    """Stop pretraining after so many epochs, and remove the examples of largest |I|.

    The head of case 1 is trained to its optimum each time, so that pretraining alone is unfinished.

    Parameters
    ----------
    trained, data, setting, seed
        The stages at their optimum, and how they were trained.
    epochs
        Where pretraining stops, one row each.
    removals
        How many examples, of largest |I| at the optimum.
    fraction
        Share of the weight that partial removal takes away.
    solver
        For the inverse Hessians.
    truth
        How examples are removed.

    Returns
    -------
    list of Early
        One for each entry of `epochs`, and the last at the optimum.
    """
    test, optimum = trained.test, trained.influence("fixed", solver)
    effect = truth.predicted(optimum.scores(test))
    indices = largest(effect, removals)
    found = []
    for count in epochs:
        pretrain, headed, path = stopped_early(trained, data, setting, seed, count, truth.tol)
        formulas = Chain(
            [Optimum(pretrain, solver), Frozen(headed, solver)], math.inf, progress=False
        )
        through = Chain([Unrolled(pretrain, path), Frozen(headed, solver)], progress=False)
        change = truth.change(through, indices, test)
        same, exact = (
            truth.predicted(_as_it_is(chain, test))[indices] for chain in (formulas, through)
        )
        found.append(
            Early(
                count, float(pretrain.gradient().norm()), compare(same, change),
                compare(exact, change),
                compare(exact, truth.change(through, indices, test, fraction)),
            )
        )  # fmt: skip
    change = truth.change(optimum, indices, test)
    norm = trained.reports["pretraining"].gradient_norm
    return [*found, Early(None, norm, compare(effect[indices], change))]


def stopped_early(
    trained: Trained, data: TwoStageData, setting: Setting, seed: int, epochs: int, tol: float
) -> tuple[Stage, Stage, Steps]:
    """Pretrain by so many epochs of Adam from random weights, and train the head of case 1 on it.

    Parameters
    ----------
    trained
        Stages whose data and losses are taken; they stay as they are.
    data, setting, seed
        Of the random weights and the mini-batches.
    epochs
        Of Adam, with a learning rate that falls to zero along a cosine.
    tol
        Gradient norm at which the head's training ends.

    Returns
    -------
    pretrain, headed : Stage
        Both stages.
    path : Path
        The steps of pretraining.
    """
    network = build_model(
        setting.architecture, setting.head, data.images.image_shape, len(data.pretrain_classes),
        len(data.finetune_classes), seed=seed, dtype=data.pretrain[0].dtype, widths=setting.widths,
    )[:2]  # fmt: skip
    initial = torch.cat([value.reshape(-1) for part in network for value in part.parameters()])
    pretrain, headed = copy.deepcopy((trained.pretrain, trained.finetuned["fixed"]))
    pretrain.load_vector(initial.detach().to(setting.device))
    steps = epochs * math.ceil(pretrain.size / _BATCH)
    rates = [_ADAM_RATE * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    adam = AdamW(_ADAM_RATE, weight_decay=0.0)
    path = descend(pretrain, adam, epochs, _BATCH, seed, rates, progress=False)
    headed.load_vector(torch.cat([pretrain.embedding_vector(), headed.head_vector()]))
    train(headed, tol, head_only=True, epochs=0)
    return pretrain, headed, path


def fitting(plain: Sequence[Plain]) -> list[Plain]:
    """Those whose length is nearest to the one that α stands for, one a seed."""
    nearest = min({one.length for one in plain}, key=lambda length: abs(math.log(length)))
    return [one for one in plain if one.length == nearest]


def claims(plain: Sequence[Plain]) -> dict[str, dict[str, Any]]:
    """What the runs claim beside the paper, by the names of the comparison."""
    if not plain:
        return {}
    fit = fitting(plain)
    return {
        "r_updated_plain": over_seeds([one.optimum.pearson for one in fit]),
        "r_updated_plain_through_steps": over_seeds([one.through.pearson for one in fit]),
    }


def answer(plain: Sequence[Plain], early: Sequence[Early]) -> str:
    """The page's answer, from what was run."""
    sentences = []
    if plain:
        fit = fitting(plain)
        optimum, through = (
            median_range((getattr(one, name).pearson for one in fit), 2)
            for name in ("optimum", "through")
        )
        sentences.append(
            f"Where case 2 is finetuned by steps that end, without the pull of eq. 12, the scores "
            f"of eq. 12 correlate with the truth at **r = {optimum}**, and those of a chain that "
            f"has these steps as a link at **r = {through}** (median over {len(fit)} seeds, lowest "
            "and highest in brackets)."
        )
    if early:
        *stopped, optimum_row = early
        sentences.append(
            f"Where pretraining stops early, r is {_ends(one.same for one in stopped)} for the "
            f"formulas of an optimum and {_ends(one.through for one in stopped)} for the walk back "
            f"through the steps; at the optimum the formulas have {optimum_row.same.pearson}."
        )
    return " ".join(sentences) or "Nothing was run: both numbers of removals are 0."


def _ends(agreements: Any) -> str:
    """Lowest and highest r."""
    values = [one.pearson.value for one in agreements]
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def recorded(results: Path) -> list[dict[str, Any]]:
    """Rows of a table: plain finetuning as recorded on other data, about the length that fits α.

    Parameters
    ----------
    results
        The folder of the records.
    """
    rows = []
    for path in sorted(results.glob("*.json")):
        plain = read_record(path)["values"].get("plain") or []
        if not plain:
            continue
        nearest = min({row["length"] for row in plain}, key=lambda length: abs(math.log(length)))
        fit = [row for row in plain if row["length"] == nearest]
        optimum, through = (
            median_range((Estimate(**row[name]["pearson"]) for row in fit), 2)
            for name in ("optimum", "through")
        )
        rows.append(
            {
                "data": f"{path.stem} (recorded)", "seeds": len(fit), "r, eq. 12": optimum,
                "r, through the steps": through,
            }
        )  # fmt: skip
    return rows
