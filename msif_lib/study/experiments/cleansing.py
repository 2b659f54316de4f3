"""Cleansing a pretraining set: what is removed, and what the finetuned model then gets right.

Section 4.2: the examples of largest influence are taken out of the pretraining set, both stages are
trained again, and the finetuned model is tested. Then a part of the labels is made wrong on
purpose, so that the truth is known, and every score searches for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from msif_lib import SingleStageInfluence
from msif_lib.evaluation import Estimate, Paired, mean_estimate, paired, spearman
from msif_lib.retraining import RetrainingSettings, retrain_without
from msif_lib.solvers import Solver
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.experiments.experiment import Case, Setting, Trained, train_two_stages

#: The orders in which examples are removed.
ORDERS = {"harmful": "harmful first", "helpful": "helpful first", "random": "random"}
#: All that a change can come from, by its name in the rows.
NAMES = ORDERS | {"paper": "as in the paper", "restart": "other weights, none removed"}
#: The scores that search for wrong labels.
METHODS = {
    "multi": "multi-stage influence",
    "size": "multi-stage, size",
    "single": "single-stage influence",
    "self": "self-influence",
    "gradient": "gradient norm",
    "loss": "pretraining loss",
    "random": "random",
}
#: Shares of right labels flagged, at which ROC curves are averaged.
GRID = np.linspace(0, 1, 101)
#: Accuracies of the paper, in per cent: with nothing removed, 10 % harmful, 10 % at random.
PAPER = {"nothing": 58.15, "harmful": 58.36, "random": 58.08}


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


@dataclass(frozen=True)
class Design:
    """What is trained, removed and searched for.

    Attributes
    ----------
    dataset, pretrain_classes, finetune_classes, pretrain_size, finetune_size, test_size
        As for :func:`msif_lib.study.data.datasets.two_stages`.
    validation_size
        Images for the choice; None: all that no stage has seen.
    setting
        Networks and training.
    cases
        Of the finetunings.
    shares
        Of the pretraining set that are removed.
    reported_share
        That at which the paper's way is taken, too.
    noise
        Share of the labels that are made wrong.
    size_images
        Validation images over which the size of influence is taken.
    solver
        For all inverse Hessians.
    models_at_once
        Models that are retrained together.
    checkpoint
        A folder that keeps every training; None: none.
    """

    dataset: str
    pretrain_classes: Sequence[int] | None
    finetune_classes: Sequence[int] | None
    pretrain_size: int | None
    finetune_size: int | None
    test_size: int | None
    validation_size: int | None
    setting: Setting
    cases: Sequence[Case]
    shares: Sequence[float]
    reported_share: float
    noise: float
    size_images: int
    solver: Solver
    models_at_once: int = 32
    checkpoint: str | None = None

    def draw(self, seed: int) -> tuple[TwoStageData, tuple[Tensor, Tensor]]:
        """The data of a seed, and its validation images."""
        data = two_stages(
            self.dataset, self.pretrain_classes, self.finetune_classes, self.pretrain_size,
            self.finetune_size, self.test_size, seed=seed,
        )  # fmt: skip
        inputs, labels = unseen_images(data, data.finetune_classes, self.validation_size, seed)
        return data, (inputs.to(self.setting.device), labels.to(self.setting.device))

    def train(self, data: TwoStageData, seed: int) -> Trained:
        """Both stages, trained to a stationary point."""
        return train_two_stages(data, self.setting, seed, self.cases, checkpoint=self.checkpoint)


def descending(values: ArrayLike) -> NDArray[np.int64]:
    """Positions from the largest value to the smallest ``(m,)``, equal ones in their order."""
    return np.argsort(-np.asarray(values), kind="stable")


def first_share(ranking: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The first positions of a ranking, a share of it."""
    return ranking[: round(share * len(ranking))]


def removal_plans(
    on_validation: NDArray[np.float64],
    on_test: NDArray[np.float64],
    shares: Sequence[float],
    reported_share: float,
    seed: int,
) -> dict[tuple[str, float], NDArray[np.int64]]:
    """What is removed, by order and share.

    Parameters
    ----------
    on_validation, on_test
        Scores of the pretraining examples on either set, ``(m,)``; the latter for the paper's way.
    shares, reported_share
        Of the pretraining set; the paper's way takes the latter alone.
    seed
        Of the random order.
    """
    rankings = {
        "harmful": descending(on_validation),
        "helpful": descending(-on_validation),
        "random": np.random.default_rng([seed, 1]).permutation(len(on_test)),
    }
    plans = {
        (order, share): first_share(ranking, share)
        for order, ranking in rankings.items()
        for share in shares
    }
    plans["paper", reported_share] = first_share(descending(on_test), reported_share)
    return plans


def measured(
    design: Design, trained: Trained, case: Case, plans: Mapping[Any, NDArray[np.int64]]
) -> tuple[dict[str, float], dict[Any, dict[str, float]], float]:
    """Retrain without what each plan removes, and test.

    Parameters
    ----------
    design
        How it is retrained.
    trained, case
        The stages and the finetuning.
    plans
        By name, positions in the pretraining data.

    Returns
    -------
    tuple
        Accuracy in per cent and mean test loss with nothing removed; by plan, these and their
        changes; the share of retrainings that converged.
    """
    after = outcomes_without(
        trained, case, [list(map(int, some)) for some in plans.values()],
        design.setting.gradient_tol, design.models_at_once, design.checkpoint,
    )  # fmt: skip
    before = after.correct_before
    unchanged = {
        "accuracy": 100 * float(before.double().mean()),
        "loss": float(after.losses_before.mean()),
    }
    rows = {}
    for plan, correct, losses in zip(plans, after.correct, after.losses):
        accuracy, loss = 100 * float(correct.double().mean()), float(losses.mean())
        rows[plan] = {
            "accuracy": accuracy,
            "loss": loss,
            "gain": accuracy - unchanged["accuracy"],
            "loss_change": loss - unchanged["loss"],
            "mended": int((correct & ~before).sum()),
            "spoilt": int((before & ~correct).sum()),
        }
    return unchanged, rows, float(after.converged.double().mean())


def cleanse(
    design: Design, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
    """All removals of a seed.

    Parameters
    ----------
    design
        What is trained and removed.
    seed
        Of the draw, the weights and the random order.

    Returns
    -------
    tuple
        Rows by case, order and share; one row a case of the models with nothing removed; sizes.
    """
    data, validation = design.draw(seed)
    trained, again = design.train(data, seed), design.train(data, seed + 10_000)
    rows, bases = [], []
    for case in design.cases:
        influence = trained.influence(case, design.solver)
        on_validation, on_test = influence.scores(validation), influence.scores(trained.test)
        plans = removal_plans(
            on_validation.values.cpu().numpy(), on_test.values.cpu().numpy(), design.shares,
            design.reported_share, seed,
        )  # fmt: skip
        unchanged, by_plan, converged = measured(design, trained, case, plans)
        for (order, share), row in by_plan.items():
            chosen = torch.as_tensor(plans[order, share])
            predicted = float(on_test.group_effect(chosen, renormalise=True))
            rows.append(
                {"seed": seed, "case": case, "order": order, "share": share, **row,
                 "predicted": predicted / len(trained.test[1])}
            )  # fmt: skip
        bases.append(
            {
                "seed": seed, "case": case, **unchanged, "converged": converged,
                "trained": all(report.converged for report in trained.reports.values()),
                "restart_gain": 100 * again.accuracy(case) - unchanged["accuracy"],
                "restart_loss_change": again.test_loss(case) - unchanged["loss"],
                "score_agreement": spearman(
                    on_validation.values.cpu(), on_test.values.cpu(), resamples=10
                ).value,
            }
        )  # fmt: skip
    sizes = {
        "m": trained.pretrain.size, "n": len(data.finetune[1]), "t": len(data.test[1]),
        "v": len(validation[1]), "p": len(trained.pretrain.vector()),
    }  # fmt: skip
    return rows, bases, sizes


def pretraining_scores(
    design: Design, trained: Trained, data: TwoStageData, seed: int
) -> dict[str, Tensor]:
    """The scores ``(m,)`` of all pretraining examples that know of no finetuning, by method.

    Parameters
    ----------
    design
        How it is solved, and on which device.
    trained, data
        The stages, and the data that they are of.
    seed
        Of the random order.
    """
    stage, images = trained.pretrain, data.images
    original, device = images.test_targets, design.setting.device
    # Test images of the pretraining classes, which no stage has seen.
    chosen = torch.isin(original, torch.tensor(data.pretrain_classes))
    labels = torch.tensor([data.pretrain_classes.index(int(c)) for c in original[chosen]])
    inputs = images.normalise(images.test_pixels[chosen], data.pretrain[0].dtype)
    single = SingleStageInfluence(stage, design.solver, progress=False)
    return {
        "single": single.scores((inputs.to(device), labels.to(device))).values,
        "self": -single.self_influence(at_once=stage.size).values,
        "gradient": torch.cat([rows.norm(dim=1) for rows in stage.per_example_gradients()]),
        "loss": stage.example_losses(),
        "random": torch.from_numpy(np.random.default_rng([seed, 2]).random(stage.size)),
    }


def multi_stage_scores(
    design: Design, trained: Trained, case: Case, validation: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The scores ``(m,)`` by what the examples do to the finetuned model, by method."""
    influence = trained.influence(case, design.solver)
    inputs, labels = (leaf[: design.size_images] for leaf in validation)
    each = influence.scores((inputs, labels), per_test=True).values
    return {
        "multi": influence.scores(validation).values,
        "size": each.square().mean(1).sqrt(),
    }


def plant(
    design: Design, seed: int, clean: Mapping[Case, Mapping[str, float]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Wrong labels, every score's search for them, and what removing the flagged brings.

    Parameters
    ----------
    design
        What is trained and removed.
    seed
        Of the draw, the weights and the noise.
    clean
        By case, ``accuracy`` and ``loss`` of the model of right labels.

    Returns
    -------
    tuple
        Rows by case and method, with ``"roc"`` at `GRID`; one row a case of the models trained
        with the wrong labels.
    """
    data, validation = design.draw(seed)
    inputs, labels = data.pretrain
    noisy, planted = flip_labels(labels, len(data.pretrain_classes), design.noise, seed + 20_000)
    trained = design.train(replace(data, pretrain=(inputs, noisy)), seed)
    wrong = planted.numpy()
    flagged = int(wrong.sum())
    alone = pretraining_scores(design, trained, data, seed)
    rows, bases = [], []
    for case in design.cases:
        found = alone | multi_stage_scores(design, trained, case, validation)
        scores = {name: values.cpu().numpy() for name, values in found.items()}
        plans = {name: descending(values)[:flagged] for name, values in scores.items()}
        plans["planted"] = np.flatnonzero(wrong)
        unchanged, by_plan, converged = measured(design, trained, case, plans)
        for name, values in scores.items():
            fpr, tpr, _ = roc_curve(wrong, values)
            rows.append(
                {
                    "seed": seed, "case": case, "method": name,
                    "auc": float(roc_auc_score(wrong, values)),
                    "average_precision": float(average_precision_score(wrong, values)),
                    "found": float(wrong[plans[name]].mean()),
                    "roc": np.interp(GRID, fpr, tpr), **by_plan[name],
                }
            )  # fmt: skip
        influence = scores["multi"]
        bases.append(
            {
                "seed": seed, "case": case, **unchanged, "converged": converged,
                "trained": all(report.converged for report in trained.reports.values()),
                "planted_gain": by_plan["planted"]["gain"],
                "planted_loss_change": by_plan["planted"]["loss_change"],
                "clean_gain": clean[case]["accuracy"] - unchanged["accuracy"],
                "clean_loss_change": clean[case]["loss"] - unchanged["loss"],
                "wrong_positive": 100 * float((influence[wrong] > 0).mean()),
                "right_positive": 100 * float((influence[~wrong] > 0).mean()),
                "size_ratio": float(
                    np.abs(influence[wrong]).mean() / np.abs(influence[~wrong]).mean()
                ),
            }
        )  # fmt: skip
    return rows, bases


@dataclass(frozen=True)
class Results:
    """The rows of all seeds, and the tests over seeds.

    Attributes
    ----------
    removed, base
        Of :func:`cleanse`: by removal, and with nothing removed.
    detected, noise_base
        Of :func:`plant`: by method, and with all wrong labels.
    sizes
        Of the sets and the model.
    reported_share
        At which `gains` are taken.
    """

    removed: pd.DataFrame
    base: pd.DataFrame
    detected: pd.DataFrame
    noise_base: pd.DataFrame
    sizes: Mapping[str, int]
    reported_share: float

    def of(self, case: Case, order: str, share: float, column: str) -> NDArray[np.float64]:
        """The values of a plan, one a seed in their order."""
        rows = self.removed
        some = rows[
            (rows.case == case) & (rows.order == order) & np.isclose(rows.share, share)
        ]  # fmt: skip
        return some.sort_values("seed")[column].to_numpy()

    def of_noise(self, case: Case, method: str, column: str) -> NDArray[Any]:
        """The values of a method's search, one a seed; ``planted`` and ``clean`` have two."""
        if method in ("planted", "clean"):
            some = self.noise_base[self.noise_base.case == case]
            return some.sort_values("seed")[f"{method}_{column}"].to_numpy()
        rows = self.detected
        some = rows[(rows.case == case) & (rows.method == method)]
        return some.sort_values("seed")[column].to_numpy()

    def gains(self, case: Case, order: str, column: str) -> Paired:
        """A removal of the reported share against nothing removed, over seeds.

        Parameters
        ----------
        case
            Of the finetunings.
        order
            One of `NAMES`; ``restart`` is training again from other weights.
        column
            ``"gain"`` of accuracy or ``"loss_change"``.
        """
        if order == "restart":
            some = self.base[self.base.case == case].sort_values("seed")
            values = some[f"restart_{column}"].to_numpy()
        else:
            values = self.of(case, order, self.reported_share, column)
        return paired(values, np.zeros_like(values))

    def between(self, case: Case, order: str, other: str, column: str) -> Paired:
        """One removal of the reported share against another, over seeds."""
        return paired(
            self.of(case, order, self.reported_share, column),
            self.of(case, other, self.reported_share, column),
        )

    def noise_gains(self, case: Case, method: str, column: str) -> Paired:
        """Removing what a method flags against the model of all wrong labels, over seeds."""
        values = self.of_noise(case, method, column)
        return paired(values, np.zeros_like(values))

    def claims(self, case: Case, suffix: str) -> dict[str, dict[str, float]]:
        """What a record claims of a case, by name."""
        at = f"{100 * self.reported_share:g}"
        tests = {
            f"cleansing_accuracy_gain_{at}": self.gains(case, "harmful", "gain"),
            f"cleansing_random_gain_{at}": self.gains(case, "random", "gain"),
            f"cleansing_helpful_gain_{at}": self.gains(case, "helpful", "gain"),
            f"cleansing_as_in_paper_gain_{at}": self.gains(case, "paper", "gain"),
            f"cleansing_gain_over_random_{at}": self.between(case, "harmful", "random", "gain"),
            f"cleansing_loss_change_{at}": self.gains(case, "harmful", "loss_change"),
            "noise_accuracy_gain": self.noise_gains(case, "multi", "gain"),
        }
        count = int((self.base.case == case).sum())
        found = {
            f"{name}{suffix}": {
                **vars(test.difference), "seeds": count, "p": test.t_test,
                "wilcoxon": test.wilcoxon,
            }
            for name, test in tests.items()
        }  # fmt: skip
        for name, key in (
            ("multi", "multi_stage"), ("size", "multi_stage_size"), ("single", "single_stage"),
            ("self", "self_influence"), ("gradient", "gradient_norm"), ("loss", "loss"),
            ("random", "random"),
        ):  # fmt: skip
            level = share_estimate(self.of_noise(case, name, "auc"))
            found[f"noise_auc_{key}{suffix}"] = {**vars(level), "seeds": count}
        return found


def share_estimate(values: ArrayLike) -> Estimate:
    """Mean over the seeds of what lies between 0 and 1; the interval is cut there."""
    found = mean_estimate(values)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0))


def signed(estimate: Estimate, digits: int = 2) -> str:
    """Value and interval with their signs; no interval where all seeds give the same."""
    if estimate.low == estimate.high:
        return f"{estimate.value:+.{digits}f} (every seed)"
    return f"{estimate.value:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def p_value(p: float) -> str:
    """A p-value in two figures."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def reading(estimate: Estimate) -> str:
    """What a 95 % interval says about the sign."""
    if estimate.low == estimate.high:
        return "the same in every seed"
    if estimate.low > 0:
        return "above zero"
    return "below zero" if estimate.high < 0 else "not told apart from zero"


def change_row(what: str, accuracy: Paired, loss: Paired, mended: str, spoilt: str) -> dict:
    """A row of the table of removals.

    Parameters
    ----------
    what
        What is removed.
    accuracy, loss
        Their changes.
    mended, spoilt
        Test images whose prediction became right, or wrong.
    """
    return {
        "removed": what,
        "accuracy, points": signed(accuracy.difference),
        "p, t": p_value(accuracy.t_test),
        "p, Wilcoxon": p_value(accuracy.wilcoxon),
        "wrong → right": mended,
        "right → wrong": spoilt,
        "loss": signed(loss.difference, 4),
        "p of the loss, t": p_value(loss.t_test),
    }


#: Columns of the comparison with other records, and the claims that they show but for the share.
COLUMNS = {
    "accuracy, harmful first": "cleansing_accuracy_gain_{at}",
    "accuracy, random": "cleansing_random_gain_{at}",
    "AUC, multi-stage": "noise_auc_multi_stage",
    "AUC, self-influence": "noise_auc_self_influence",
    "AUC, loss": "noise_auc_loss",
}


def beside_row(
    data: str, case: str, claims: Mapping[str, Mapping[str, float]], at: str, suffix: str
) -> dict[str, Any]:
    """A row of the comparison with the paper and other records.

    Parameters
    ----------
    data, case
        What they are called.
    claims
        As of `Results.claims`, or as a record keeps them.
    at
        The reported share, in per cent.
    suffix
        Of the names of the case's claims.
    """

    def text(key: str) -> str:
        one = claims.get(f"{key}{suffix}")
        if one is None:
            return ""
        found = Estimate(one["value"], one["low"], one["high"])
        return str(found) if "auc" in key else signed(found)

    seeds = next(iter(claims.values()))["seeds"]
    shown = {column: text(key.format(at=at)) for column, key in COLUMNS.items()}
    return {"data": data, "case": case, "seeds": seeds, **shown}
