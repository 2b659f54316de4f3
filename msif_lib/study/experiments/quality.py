"""Are the most harmful pretraining images of low quality? Behind the paper's figure 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from msif_lib.evaluation import Estimate, Paired, mean_estimate, paired, spearman
from msif_lib.study.data.datasets import TwoStageData
from msif_lib.study.experiments.agreement import SHORT
from msif_lib.study.experiments.experiment import Case, Trained
from msif_lib.study.records import read_record

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Measures of an image's quality, and whether a high value says that it is low.
MEASURES = {"loss": True, "margin": False, "neighbours": True}
#: Which pretraining images are taken for each test image.
GROUPS = ("harmful", "helpful", "random")
_WORDS = {1: "lower", -1: "higher", 0: "not measurably different"}
_TITLES = {
    "harmful_loss_quantile": "harmful: mean rank of the loss",
    "harmful_margin_quantile": "harmful: mean rank of the margin",
    "harmful_knn_disagreement": "neighbours of another class: harmful − random",
    "harmful_less_helpful_loss": "rank of the loss: harmful − helpful",
    "harmful_less_helpful_margin": "rank of the margin: harmful − helpful",
    "harmful_less_helpful_neighbours": "neighbours of another class: harmful − helpful",
}


@dataclass(frozen=True)
class Looked:
    """What one seed shows in one case.

    Attributes
    ----------
    seed, case
        Which.
    wrong, of
        Misclassified test images, and all test images.
    chosen
        Positions of those looked at, the largest loss first ``(T,)``.
    predictions
        Class that the finetuned model gives each test image, counted as in the task.
    scores
        Of each pretraining image for each of those looked at ``(m, T)``.
    order
        Pretraining images by falling score, the most harmful first ``(m, T)``.
    means
        By group and measure: rank of loss and margin, and the share of neighbours of another
        class, over all images of the group.
    distinct, both
        Different images among the most harmful, and how many of these are also among the most
        helpful of some test image.
    size, sign
        Rank correlation of an image's own loss with the size of its scores, and with their sum.
    """

    seed: int
    case: Case
    wrong: int
    of: int
    chosen: Indices
    predictions: Indices
    scores: Vector
    order: Indices
    means: Mapping[tuple[str, str], float]
    distinct: int
    both: int
    size: float
    sign: float


def quality(data: TwoStageData, trained: Trained, neighbours: int) -> dict[str, Vector]:
    """Measure the quality of each pretraining image, without the finetuning task.

    Parameters
    ----------
    data, trained
        The images and the pretrained model.
    neighbours
        How many nearest pretraining images, pixel by pixel, are looked at.

    Returns
    -------
    dict
        Each ``(m,)``: ``loss`` in the pretrained model; ``margin``, the output of the image's class
        less the largest of the others; ``neighbours``, the share of another class among them.
    """
    stage = trained.pretrain
    assert isinstance(stage.data, tuple)  # it is made of tensors, see `train_two_stages`
    inputs, targets = stage.data
    with torch.no_grad():
        outputs = stage.outputs(stage.embedding_vector(), stage.head_vector(), inputs)
        losses = stage.losses(stage.embedding_vector(), stage.head_vector(), inputs, targets)
    of_class = outputs.gather(1, targets[:, None])[:, 0]
    others = outputs.scatter(1, targets[:, None], -torch.inf).amax(1)
    pixels, labels = data.pretrain[0].flatten(1).numpy(), data.pretrain[1].numpy()
    near = NearestNeighbors(n_neighbors=neighbours + 1).fit(pixels).kneighbors(pixels)[1]
    return {
        "loss": losses.cpu().numpy(),
        "margin": (of_class - others).cpu().numpy(),
        # The nearest of all is the image itself, or a copy of it.
        "neighbours": (labels[near[:, 1:]] != labels[:, None]).mean(1),
    }


def quantiles(values: Vector) -> Vector:
    """Rank of each value among all, from 0 to 1, equal values sharing theirs ``(m,)``."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, "left")
    upto = np.searchsorted(ordered, values, "right")
    return (below + upto - 1) / (2 * (len(values) - 1))


def wrong_images(trained: Trained, case: Case) -> tuple[Indices, Indices]:
    """Misclassified test images, largest loss first, and what every test image is taken for."""
    stage, (inputs, targets) = trained.finetuned[case], trained.test
    with torch.no_grad():
        outputs = stage.outputs(stage.embedding_vector(), stage.head_vector(), inputs)
        losses = stage.losses(stage.embedding_vector(), stage.head_vector(), inputs, targets)
    predictions = outputs.argmax(1)
    wrong = (predictions != targets).nonzero()[:, 0]
    order = losses[wrong].argsort(descending=True, stable=True)
    return wrong[order].cpu().numpy(), predictions.cpu().numpy()


def examine(
    data: TwoStageData,
    trained: Trained,
    seed: int,
    cases: Sequence[Case],
    misclassified: int,
    ends: int,
    neighbours: int,
) -> list[Looked]:
    """Score the pretraining images for each misclassified test image, and compare their quality.

    Parameters
    ----------
    data, trained, seed
        The images and models of one seed, and the seed of the images drawn at random.
    cases
        What is looked at.
    misclassified
        Test images looked at, at most, those of largest loss.
    ends
        Most harmful, most helpful and random images taken for each of them.
    neighbours
        As for `quality`.

    Returns
    -------
    list of Looked
        One a case.

    Raises
    ------
    ValueError
        No test image is misclassified.
    """
    measures = quality(data, trained, neighbours)
    ranks = {
        name: values if name == "neighbours" else quantiles(values)
        for name, values in measures.items()
    }
    rng = np.random.default_rng(seed)
    found = []
    for case in cases:
        wrong, predictions = wrong_images(trained, case)
        chosen = wrong[:misclassified]
        if not len(chosen):
            raise ValueError(
                f"seed {seed}: no test image is misclassified; use more or harder ones"
            )
        test = trained.test[0][chosen], trained.test[1][chosen]
        scores = trained.influence(case).scores(test, per_test=True).values.cpu().numpy()
        order = np.argsort(-scores, axis=0, kind="stable")
        everything = np.tile(np.arange(len(scores))[:, None], len(chosen))
        groups = {
            "harmful": order[:ends],
            "helpful": order[: -ends - 1 : -1],
            "random": rng.permuted(everything, axis=0)[:ends],
        }
        found.append(
            Looked(
                seed, case, len(wrong), len(predictions), chosen, predictions, scores, order,
                means={
                    (group, name): float(ranks[name][picked].mean())
                    for group, picked in groups.items()
                    for name in ranks
                },
                distinct=len(np.unique(groups["harmful"])),
                both=len(np.intersect1d(groups["harmful"], groups["helpful"])),
                size=spearman(np.abs(scores).mean(1), measures["loss"]).value,
                sign=spearman(scores.sum(1), measures["loss"]).value,
            )
        )  # fmt: skip
    return found


def of_seeds(looked: Sequence[Looked], case: Case, group: str, name: str) -> Vector:
    """A group's mean of a measure, one a seed."""
    return np.array([one.means[group, name] for one in looked if one.case == case])


def against(looked: Sequence[Looked], case: Case, name: str, other: str) -> Paired:
    """The most harmful images against another group, seed by seed."""
    return paired(of_seeds(looked, case, "harmful", name), of_seeds(looked, case, other, name))


def p_value(p: float) -> str:
    """A p-value in a table's cell."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def compared(looked: Sequence[Looked], labels: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows of a table: the groups' means, and their paired differences with p-values.

    Parameters
    ----------
    looked
        All seeds.
    labels
        Of the measures.
    """
    rows = []
    for case in dict.fromkeys(one.case for one in looked):
        for name, label in labels.items():
            row = {"case": SHORT[case], "measure": label}
            row |= {
                group: str(mean_estimate(of_seeds(looked, case, group, name))) for group in GROUPS
            }
            for other in ("random", "helpful"):
                found = against(looked, case, name, other)
                row[f"harmful − {other}"] = str(found.difference)
                row[f"p, against {other}"] = f"{p_value(found.t_test)} ({p_value(found.wilcoxon)})"
            rows.append(row)
    return rows


def judged(difference: Estimate, high_is_low: bool) -> str:
    """What a difference in a measure says of quality.

    Parameters
    ----------
    difference
        Harmful less other images.
    high_is_low
        Whether a high value of the measure says that quality is low.

    Returns
    -------
    str
        ``lower``, ``higher`` or, where the interval holds 0, ``not measurably different``.
    """
    if difference.low <= 0 <= difference.high:
        return _WORDS[0]
    return _WORDS[1 if (difference.value > 0) == high_is_low else -1]


def verdicts(looked: Sequence[Looked], case: Case, other: str) -> dict[str, str]:
    """By measure, whether the most harmful images are of lower quality than another group."""
    return {
        name: judged(against(looked, case, name, other).difference, high_is_low)
        for name, high_is_low in MEASURES.items()
    }


def in_words(looked: Sequence[Looked]) -> list[str]:
    """One sentence a case and group: how the quality of the most harmful images compares.

    The quality judged by a measure is told, never the measure's own value: a higher loss is a
    lower quality.
    """
    others = {"random": "images at random", "helpful": "the most helpful"}
    return [
        f"{SHORT[case]}, against {label}: "
        + ", ".join(
            f"quality judged by the {name} is {word}"
            for name, word in verdicts(looked, case, other).items()
        )
        for case in dict.fromkeys(one.case for one in looked)
        for other, label in others.items()
    ]


def answer(looked: Sequence[Looked]) -> str:
    """The page's answer, for the first case."""
    case, seeds = looked[0].case, len({one.seed for one in looked})
    random, helpful = (verdicts(looked, case, other)["loss"] for other in ("random", "helpful"))
    harmful, opposite = (
        mean_estimate(of_seeds(looked, case, group, "loss")) for group in ("harmful", "helpful")
    )
    differs = against(looked, case, "loss", "helpful").difference
    moral = (
        "So a large loss marks *influence*, of either sign, and not harm."
        if random == _WORDS[1] and helpful == _WORDS[0]
        else "So a large loss marks more than influence of either sign."
        if random == _WORDS[1] and helpful == _WORDS[1]
        else "So a large loss is no mark of harm here."
    )
    return (
        f"Judged by their own loss, the most harmful images are of **{random} quality** compared "
        f"with images at random: the mean rank of their loss is {harmful}, where 1 is the largest "
        f"and chance gives ½. Compared with the most *helpful* images, whose rank is {opposite}, "
        f"their quality is **{helpful}**; the difference in rank is {differs}. {moral} "
        f"({SHORT[case]}; means over {seeds} seeds with 95 % intervals.)"
    )


def claims(looked: Sequence[Looked]) -> dict[str, dict[str, Any]]:
    """What the first case claims beside the paper, by the names of the comparison."""
    case, seeds = looked[0].case, len({one.seed for one in looked})

    def claim(estimate: Estimate, p: float) -> dict[str, Any]:
        return {**vars(estimate), "seeds": seeds, "p": p}

    found = {
        f"harmful_{name}_quantile": claim(
            mean_estimate(of_seeds(looked, case, "harmful", name)),
            against(looked, case, name, "random").t_test,
        )
        for name in ("loss", "margin")
    }
    unlike = against(looked, case, "neighbours", "random")
    found["harmful_knn_disagreement"] = claim(unlike.difference, unlike.t_test)
    for name in MEASURES:
        less = against(looked, case, name, "helpful")
        found[f"harmful_less_helpful_{name}"] = claim(less.difference, less.t_test)
    return found


def rows(looked: Sequence[Looked]) -> list[dict[str, Any]]:
    """What a record keeps of the groups' means."""
    return [
        {"seed": one.seed, "case": one.case, "group": group, "measure": name, "mean": mean}
        for one in looked
        for (group, name), mean in one.means.items()
    ]


def beside(looked: Sequence[Looked], dataset: str, results: Path) -> list[dict[str, Any]]:
    """Rows of a table: this run's claims, and those recorded on other data.

    Parameters
    ----------
    looked, dataset
        What was measured here.
    results
        The folder of the records.
    """
    shown = [(dataset, claims(looked))]
    for path in sorted(results.glob("*.json")):
        record = read_record(path)
        shown.append((f"{record['dataset']} (recorded)", record["values"].get("claims", {})))
    return [
        {
            "data": data,
            "measure": title,
            "mean": str(Estimate(*(found[name][key] for key in ("value", "low", "high")))),
            "p": p_value(found[name]["p"]),
            "seeds": found[name]["seeds"],
        }
        for data, found in shown
        for name, title in _TITLES.items()
        if name in found
    ]
