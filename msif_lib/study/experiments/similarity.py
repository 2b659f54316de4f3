"""Do like tasks have larger scores? Every task finetuned on every pretraining (section 4.3).

All scores of a pretraining are I_i = −bᵀ s_i: of the finetuning only b = dq/dW̄ knows. So one pass
over the pretraining examples scores them for all tasks that are finetuned on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from msif_lib import Chain, Stage
from msif_lib.evaluation import Estimate
from msif_lib.links import Optimum
from msif_lib.solvers import Solver
from msif_lib.study.data.datasets import TwoStageData, load_images, two_stages
from msif_lib.study.data.tasks import restrict
from msif_lib.study.experiments.experiment import LABELS, Case, Setting, Trained, train_two_stages
from msif_lib.study.experiments.ratios import ratio, shown

#: What is measured of a pretraining and a finetuning, by its column.
MEASURES = {
    "size": "mean |I|, summed over the test set",
    "each": "mean |I|, single test examples",
    "per loss": "mean |I| per unit of test loss",
    "length": "dependence on the embedding, ‖b‖",
    "reach": "reach, mean |I| / ‖b‖",
    "loss": "test loss",
}

#: The finetuning on the very images of pretraining, in the column ``finetuning``.
SAME = "same images"


@dataclass(frozen=True)
class Design:
    """What is trained, and how it is scored.

    Attributes
    ----------
    dataset
        As for :func:`msif_lib.study.data.datasets.load_images`.
    tasks
        Pairs of classes.
    sizes
        Images of a class: for pretraining, for finetuning, for the test.
    setting
        Networks and training.
    cases
        Of the finetunings.
    solver
        For all inverse Hessians.
    checkpoint
        A folder that keeps each training; a pretraining recurs with every task.
    """

    dataset: str
    tasks: Sequence[tuple[int, int]]
    sizes: tuple[int, int, int]
    setting: Setting
    cases: Sequence[Case]
    solver: Solver
    checkpoint: str | Path

    @cached_property
    def classes(self) -> range:
        """All classes of the data set."""
        return range(len(load_images(self.dataset).class_names))

    @property
    def drawn(self) -> tuple[range, range, int, int, int]:
        """What a draw asks of the data: some more images than are needed, as classes differ."""
        pretrain, finetune, test = (int(1.15 * len(self.classes) * size) for size in self.sizes)
        return self.classes, self.classes, pretrain, finetune, test

    def draw(self, seed: int) -> TwoStageData:
        """Images of all classes, from which the tasks are cut."""
        return two_stages(self.dataset, *self.drawn, seed=seed)

    def cut(
        self, draw: TwoStageData, pretrain_classes: Sequence[int], finetune_classes: Sequence[int]
    ) -> TwoStageData:
        """Cut a pretraining and a finetuning task of as many classes out of a draw."""
        sizes = (len(pretrain_classes) * size for size in self.sizes)
        return restrict(draw, pretrain_classes, finetune_classes, *sizes)

    def train(
        self,
        data: TwoStageData,
        seed: int,
        kept: Trained | None = None,
        cases: Sequence[Case] | None = None,
    ) -> Trained:
        """Train both stages, or finetune a kept pretraining.

        Parameters
        ----------
        data
            Of both tasks.
        seed
            Of the initial weights.
        kept
            Stages whose pretraining is taken; None: it is trained.
        cases
            Other ones than the design's.
        """
        start = None if kept is None else dataclasses.replace(kept, finetuned={})
        return train_two_stages(
            data, self.setting, seed, cases or self.cases, start=start, checkpoint=self.checkpoint
        )


@dataclass(frozen=True)
class Measured:
    """What was measured of one pretraining and all that was finetuned on it.

    Attributes
    ----------
    rows
        One a finetuning and case, with a column for each of `MEASURES` and ``accuracy``.
    scores
        By finetuning and case, the scores of all m examples, summed over the test set, ``(m,)``.
    converged
        Whether each training reached its tolerance at a minimum.
    """

    rows: list[dict[str, Any]]
    scores: dict[tuple[Hashable, Case], NDArray[np.float64]]
    converged: list[bool]


def tasks_of(dataset: str) -> list[tuple[int, int]]:
    """Tasks on a data set: its classes in pairs; on CIFAR-10 the paper's two first.

    Parameters
    ----------
    dataset
        As for :func:`msif_lib.study.data.datasets.load_images`.
    """
    if dataset == "cifar10":
        return [(2, 6), (1, 4), (0, 8), (3, 5), (7, 9)]
    count = len(load_images(dataset).class_names)
    return [(first, first + 1) for first in range(0, count - 1, 2)]


def measure(
    pretrain: Stage, finetunings: Mapping[tuple[Hashable, Case], Trained], solver: Solver
) -> Measured:
    """Score one pretraining for each of several finetunings, in one pass over its examples.

    Parameters
    ----------
    pretrain
        The pretrained stage.
    finetunings
        By name and case, the stages finetuned on it.
    solver
        For all inverse Hessians.
    """
    sensitivities = []
    for (_, case), trained in finetunings.items():
        influence = trained.influence(case, solver)
        at_end = influence.test_gradients(trained.test, per_test=True)
        sensitivities.append(influence.sensitivity(at_end))  # b of every test example, a column
    cotangents = pretrain.parameters.put(torch.cat(sensitivities, 1), pretrain.shared)
    (scores,) = Chain([Optimum(pretrain, solver)], progress=False).pull_back(cotangents)
    by_finetuning = scores.values.split([b.shape[1] for b in sensitivities], 1)
    rows: list[dict[str, Any]] = []
    summed = {}
    for (name, case), b, each in zip(finetunings, sensitivities, by_finetuning):
        trained, total = finetunings[name, case], each.sum(1)
        tests, size, length = each.shape[1], float(total.abs().mean()), float(b.sum(1).norm())
        loss = trained.test_loss(case)
        rows.append(
            {
                "finetuning": name, "case": case, "size": size, "each": float(each.abs().mean()),
                "per loss": size / (loss * tests), "length": length, "reach": size / length,
                "loss": loss, "accuracy": trained.accuracy(case),
            }
        )  # fmt: skip
        summed[name, case] = total.numpy()
    converged = [
        report.converged
        for trained in {id(one): one for one in finetunings.values()}.values()
        for report in trained.reports.values()
    ]
    return Measured(rows, summed, converged)


def all_pairs(design: Design, seed: int) -> list[Measured]:
    """Every task finetuned on every pretraining, of one draw.

    Parameters
    ----------
    design
        What is trained.
    seed
        Of the draw and the initial weights.

    Returns
    -------
    list of Measured
        One a pretraining task, its rows with the columns ``seed`` and ``pretraining``. Finetunings
        are called by the number of their task; `SAME` is the like one on the images of pretraining.
    """
    draw, found = design.draw(seed), []
    for p, pretrain_classes in enumerate(design.tasks):
        kept: Trained | None = None
        finetunings: dict[tuple[Hashable, Case], Trained] = {}
        for f, finetune_classes in enumerate(design.tasks):
            data = design.cut(draw, pretrain_classes, finetune_classes)
            trained = design.train(data, seed, kept)
            kept = kept or trained
            finetunings |= {(f, case): trained for case in design.cases}
            if p == f:
                again = design.train(dataclasses.replace(data, finetune=data.pretrain), seed, kept)
                finetunings |= {(SAME, case): again for case in design.cases}
        assert kept is not None  # there are tasks
        measured = measure(kept.pretrain, finetunings, design.solver)
        rows = [{"seed": seed, "pretraining": p, **row} for row in measured.rows]
        found.append(dataclasses.replace(measured, rows=rows))
    return found


def shared_classes(design: Design, seed: int, classes: int, case: Case) -> Measured:
    """Finetunings that share none to all of their classes with one pretraining.

    Parameters
    ----------
    design
        What is trained.
    seed
        Of the draw, the initial weights and the classes.
    classes
        Of either task, at most half of all.
    case
        Of the finetunings.

    Returns
    -------
    Measured
        Finetunings are called by the number of shared classes; the rows have a column ``seed``.
    """
    draw, rng = design.draw(seed), np.random.default_rng(seed)
    order = rng.permutation(len(design.classes)).tolist()
    own, others = order[:classes], order[classes:]
    kept: Trained | None = None
    finetunings: dict[tuple[Hashable, Case], Trained] = {}
    for common in range(classes + 1):
        data = design.cut(draw, own, own[:common] + others[: classes - common])
        trained = design.train(data, seed, kept, [case])
        kept = kept or trained
        finetunings[common, case] = trained
    assert kept is not None  # none shared is one of them
    measured = measure(kept.pretrain, finetunings, design.solver)
    return dataclasses.replace(measured, rows=[{"seed": seed, **row} for row in measured.rows])


@dataclass(frozen=True)
class Square:
    """The table of all pairs, and what it says of like and unlike ones.

    Attributes
    ----------
    table
        The rows of :func:`all_pairs`, of all seeds.
    seeds
        In the order in which numbers come out.
    """

    table: pd.DataFrame
    seeds: Sequence[int]

    def pairs(self, case: Case) -> pd.DataFrame:
        """The rows of a case without those on the images of pretraining; ``like`` marks some."""
        some = self.table[(self.table.finetuning != SAME) & (self.table.case == case)].copy()
        some["like"] = some.pretraining == some.finetuning
        return some

    def log_ratios(self, case: Case, measure: str, same: bool = False) -> NDArray[np.float64]:
        """Mean logarithm over the like pairs less that over the unlike ones, one a seed.

        Parameters
        ----------
        case
            Of the finetunings.
        measure
            One of `MEASURES`.
        same
            Whether the like pairs are those on the very images of pretraining.
        """
        pairs = self.pairs(case)
        alike = pairs[pairs.like]
        if same:
            alike = self.table[(self.table.finetuning == SAME) & (self.table.case == case)]
        of_like, of_unlike = (
            np.log(rows.set_index("seed")[measure]).groupby("seed").mean()
            for rows in (alike, pairs[~pairs.like])
        )
        return (of_like - of_unlike).loc[list(self.seeds)].to_numpy()

    def single_ratios(self, case: Case) -> NDArray[np.float64]:
        """All comparisons of the paper's kind: mean |I| of a pretraining's own task over another's.

        One for each seed, pretraining and other task.
        """
        sizes = self.pairs(case).pivot(
            index=["seed", "pretraining"], columns="finetuning", values="size"
        )
        found = [
            row[p] / value
            for (_, p), row in sizes.iterrows() for f, value in row.items() if f != p
        ]  # fmt: skip
        return np.array(found, dtype=float)

    def first_tasks(self, case: Case) -> Estimate:
        """The paper's comparison: pretrained on the first task, finetuned on it or the second."""
        pairs = self.pairs(case)
        sizes = pairs[pairs.pretraining == 0].pivot(
            index="seed", columns="finetuning", values="size"
        )
        return ratio(np.log((sizes[0] / sizes[1]).astype(float)).loc[list(self.seeds)])

    def summary(self, case: Case) -> dict[str, Any]:
        """What a record keeps of a case: means over like and unlike pairs, and both ratios."""
        means = self.pairs(case).groupby("like")["size"].mean()
        return {
            "like": float(means[True]), "unlike": float(means[False]),
            "ratio": ratio(self.log_ratios(case, "size")), "single": self.first_tasks(case),
        }  # fmt: skip

    def grid(self, case: Case) -> NDArray[np.float64]:
        """Geometric mean over the seeds of mean |I|, ``(tasks, tasks)``: pretraining down."""
        logs = self.pairs(case).assign(size=lambda rows: np.log(rows["size"]))
        means = logs.groupby(["pretraining", "finetuning"])["size"].mean()
        return np.exp(means.unstack().to_numpy(dtype=float))


def beside_row(data: str, case: Case, entries: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """A row of the comparison with the paper and other records.

    Parameters
    ----------
    data
        What the data are called.
    case
        Of the finetunings.
    entries
        As of `Square.summary`, or as a record keeps it.
    seeds
        How many.
    """
    both, single = (
        value if isinstance(value, Estimate) else Estimate(**value)
        for value in (entries["ratio"], entries["single"])
    )
    return {
        "data": data, "case": LABELS[case].split(",")[0],
        "mean |I|, like": f"{entries['like']:.3g}", "unlike": f"{entries['unlike']:.3g}",
        "ratio, all pairs": shown(both), "ratio, first task against second": shown(single),
        "seeds": seeds,
    }  # fmt: skip
