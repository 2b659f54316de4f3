"""Does the influence function say what retraining shows? The question of section 4.1.

Examples are left out one by one, both stages are trained again, and the true change of the test
loss is held against the predicted one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from msif_lib.evaluation import Agreement, Estimate, compare, mean_estimate
from msif_lib.influence import Chain
from msif_lib.retraining import Retraining, RetrainingSettings, retrain_without
from msif_lib.scores import Scores
from msif_lib.solvers import ConjugateGradient, Dense, Identity, MinRes, Solver, SolverWarning
from msif_lib.study.experiments.comparison import CLAIMS
from msif_lib.study.experiments.experiment import LABELS, Case, Trained
from msif_lib.study.records import read_record

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]
Method = Literal["influence", "identity"]

METHODS: tuple[Method, ...] = ("influence", "identity")
#: What the cases are called in a table's cell.
SHORT: dict[Case, str] = {case: label.split(",")[0] for case, label in LABELS.items()}


def make_solver(
    name: str, tol: float = 1e-8, max_iterations: int | None = None, damping: float = 0.0
) -> Solver:
    """Make the solver that a notebook's parameters name.

    Parameters
    ----------
    name
        ``"minres"``, ``"cg"`` or ``"dense"``, which needs the damping alone.
    tol, max_iterations, damping
        As for :class:`msif_lib.solvers.MinRes`.

    Raises
    ------
    KeyError
        There is no solver of that name.
    """
    return {
        "minres": MinRes(tol, max_iterations, damping=damping),
        "cg": ConjugateGradient(tol, max_iterations, damping=damping),
        "dense": Dense(damping=damping),
    }[name]


@dataclass(frozen=True)
class Truth:
    """How examples are left out, and what is predicted for that.

    Attributes
    ----------
    tol
        Gradient norm at which every training ends again.
    renormalise
        Whether the other examples' weights are raised so that they sum to one.
    checkpoint
        A folder that keeps the retrainings; None: none does.
    """

    tol: float
    renormalise: bool = False
    checkpoint: str | Path | None = None

    def without(
        self, chain: Chain, indices: Indices, test: Any, fraction: float = 1.0
    ) -> Retraining:
        """Train all stages again without each of the examples, or with less of its weight."""
        return retrain_without(
            chain, [[int(i)] for i in indices], test, renormalise=self.renormalise,
            fraction=fraction, settings=RetrainingSettings(tol=self.tol),
            checkpoint=self.checkpoint, progress=False,
        )  # fmt: skip

    def change(self, chain: Chain, indices: Indices, test: Any, fraction: float = 1.0) -> Vector:
        """True change of the test loss, by the share of the weight that was taken away ``(R,)``."""
        after = self.without(chain, indices, test, fraction)
        return np.asarray(after.change.cpu().numpy() / fraction)

    def predicted(self, scores: Scores) -> Vector:
        """Change of the test loss that is predicted for the removal of each example ``(m,)``."""
        effect = scores.removal_effect_renormalised if self.renormalise else scores.removal_effect
        return np.asarray(effect.double().cpu().numpy())


@dataclass(frozen=True)
class Reached:
    """Where a training ended.

    Attributes
    ----------
    stage, seed
        Which.
    gradient_norm, lowest_eigenvalue, converged
        As its report has them.
    accuracy
        Share of right answers: of pretraining on its training set, else on test examples.
    """

    stage: str
    seed: int
    gradient_norm: float
    lowest_eigenvalue: float | None
    converged: bool
    accuracy: float

    def shown(self) -> dict[str, Any]:
        """A row of a table."""
        lowest = self.lowest_eigenvalue
        return {
            "stage": self.stage, "seed": self.seed, "gradient norm": f"{self.gradient_norm:.0e}",
            "lowest eigenvalue": "" if lowest is None else f"{lowest:.1e}",
            "accuracy": f"{self.accuracy:.3f}",
        }  # fmt: skip


def reached(trained: Trained, seed: int) -> list[Reached]:
    """Say where the trainings of one seed ended: pretraining, then each case."""
    stage = trained.pretrain
    assert isinstance(stage.data, tuple)  # it is made of tensors, see `train_two_stages`
    inputs, targets = stage.data
    with torch.no_grad():
        outputs = stage.outputs(stage.embedding_vector(), stage.head_vector(), inputs)
    right = float((outputs.argmax(1) == targets).double().mean())
    names = {"pretraining": ("pretraining", right)}
    names |= {case: (LABELS[case], trained.accuracy(case)) for case in trained.finetuned}
    return [
        Reached(
            label, seed, report.gradient_norm, report.lowest_eigenvalue, report.converged, accuracy
        )
        for name, (label, accuracy) in names.items()
        for report in [trained.reports[name]]
    ]


def reached_in_words(rows: Iterable[Reached]) -> str:
    """Whether every training ended at a minimum, and which did not."""
    missed = [f"{row.stage}, seed {row.seed}" for row in rows if not row.converged]
    if not missed:
        return "Every stage reached its tolerance at a minimum."
    return (
        f"**Not every stage reached its tolerance at a minimum** ({'; '.join(missed)}): read what "
        "follows with that in mind."
    )


def largest(effect: Vector, removals: int) -> Indices:
    """Positions of the examples of largest |I|, the largest first ``(removals,)``."""
    return np.argsort(-np.abs(effect), kind="stable")[:removals]


def chosen(
    effect: Vector, removals: int, selection: Iterable[str], seed: int
) -> dict[str, Indices]:
    """Choose the examples to remove.

    Parameters
    ----------
    effect
        Predicted changes ``(m,)``.
    removals
        How many examples.
    selection
        ``"top"``: those of largest |I|; ``"random"``: drawn with the seed.
    seed
        Of the draw.

    Returns
    -------
    dict
        Positions ``(removals,)`` by the way of choosing.
    """
    at_random = np.random.default_rng(seed).permutation(len(effect))[:removals]
    ways = {"top": largest(effect, removals), "random": at_random}
    return {name: ways[name] for name in selection}


@dataclass(frozen=True)
class Run:
    """One seed, one case, one way of choosing the examples that are removed.

    Attributes
    ----------
    seed, case, selection
        Which.
    indices
        Of the removed examples ``(R,)``.
    effect, baseline
        Predicted changes of the test loss, the second with the identity for the inverse Hessians
        ``(R,)``.
    change
        The true changes ``(R,)``.
    converged
        Share of the retrainings that reached their tolerance, of all in this case.
    evaluations
        Gradients that a retraining took, both stages together; the mean.
    """

    seed: int
    case: Case
    selection: str
    indices: Indices
    effect: Vector
    baseline: Vector
    change: Vector
    converged: float
    evaluations: float

    @cached_property
    def agreements(self) -> dict[Method, Agreement]:
        """Predictions against truth, by method."""
        return {
            "influence": compare(self.effect, self.change),
            "identity": compare(self.baseline, self.change),
        }

    def rows(self) -> list[dict[str, Any]]:
        """What a record keeps: one row a method."""
        where = {"seed": self.seed, "case": self.case, "selection": self.selection}
        return [
            {**where, "method": method, "agreement": found, "converged": self.converged}
            for method, found in self.agreements.items()
        ]


def measure(
    trained: Trained,
    seed: int,
    cases: Sequence[Case],
    solver: Solver,
    removals: int,
    selection: Sequence[str],
    truth: Truth,
) -> list[Run]:
    """Score every pretraining example, remove some of them, and see what happens.

    Parameters
    ----------
    trained
        The stages of one seed.
    seed
        Of the examples drawn at random.
    cases, selection
        What is looked at.
    solver
        For the inverse Hessians.
    removals
        Examples removed for each way of choosing them.
    truth
        How.

    Returns
    -------
    list of Run
        By case, then by selection.
    """
    found = []
    for case in cases:
        chain = trained.influence(case, solver)
        effect = truth.predicted(chain.scores(trained.test))
        baseline = truth.predicted(trained.influence(case, Identity()).scores(trained.test))
        picked = chosen(effect, removals, selection, seed)
        # One call for all, so that the Hessians are factorised once.
        after = truth.without(chain, np.concatenate([*picked.values()]), trained.test)
        change, converged = after.change.cpu().numpy(), after.converged.cpu().numpy()
        evaluations = after.evaluations.double().sum(1).cpu().numpy()
        for number, (name, indices) in enumerate(picked.items()):
            here = slice(number * removals, (number + 1) * removals)
            found.append(
                Run(
                    seed, case, name, indices, effect[indices], baseline[indices], change[here],
                    float(converged[here].mean()), float(evaluations[here].mean()),
                )
            )  # fmt: skip
    return found


def of_seeds(
    runs: Iterable[Run],
    case: Case,
    selection: str,
    method: Method = "influence",
    statistic: str = "pearson",
) -> list[Estimate]:
    """One estimate a seed of an agreement: ``"pearson"``, ``"spearman"`` or ``"slope"``."""
    return [
        getattr(run.agreements[method], statistic)
        for run in runs
        if (run.case, run.selection) == (case, selection)
    ]


def median_range(estimates: Iterable[Estimate], digits: int = 3) -> str:
    """Median over seeds, lowest and highest in brackets; one alone without them."""
    values = np.array([estimate.value for estimate in estimates])
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def over_seeds(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """A correlation's mean over seeds on Fisher's scale with Student's 95 % interval.

    Parameters
    ----------
    estimates
        One a seed; that of a single seed keeps its own interval.

    Returns
    -------
    dict
        ``value``, ``low``, ``high`` and ``seeds``, as records keep claims.
    """
    if len(estimates) == 1:
        (one,) = estimates
    else:
        mean = mean_estimate(np.arctanh([estimate.value for estimate in estimates]))
        one = Estimate(*np.tanh([mean.value, mean.low, mean.high]).tolist())
    return {"value": one.value, "low": one.low, "high": one.high, "seeds": len(estimates)}


def claims(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What the runs claim beside the paper, by the names of the comparison."""
    pairs = dict.fromkeys((run.case, run.selection) for run in runs)
    found = {f"r_{case}_{name}": over_seeds(of_seeds(runs, case, name)) for case, name in pairs}
    if ("fixed", "top") in pairs:
        found["r_identity_top"] = over_seeds(of_seeds(runs, "fixed", "top", "identity"))
    return found


def summary(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Rows of a table: medians over the seeds, one row a case, selection and method."""
    rows = []
    for case, name in dict.fromkeys((run.case, run.selection) for run in runs):
        for method in METHODS:
            r, rank, slope = (
                of_seeds(runs, case, name, method, statistic)
                for statistic in ("pearson", "spearman", "slope")
            )
            rows.append(
                {
                    "case": SHORT[case], "removed": name, "method": method,
                    "Pearson r": median_range(r), "Spearman": median_range(rank),
                    # The identity's scores have no scale of their own.
                    "slope": median_range(slope) if method == "influence" else "",
                }
            )  # fmt: skip
    return rows


def answer(runs: Sequence[Run]) -> str:
    """The page's answer, a sentence a case, for the first way of choosing."""
    seeds, name = len({run.seed for run in runs}), runs[0].selection
    removed = f"the {len(runs[0].indices)} examples "
    removed += "of largest |I|" if name == "top" else "drawn at random"
    sentences = [
        f"In {LABELS[case]}, predicted and true change correlate at "
        f"**r = {median_range(of_seeds(runs, case, name))}** for {removed}, and with the identity "
        "in place of the inverse Hessians at "
        f"{median_range(of_seeds(runs, case, name, 'identity'))}; the paper has "
        f"{_paper(f'r_{case}_top'):.2f} on CIFAR-10, from one model."
        for case in dict.fromkeys(run.case for run in runs)
    ]
    over = f"the median over {seeds} seeds, with the lowest and the highest"
    return " ".join([*sentences, f"Each number is {over if seeds > 1 else 'of one seed'}."])


def _paper(name: str) -> float:
    """The paper's number."""
    return next(claim.paper for claim in CLAIMS if claim.name == name and claim.paper is not None)


def below(runs: Iterable[Run], target: float) -> str:
    """How many correlations of the influence function reach a target, and which do not."""
    reached = sorted(
        (f"{SHORT[run.case]}, {run.selection}", run.agreements["influence"].pearson.value)
        for run in runs
    )
    short = [f"{label}, r = {value:.2f}" for label, value in reached if value < target]
    return (
        f"Of {len(reached)} correlations of the influence function {len(reached) - len(short)} "
        f"are at least {target}." + (f" Below it: {'; '.join(short)}." if short else "")
    )


def paper_solver(
    trained: Trained,
    runs: Sequence[Run],
    solver: Solver,
    dampings: Sequence[float],
    iterations: int,
    tol: float,
    truth: Truth,
) -> list[dict[str, Any]]:
    """Solve by the paper's own recipe, conjugate gradients on H² + λI, and compare the scores.

    Parameters
    ----------
    trained, runs
        The stages of one seed, and what was measured on them.
    solver
        That of the runs, the last row of each case.
    dampings
        λ of the paper's eq. 16.
    iterations, tol
        Where the recipe stops.
    truth
        As for the runs.

    Returns
    -------
    list of dict
        ``case``, ``λ`` (None: the solver on H itself), ``residual`` of the system solved,
        ``products with H``, ``error`` relative to the solver's scores, and ``r`` with retraining.
    """
    rows = []
    for case in dict.fromkeys(run.case for run in runs):
        run = next(run for run in runs if run.case == case)
        reference = trained.influence(case, solver).scores(trained.test)
        for damping in (*dampings, None):
            scores = reference
            if damping is not None:
                recipe = ConjugateGradient(tol, iterations, damping=damping, squared=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SolverWarning)  # the residual is told
                    scores = trained.influence(case, recipe).scores(trained.test)
            off = (scores.values - reference.values).norm() / reference.values.norm()
            rows.append(
                {
                    "case": SHORT[case], "λ": damping,
                    "residual": max(report.residual for report in scores.solves),
                    "products with H": sum(report.products for report in scores.solves),
                    "error": float(off),
                    "r": compare(truth.predicted(scores)[run.indices], run.change).pearson,
                }
            )  # fmt: skip
    return rows


def beside_the_paper(runs: Sequence[Run], dataset: str, results: Path) -> list[dict[str, str]]:
    """Rows of a table: the paper's correlations, this run's, and those recorded on other data.

    Parameters
    ----------
    runs, dataset
        What was measured here.
    results
        The folder of the records.
    """
    paper = [f"{_paper(f'r_{name}_top'):.2f}" for name in ("fixed", "updated", "identity")]
    rows = [
        _row("CIFAR-10 (paper)", "fixed", "top", paper[0], "", 1),
        _row("CIFAR-10 (paper)", "updated", "top", paper[1], "", 1),
        _row("MNIST (paper)", "fixed", "top", "", paper[2], 1),
    ]
    rows += _medians(dataset, [row for run in runs for row in run.rows()])
    for path in sorted(results.glob("*.json")):
        values = read_record(path)["values"]
        rows += _medians(f"{path.stem} (recorded)", values.get("agreements", []))
    return rows


def _row(data: str, case: Case, name: str, r: str, identity: str, seeds: int) -> dict[str, str]:
    return {
        "data": data, "case": SHORT[case], "removed": name, "r, influence": r,
        "r, identity": identity, "seeds": str(seeds),
    }  # fmt: skip


def _medians(data: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a case and selection, of the rows of a record."""
    found = []
    for case, name in dict.fromkeys((row["case"], row["selection"]) for row in rows):
        r, identity = (
            [
                _pearson(row["agreement"])
                for row in rows
                if (row["case"], row["selection"], row["method"]) == (case, name, method)
            ]
            for method in METHODS
        )
        shown = median_range(r), median_range(identity)
        found.append(_row(data, case, name, *shown, len(r)))
    return found


def _pearson(agreement: Agreement | Mapping[str, Any]) -> Estimate:
    """r of an agreement, measured now or read from a record."""
    return (
        agreement.pearson if isinstance(agreement, Agreement) else Estimate(**agreement["pearson"])
    )
