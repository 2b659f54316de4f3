"""More finetuning examples, more finetuning steps: what each does to the scores (section 4.4).

Finetuning begins at (W̄, Θ_0) and takes k steps of gradient descent over n examples. Of every end
the sensitivity b = dq/dW̄ is noted, exactly, through the steps; beside it stand those that the
forgetting filter predicts from one trained model. One pass over the pretraining examples scores
them for all of these at once.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from msif_lib import Chain, Stage, UpdatedEmbeddingInfluence, cross_entropy
from msif_lib.curvature import proximal_hessian
from msif_lib.evaluation import Estimate
from msif_lib.influence import FixedEmbeddingInfluence
from msif_lib.links import Optimum
from msif_lib.solvers import Solver, SolverWarning
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.data.tasks import balanced
from msif_lib.study.experiments.experiment import Setting, Trained, train_two_stages
from msif_lib.study.experiments.forgetting import (
    Curvature,
    ShortFinetuning,
    curvature,
    descent_gain,
    finetune_in_steps,
    proximal_gain,
)
from msif_lib.study.experiments.ratios import ratio, shown
from msif_lib.study.models.networks import build_model
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.fingerprint import fingerprint

#: The ways to finetune and score.
WAYS = {
    "pull": "with the pull",
    "fitted": "from a fitted head",
    "plain": "without the pull",
    "formula": "the formula where plain finetuning stopped",
}
#: In place of a number of steps: trained until the gradient vanishes.
OPTIMUM = "optimum"


@dataclass(frozen=True)
class Design:
    """What is finetuned, on one pretraining a seed.

    Attributes
    ----------
    dataset, pretrain_classes, finetune_classes, pretrain_size, test_size
        As for :func:`msif_lib.study.data.datasets.two_stages`.
    grid_sizes, grid_steps
        Numbers of finetuning examples and of steps, rising.
    base_size, base_steps
        Those of model C, within the grid.
    factor
        How many times as many of both model D has; within the grid, too.
    learning_rate
        η of the steps, each over all examples.
    other_alphas
        At which the filter is tested.
    setting
        Networks and training; its α is the pull's.
    solver
        For all inverse Hessians.
    checkpoint
        A folder that keeps each training and each descent.
    """

    dataset: str
    pretrain_classes: Sequence[int] | None
    finetune_classes: Sequence[int] | None
    pretrain_size: int
    test_size: int | None
    grid_sizes: Sequence[int]
    grid_steps: Sequence[int]
    base_size: int
    base_steps: int
    factor: int
    learning_rate: float
    other_alphas: Sequence[float]
    setting: Setting
    solver: Solver
    checkpoint: str | Path

    @property
    def alphas(self) -> list[float]:
        """All α of the test of the filter, rising."""
        return sorted({self.setting.alpha, *self.other_alphas})

    @property
    def triples(self) -> dict[str, tuple[int, int]]:
        """What is multiplied from model C on: examples and steps, by name."""
        return {
            "both": (self.factor, self.factor),
            "examples": (self.factor, 1),
            "steps": (1, self.factor),
        }

    def draw(self, seed: int) -> TwoStageData:
        """The data of both stages, with as many finetuning examples as the largest set has."""
        return two_stages(
            self.dataset, self.pretrain_classes, self.finetune_classes, self.pretrain_size,
            self.grid_sizes[-1], self.test_size, seed=seed,
        )  # fmt: skip

    def part(self, data: TwoStageData, n: int) -> TwoStageData:
        """The same with n finetuning examples, balanced; smaller sets are parts of larger ones."""
        chosen = balanced(data.finetune[1], n)
        inputs, targets = data.finetune
        return dataclasses.replace(data, finetune=(inputs[chosen], targets[chosen]))

    def fresh_head(self, data: TwoStageData, seed: int) -> nn.Module:
        """A new, untrained head of finetuning."""
        return build_model(
            self.setting.architecture, self.setting.head, data.images.image_shape,
            len(data.pretrain_classes), len(data.finetune_classes), seed=seed,
            widths=self.setting.widths,
        )[2]  # fmt: skip

    def start(self, pretrain: Stage, head: nn.Module, data: TwoStageData) -> Stage:
        """The finetuning stage at (W̄, Θ_0), where the steps begin."""
        return Stage(
            copy.deepcopy(pretrain.embedding), copy.deepcopy(head), cross_entropy, data.finetune,
            l2=self.setting.l2_finetune,
        )  # fmt: skip


@dataclass
class Run:
    """All that one seed gave.

    Attributes
    ----------
    rows
        One a sensitivity: what it is of, and the mean absolute score ``size``.
    curvatures
        One a number of examples: what S and b are at the optimum of case 2.
    scores
        Of every row a column, ``(m, rows)``.
    converged
        Whether each training to an optimum reached its tolerance at a minimum.
    indefinite
        Whether the solve of each use of the formula met negative curvature.
    sharpest
        The largest curvature that the steps meet at each optimum.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    curvatures: list[dict[str, Any]] = field(default_factory=list)
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    converged: list[bool] = field(default_factory=list)
    indefinite: list[bool] = field(default_factory=list)
    sharpest: list[float] = field(default_factory=list)
    sensitivities: list[Tensor] = field(default_factory=list, repr=False)

    def note(self, sensitivity: Tensor, **what: Any) -> None:
        """Keep a sensitivity ``(p_W,)`` and what it is of; `score` gives its size."""
        self.sensitivities.append(sensitivity)
        self.rows.append(what)

    def score(self, pretrain: Stage, solver: Solver, seed: int) -> None:
        """Score all pretraining examples for every sensitivity noted."""
        columns = torch.stack(self.sensitivities, 1)
        if not columns.isfinite().all():
            raise FloatingPointError(
                "finetuning, or what the filter predicts of it, diverges; lower the learning rate"
            )
        cotangents = pretrain.parameters.put(columns, pretrain.shared)
        (scores,) = Chain([Optimum(pretrain, solver)], progress=False).pull_back(cotangents)
        sizes = scores.values.abs().mean(0).tolist()
        self.rows = [{"seed": seed, "size": size, **row} for size, row in zip(sizes, self.rows)]
        self.curvatures = [{"seed": seed, **row} for row in self.curvatures]
        self.scores = scores.values.numpy()

    def column(self, **what: Any) -> NDArray[np.float64]:
        """The scores ``(m,)`` of the first row that has these entries."""
        for position, row in enumerate(self.rows):
            if what.items() <= row.items():
                return self.scores[:, position]
        raise KeyError(what)


def run_seed(design: Design, seed: int) -> Run:
    """One pretraining, all that is finetuned on it, and what the filter predicts.

    Parameters
    ----------
    design
        What is finetuned.
    seed
        Of the draw and of the initial weights.

    Raises
    ------
    FloatingPointError
        A finetuning diverges, or the derivatives of its steps do.
    """
    run, data = Run(), design.draw(seed)
    fresh = design.fresh_head(data, seed)
    optima: dict[int, Curvature] = {}
    first: Trained | None = None
    for n in design.grid_sizes:
        some = design.part(data, n)
        start = None if first is None else dataclasses.replace(first, finetuned={})
        trained = train_two_stages(
            some, design.setting, seed, start=start, checkpoint=design.checkpoint
        )
        first = first or trained
        run.converged += [report.converged for report in trained.reports.values()]
        optima[n] = curvature(trained.finetuned["updated"], trained.test, design.solver)
        run.sharpest.append(_largest_curvature(trained.finetuned["updated"], trained.alpha))
        _note_finetunings(run, design, trained, some, fresh, optima[n], n)
        if n == design.base_size:
            base = trained
            _note_filtered(run, design, optima[n])
            _note_other_alphas(run, design, trained, some, optima[n], seed)
    for small, large in itertools.pairwise(design.grid_sizes):
        for s, b in ((small, large), (large, small)):
            gain = proximal_gain(optima[s].eigenvalues, design.setting.alpha)
            run.note(
                optima[s].filtered(gain, optima[b].gradient), kind="swapped", small=small,
                large=large, changed="b" if s == small else "S",
            )  # fmt: skip
    run.curvatures = [
        {"n": n, "mean": float(bent.eigenvalues.mean()),
         "negative": int((bent.eigenvalues < 0).sum()), "p_w": len(bent.eigenvalues),
         "steep": float((bent.eigenvalues > 2 * design.setting.alpha).double().mean()),
         "gradient": float(bent.gradient.norm())}
        for n, bent in optima.items()
    ]  # fmt: skip
    run.score(base.pretrain, design.solver, seed)
    return run


def _note_finetunings(
    run: Run, design: Design, trained: Trained, data: TwoStageData, fresh: nn.Module,
    bent: Curvature, n: int,
) -> None:  # fmt: skip
    """Both optima of n examples, and every way to stop before."""
    alpha = trained.alpha
    fixed = trained.finetuned["fixed"]
    run.note(_sensitivity(trained.influence("fixed", design.solver), trained.test),
             kind="case 1", n=n)  # fmt: skip
    run.note(
        bent.filtered(proximal_gain(bent.eigenvalues, alpha)), kind="grid", way="pull", n=n,
        k=OPTIMUM, accuracy=trained.accuracy("updated"), loss=trained.test_loss("updated"),
    )  # fmt: skip
    tests = len(trained.test[1])
    for way, head, pull in (
        ("pull", fresh, alpha), ("fitted", fixed.head, alpha), ("plain", fresh, 0.0)
    ):  # fmt: skip
        start = design.start(trained.pretrain, head, data)
        for k, stop in stops(design, start, trained.test, pull).items():
            what = {"n": n, "k": k, "accuracy": stop.accuracy, "loss": stop.test_loss / tests}
            run.note(stop.sensitivity, kind="grid", way=way, **what)
            if way == "plain" and n in (design.base_size, design.factor * design.base_size):
                start.load_vector(stop.vector)
                influence = UpdatedEmbeddingInfluence(
                    trained.pretrain, start, alpha, design.solver, stationarity_tol=np.inf,
                    progress=False,
                )  # fmt: skip
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", SolverWarning)
                    there = _sensitivity(influence, trained.test)
                run.indefinite.append(len(caught) > 0)
                run.note(there, kind="grid", way="formula", **what)


def _note_filtered(run: Run, design: Design, bent: Curvature) -> None:
    """What the filter, counted once and twice, predicts from one optimum alone."""
    alpha = design.setting.alpha
    # Flat and negatively curved directions keep what they have at the optimum.
    sigma = bent.eigenvalues.clamp(min=0)
    own, there = (proximal_gain(s, alpha) for s in (sigma, bent.eigenvalues))
    for k in design.grid_steps:
        left = descent_gain(sigma, k, design.learning_rate, alpha) / own
        for times in (1, 2):
            run.note(bent.filtered(there * left**times), kind="steps", times=times, k=k)


def _note_other_alphas(
    run: Run, design: Design, trained: Trained, data: TwoStageData, bent: Curvature, seed: int
) -> None:
    """The optima at other α: predicted by the filter, and measured by finetuning again."""
    sigma = bent.eigenvalues.clamp(min=0)
    own, there = (proximal_gain(s, trained.alpha) for s in (sigma, bent.eigenvalues))
    for alpha in design.alphas:
        left = proximal_gain(sigma, alpha) / own
        for times in (1, 2):
            run.note(bent.filtered(there * left**times), kind="alpha", times=times, alpha=alpha)
        again = train_two_stages(
            data, dataclasses.replace(design.setting, alpha=alpha), seed,
            start=dataclasses.replace(trained, finetuned={"fixed": trained.finetuned["fixed"]}),
            checkpoint=design.checkpoint,
        )  # fmt: skip
        run.converged.append(again.reports["updated"].converged)
        found = _sensitivity(again.influence("updated", design.solver), trained.test)
        run.note(found, kind="alpha measured", alpha=alpha)


def stops(
    design: Design, start: Stage, test: tuple[Tensor, Tensor], pull: float
) -> dict[int, ShortFinetuning]:
    """One descent's stops at every number of steps of the grid, from the checkpoint if there.

    Parameters
    ----------
    design
        Steps and learning rate.
    start
        The finetuning stage at (W̄, Θ_0).
    test
        Test examples of its task.
    pull
        α; 0 for plain finetuning.

    Raises
    ------
    FloatingPointError
        As :func:`msif_lib.study.experiments.forgetting.finetune_in_steps`.
    """
    steps, kept = list(design.grid_steps), Checkpoint(design.checkpoint)
    name = "descent-" + fingerprint(
        start.vector(), start.examples.tensors(), start.l2, test, steps, design.learning_rate, pull
    )
    found = kept.get(name)
    if found is None:
        run = finetune_in_steps(start, test, steps, design.learning_rate, pull)
        found = {
            part: torch.stack(
                [torch.as_tensor(getattr(run[k], part), dtype=torch.float64) for k in steps]
            )
            for part in ("vector", "test_loss", "accuracy", "sensitivity")
        }
        kept.put(name, found)
    return {
        k: ShortFinetuning(
            found["vector"][row], float(found["test_loss"][row]), float(found["accuracy"][row]),
            found["sensitivity"][row],
        )
        for row, k in enumerate(steps)
    }  # fmt: skip


def _sensitivity(
    influence: FixedEmbeddingInfluence | UpdatedEmbeddingInfluence, test: tuple[Tensor, Tensor]
) -> Tensor:
    """The library's dq/dW̄ ``(p_W,)``."""
    return influence.sensitivity(influence.test_gradients(test))[:, 0]


def _largest_curvature(stage: Stage, alpha: float) -> float:
    """The largest eigenvalue of what is descended, at a stage's parameters."""
    bent = proximal_hessian(stage, alpha)
    start = np.random.default_rng(0).standard_normal(bent.shape[0])
    return float(
        scipy.sparse.linalg.eigsh(
            bent.to_scipy(), k=1, which="LA", tol=1e-2, v0=start, return_eigenvectors=False
        )[0]
    )


@dataclass(frozen=True)
class Results:
    """The rows of all seeds, and what they say.

    Attributes
    ----------
    design
        What was finetuned.
    runs
        By seed, in the order in which numbers come out.
    """

    design: Design
    runs: Mapping[int, Run]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows of every seed."""
        return pd.DataFrame([row for run in self.runs.values() for row in run.rows])

    def logs(self, **what: Hashable) -> NDArray[np.float64]:
        """By seed, the logarithm of mean |I| of the rows with these entries."""
        some = self.table
        for name, value in what.items():
            some = some[some[name] == value]
        return np.log(some.set_index("seed")["size"].loc[list(self.runs)].to_numpy(dtype=float))

    def cell(self, way: str, n: int, k: int | str) -> NDArray[np.float64]:
        """The logarithms of one cell of the grid, one a seed."""
        return self.logs(kind="grid", way=way, n=n, k=k)

    def changes(self, way: str, n: int, k: int) -> dict[str, NDArray[np.float64]]:
        """Logarithms of ratios over a cell, by what is multiplied."""
        base = self.cell(way, n, k)
        return {
            what: self.cell(way, n * more_n, k * more_k) - base
            for what, (more_n, more_k) in self.design.triples.items()
        }

    def summary(self, way: str) -> dict[str, Any]:
        """Mean |I| of models C and D, and what multiplies it: what a record keeps of a way."""
        n, k, factor = self.design.base_size, self.design.base_steps, self.design.factor
        return {
            "C": float(np.exp(self.cell(way, n, k).mean())),
            "D": float(np.exp(self.cell(way, factor * n, factor * k).mean())),
            **{what: ratio(values) for what, values in self.changes(way, n, k).items()},
        }

    def swaps(self, small: int, large: int) -> dict[str, Estimate]:
        """The change of mean |I| at the optimum from some examples to more, taken apart."""
        base = self.cell("pull", small, OPTIMUM)
        changed = {"small": small, "large": large, "kind": "swapped"}
        case1 = self.logs(kind="case 1", n=large) - self.logs(kind="case 1", n=small)
        return {
            "both (measured)": ratio(self.cell("pull", large, OPTIMUM) - base),
            "only S": ratio(self.logs(changed="S", **changed) - base),
            "only b": ratio(self.logs(changed="b", **changed) - base),
            "case 1 (no filter)": ratio(case1),
        }

    def filter_test(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Logarithms of mean |I|, ``(points, seeds)``: measured, and as the filter predicts.

        By what is changed, ``"another α"``, ``"fewer steps, fitted head"`` and ``"fewer steps, new
        head"``; each with ``"measured"``, ``"filter once"`` and ``"filter twice"``.
        """
        design = self.design

        def at(kind: str, name: str, values: Sequence[float], **more: Hashable) -> Any:
            return np.array([self.logs(kind=kind, **{name: value}, **more) for value in values])

        found = {
            "another α": {
                "measured": at("alpha measured", "alpha", design.alphas),
                "filter once": at("alpha", "alpha", design.alphas, times=1),
                "filter twice": at("alpha", "alpha", design.alphas, times=2),
            }
        }
        for way, head in (("fitted", "fitted head"), ("pull", "new head")):
            found[f"fewer steps, {head}"] = {
                "measured": np.array(
                    [self.cell(way, design.base_size, k) for k in design.grid_steps]
                ),
                "filter once": at("steps", "k", design.grid_steps, times=1),
                "filter twice": at("steps", "k", design.grid_steps, times=2),
            }
        return found

    def factors_off(self) -> dict[str, dict[str, float]]:
        """By what factor predictions are off, typically: root mean square of logarithms.

        ``"no change"`` predicts the size at the optimum. The α of the optimum itself does not
        count.
        """
        others = [row for row, alpha in enumerate(self.design.alphas)
                  if alpha != self.design.setting.alpha]  # fmt: skip
        at_optimum = self.cell("pull", self.design.base_size, OPTIMUM)
        found = {}
        for name, lines in self.filter_test().items():
            rows = others if name == "another α" else list(range(len(self.design.grid_steps)))
            true = lines["measured"][rows]
            guesses = {"no change": at_optimum} | {
                guess: values[rows] for guess, values in lines.items() if guess != "measured"
            }
            found[name] = {
                guess: float(np.exp(np.sqrt(np.mean((values - true) ** 2))))
                for guess, values in guesses.items()
            }
        return found


def beside_row(
    data: str, way: str, found: Mapping[str, Any], seeds: int, what: Mapping[str, str]
) -> dict[str, Any]:
    """A row of the comparison with the paper and other records.

    Parameters
    ----------
    data
        What the data are called.
    way
        One of `WAYS`.
    found
        As of `Results.summary`, or as a record keeps it.
    seeds
        How many.
    what
        Columns: what each of what is multiplied is called.
    """
    ratios = {
        name: value if isinstance(value, Estimate) else Estimate(**value)
        for name, value in found.items() if name in what
    }  # fmt: skip
    return {
        "data": data, "scores": WAYS[way], "C": f"{found['C']:.3g}", "D": f"{found['D']:.3g}",
        **{what[name]: shown(value) for name, value in ratios.items()}, "seeds": seeds,
    }  # fmt: skip
