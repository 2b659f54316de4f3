"""When is the removal of an example too large a step for a derivative? One setting a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from msif_lib.evaluation import Agreement, compare
from msif_lib.influence import SingleStageInfluence
from msif_lib.solvers import Solver
from msif_lib.study.experiments.agreement import SHORT, Run, Truth, measure
from msif_lib.study.experiments.experiment import Case, Setting, Trained


@dataclass(frozen=True)
class Step:
    """One setting in one case: the same examples removed, and with less of their weight.

    Attributes
    ----------
    setting
        Networks and training.
    run
        The removals.
    own
        Predicted rise of the removed examples' own pretraining losses, the median: a network's
        leverage, known without retraining.
    whole, partial
        Agreement of the same predictions with full and with partial removal, the second per share
        of the weight.
    """

    setting: Setting
    run: Run
    own: float
    whole: Agreement
    partial: Agreement

    @property
    def off(self) -> int:
        """Examples whose true change differs from the predicted one by more than half of it."""
        effect = self.run.effect
        return int((np.abs(self.run.change - effect) > 0.5 * np.abs(effect)).sum())

    @property
    def case(self) -> str:
        """The case's short name."""
        return SHORT[self.run.case]

    @property
    def widths(self) -> str:
        """The layers' widths in words."""
        return ", ".join(map(str, self.setting.widths))

    def row(self) -> dict[str, Any]:
        """What a record keeps."""
        return {
            "widths": self.widths, "weight decay": self.setting.l2_pretrain, "case": self.case,
            "off": self.off, "own": self.own, "whole": self.whole, "partial": self.partial,
        }  # fmt: skip


def measure_step(
    trained: Trained,
    setting: Setting,
    seed: int,
    cases: Sequence[Case],
    solver: Solver,
    removals: int,
    fraction: float,
    truth: Truth,
) -> list[Step]:
    """Remove the examples of largest |I|, wholly and in part.

    Parameters
    ----------
    trained, setting, seed
        The stages, and how they were trained.
    cases
        What is looked at.
    solver
        For the inverse Hessians.
    removals
        How many examples.
    fraction
        Share of an example's weight that partial removal takes away.
    truth
        How they are removed.

    Returns
    -------
    list of Step
        One a case.
    """
    single = SingleStageInfluence(trained.pretrain, solver, progress=False)
    steps = []
    for run in measure(trained, seed, cases, solver, removals, ["top"], truth):
        chain = trained.influence(run.case, solver)
        partial = truth.change(chain, run.indices, trained.test, fraction)
        own = single.self_influence(run.indices.tolist()).removal_effect
        steps.append(
            Step(
                setting, run, float(own.median()), run.agreements["influence"],
                compare(run.effect, partial),
            )
        )  # fmt: skip
    return steps


def answer(steps: Sequence[Step], fraction: float) -> str:
    """The page's answer: what a smaller step does where the correlation is lowest."""
    worst = min(steps, key=lambda step: step.whole.pearson.value)
    whole, partial = worst.whole.pearson, worst.partial.pearson
    verdict = (
        "So the scores are right to first order there, and what full removal adds is the size of "
        "the step."
        if partial.low > 0.9
        else "So a smaller step does not bring these points onto the line, and the size of the "
        "step is not the whole explanation."
    )
    return (
        f"Over {len(steps)} combinations of setting and case, the lowest correlation with full "
        f"removal is **r = {whole}**: widths {worst.widths}, weight decay "
        f"{worst.setting.l2_pretrain:g}, {worst.case}. With {100 * fraction:g} % of each example's "
        f"weight taken away instead, the same scores have **r = {partial}** there. {verdict} "
        f"The intervals are over the {len(worst.run.indices)} examples removed, of seed "
        f"{worst.run.seed}."
    )
