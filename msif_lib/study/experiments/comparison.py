"""The numbers of the paper's section 4, ours beside them, and the rule that judges them.

:data:`CLAIMS` is what the paper says. :func:`read_found` takes from the records what was measured
here, and :func:`verdict` holds one against the other. The page that shows the result and the front
page of the book take their numbers from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scipy.stats import binomtest

from msif_lib.evaluation import Estimate
from msif_lib.study.data.datasets import DEFAULT_CLASSES
from msif_lib.study.experiments.benchmark import read_judged
from msif_lib.study.models.networks import build_model
from msif_lib.study.records import read_record

_OPTIMUM = (
    "The paper trains its stages for a time that it does not state, and expects gradients that are "
    "not zero. Here both stages are trained to a stationary point and trained again to one. What "
    "remains is the error of a first-order prediction. The page on "
    "[other trainings](trainings.html) shows r as training goes on, that on "
    "[the size of the step](step_size.html) what is left of the error when only a part of an "
    "example's weight is removed."
)
_OTHER_TRAININGS = (
    "Equation 12 holds for finetuning with a pull towards the pretrained embedding. Plain "
    "finetuning has no pull and stops early. The page on [other trainings](trainings.html) "
    "shows the scores of a chain in which these steps are a link of their own, beside those of "
    "equation 12."
)
_NOISE = (
    "The paper's gain is smaller than the binomial standard error of its test accuracy, and comes "
    "from one model. Our models are smaller and less accurate than the paper's. The page on "
    "[cleansing](cleansing.html) repeats the removal over seeds, chooses on images that no stage "
    "has seen, measures on the test images, and shows what training again from other initial "
    "weights does alone."
)
_TASKS = (
    "The raw size of a score goes with the test loss and with all else that differs between two "
    "tasks. The page on [similar tasks](similarity.html) compares all pairs of several tasks, so "
    "that these cancel, and takes the score apart."
)
_SIZE = (
    "The paper gives the mean size of the scores of one model, 0.15, and says that it is smaller "
    "than the other's. It does not give the other's, so there is no ratio to compare with. It "
    "changes the number of examples and of steps at once, and does not say from which head "
    "finetuning began: with a new one the first steps fit the head, and until it is fitted scores "
    "may well grow. The page on the [size of the finetuning set](finetune_size.html) varies these "
    "one by one."
)
_QUALITY = (
    "The paper shows two pairs of images. The page on [misclassified images](misclassified.html) "
    "measures the quality of the most harmful examples against that of the others."
)
_AS_PEOPLE_DO = (
    "Finetuning as people do it: SGD with momentum from the pretrained embedding, stopped early. "
    "Random sets of 1 % of the pretraining examples are left out of both stages, and the order of "
    "the changes is compared. The paper did not measure this. The exact derivative goes back "
    "through the steps of the same trainings. The [benchmark](../chapters/benchmark.html) has all "
    "methods and settings."
)
_TABLE = (
    "The paper's table shows which sentences have extreme scores; none of them was left out. The "
    "page on [sentences](nlp.html) leaves out groups of them and trains both stages again, beside "
    "three simpler guesses."
)


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, and how a number of ours is held against it.

    Attributes
    ----------
    name
        Its key under ``"claims"`` in the records.
    section
        Where the paper makes it.
    about
        What it is, in a few words.
    text
        How the paper has it.
    data
        The data set on which the paper measured it; empty where it did not.
    paper
        The paper's number; None where it gives none.
    none
        The value of no effect; None where the claim is not of an effect.
    direction
        +1 where the paper claims more than `none`, −1 where it claims less.
    interval
        95 % interval of the paper's correlation, Fisher's for 100 points.
    accuracy
        Of the paper's finetuned model, in per cent; None where it gives none.
    why
        Where a difference is looked into.
    """

    name: str
    section: str
    about: str
    text: str
    data: str = "cifar10"
    paper: float | None = None
    none: float | None = 0.0
    direction: int = 1
    interval: tuple[float, float] | None = None
    accuracy: float | None = None
    why: str = ""


CLAIMS = (
    Claim("r_fixed_top", "4.1, Fig. 2a", "case 1, embedding fixed: r with retraining", "r = 0.6",
          paper=0.6, interval=(0.46, 0.71), why=_OPTIMUM),
    Claim("r_fixed_top", "4.1, Fig. A", "case 1, embedding fixed: r with retraining", "a plot",
          data="mnist", why=_OPTIMUM),
    Claim("r_updated_top", "4.1, Fig. 2b", "case 2, embedding updated with a pull: r", "r = 0.46",
          paper=0.46, interval=(0.29, 0.60), why=_OPTIMUM),
    Claim("r_updated_plain", "4.1, Fig. 2b", "case 2 against finetuning without the pull: r",
          "r = 0.46", paper=0.46, interval=(0.29, 0.60), why=_OTHER_TRAININGS),
    Claim("r_updated_plain_through_steps", "4.1, Fig. 2b", "the same, scores through its steps: r",
          "r = 0.46", paper=0.46, interval=(0.29, 0.60), why=_OTHER_TRAININGS),
    Claim("two_stage_case_2", "", "case 2 against finetuning as people do it: rank correlation",
          "none", data="", why=_AS_PEOPLE_DO),
    Claim("two_stage_exact", "", "the exact derivative of the same: rank correlation",
          "none", data="", why=_AS_PEOPLE_DO),
    Claim("r_identity_top", "4.1, Fig. 2c", "identity for the inverse Hessians: r", "r = 0.17",
          data="mnist", paper=0.17, none=None, interval=(-0.03, 0.35)),
    Claim("harmful_loss_quantile", "4.1, Fig. 3", "most harmful images: rank by their own loss",
          "two pairs", none=0.5, why=_QUALITY),
    Claim("harmful_knn_disagreement", "4.1, Fig. 3",
          "most harmful images: unlike neighbours, more than at random", "two pairs",
          why=_QUALITY),
    Claim("cleansing_accuracy_gain_10", "4.2", "10 % most harmful out: gain in points",
          "58.15 → 58.36 %", paper=0.21, accuracy=58.15, why=_NOISE),
    Claim("cleansing_random_gain_10", "4.2", "10 % at random out: gain in points",
          "58.15 → 58.08 %", paper=-0.07, direction=-1, accuracy=58.15, why=_NOISE),
    Claim("similarity_ratio", "4.3, Fig. B", "mean |I|: like task over unlike", "0.055 over 0.025",
          paper=0.055 / 0.025, none=1.0, why=_TASKS),
    Claim("finetune_size_ratio", "4.4, Fig. C", "mean |I|: three times the examples and steps",
          "smaller, 0.15", none=1.0, direction=-1, why=_SIZE),
    Claim("finetune_size_ratio_fitted", "4.4, Fig. C", "the same, from a fitted head",
          "smaller, 0.15", none=1.0, direction=-1, why=_SIZE),
    Claim("nlp_lds_influence", "4.5, Table 1", "sentences: linear datamodeling score",
          "a table", data="gop", why=_TABLE),
    Claim("nlp_lds_influence_part", "4.5, Table 1", "the same, a part of the weight",
          "a table", data="gop", why=_TABLE),
)  # fmt: skip

#: What data sets are called.
NAMES = {"cifar10": "CIFAR-10", "mnist": "MNIST", "gop": "GOP tweets"}
#: Shapes of the images, to count the parameters of a network.
_SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
#: Gradient descent moves away from a minimum where its rate times the curvature is above this.
_STABLE = 2.0
#: Below this a seed's correlation is counted as poor.
POOR = 0.9


@dataclass(frozen=True)
class Found:
    """A number of ours, with what it was measured on.

    Attributes
    ----------
    name
        That of the claim.
    data
        The data set, or the setting of the two-stage benchmark.
    setting
        What sets it apart from the main one on these data; empty for the main one.
    estimate
        The number with its 95 % interval.
    seeds
        Over how many.
    parameters
        Of the pretraining model; None where that is not known.
    removals
        What was left out and trained without, in words; empty where nothing was.
    accuracy
        Of the finetuned models on test examples, mean over the seeds, in per cent; None where the
        record does not have it.
    diverged
        Whether a finetuning diverged.
    """

    name: str
    data: str
    setting: str
    estimate: Estimate
    seeds: int
    parameters: int | None = None
    removals: str = ""
    accuracy: float | None = None
    diverged: bool = False

    @property
    def label(self) -> str:
        """Data and setting as tables have them."""
        images = f"{int(self.setting):,} images" if self.setting.isdigit() else self.setting
        return ", ".join(filter(None, (NAMES.get(self.data, self.data), images)))


def claim_of(found: Found) -> Claim:
    """The claim that a number belongs to: that on the same data, else the first of its name."""
    same = [claim for claim in CLAIMS if claim.name == found.name]
    return next((claim for claim in same if claim.data == found.data), same[0])


def compared(claim: Claim, found: Found) -> bool:
    """Whether the paper gives a number for the same thing on the same data."""
    return claim.paper is not None and claim.data == found.data


def effect(claim: Claim, found: Found) -> str:
    """What our interval says about the effect that the paper claims.

    Returns
    -------
    str
        ``"seen"``, ``"opposite"``, ``"not seen"`` where the interval holds the value of no effect,
        or an empty text where the claim is not of an effect, the finetuning diverged or there is no
        interval.
    """
    estimate = found.estimate
    if claim.none is None or found.diverged or estimate.low == estimate.high:
        return ""
    if estimate.low <= claim.none <= estimate.high:
        return "not seen"
    return "seen" if (estimate.value - claim.none) * claim.direction > 0 else "opposite"


def verdict(claim: Claim, found: Found) -> str:
    """Judge one of our numbers.

    Parameters
    ----------
    claim
        What the paper claims.
    found
        Our number.

    Returns
    -------
    str
        The first of these that holds: ``"diverged"``, a finetuning did; ``"no interval"``, it has
        no width; ``"not comparable"``, the paper gives no number for it on these data;
        ``"unclear"``, the interval holds the value of no effect, or for a claim that is not
        of an effect it is wider than the paper's; ``"opposite"``, it lies on the other side of no
        effect; ``"reproduced"``, it holds the paper's number; else ``"stronger"`` or ``"weaker"``.

    Raises
    ------
    ValueError
        The value lies outside its interval.
    """
    value, low, high = found.estimate.value, found.estimate.low, found.estimate.high
    if not low <= value <= high:
        raise ValueError(f"{claim.name}: {value} is not within its interval [{low}, {high}]")
    if found.diverged:
        return "diverged"
    if low == high:
        return "no interval"
    if claim.paper is None or not compared(claim, found):
        return "not comparable"
    if claim.none is None and claim.interval is not None:
        if high - low > claim.interval[1] - claim.interval[0]:
            return "unclear"
    elif (seen := effect(claim, found)) != "seen":
        return "opposite" if seen == "opposite" else "unclear"
    if low <= claim.paper <= high:
        return "reproduced"
    return "stronger" if (value - claim.paper) * claim.direction > 0 else "weaker"


def read_found(path: Path) -> list[Found]:
    """What a record of an experiment has on the paper's claims.

    Parameters
    ----------
    path
        Of the record. Where its name begins with that of the data, the rest names the setting.

    Raises
    ------
    ValueError
        A seed is there twice: the interval would be too narrow.
    """
    record = read_record(path)
    twice = [seed for seed, count in Counter(record["seeds"]).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has the seed {twice[0]} twice; a seed counts once")
    values, data = record["values"], record["dataset"]
    claims = values.get("claims", {})
    setting = path.stem.removeprefix(data) if path.stem.startswith(data) else ""
    fast = values.get("learning_rate_times_largest_curvature", 0.0) > _STABLE
    found = []
    for name in dict.fromkeys(claim.name for claim in CLAIMS if claim.name in claims):
        one = claims[name]
        found.append(
            Found(
                name,
                data,
                setting.strip("-").replace("-", " "),
                Estimate(one["value"], one["low"], one["high"]),
                one.get("seeds", len(record["seeds"])),
                _parameters(record),
                _removals(name, record),
                _accuracy(name, record),
                bool(one.get("diverged", fast and name.startswith("finetune_size"))),
            )
        )
    return found


def _parameters(record: Mapping[str, Any]) -> int | None:
    """Parameters of the pretraining model, counted where the record does not say."""
    given, data = record["parameters"], record["dataset"]
    counted = record["values"].get("sizes", {}).get("p")
    if counted is not None or data not in _SHAPES or "architecture" not in given:
        return counted
    classes = given.get("pretrain_classes") or DEFAULT_CLASSES[data][0]
    classes = given["tasks"][0] if "tasks" in given else classes
    embedding, head, _ = build_model(
        given["architecture"],
        given["head"],
        _SHAPES[data],
        len(classes),
        len(classes),
        widths=given["widths"],
    )
    return sum(p.numel() for module in (embedding, head) for p in module.parameters())


def _removals(name: str, record: Mapping[str, Any]) -> str:
    """What was left out for a claim, in words."""
    given = record["parameters"]
    if name.startswith("r_"):
        plain = name.startswith("r_updated_plain")
        return str(given["plain_removals" if plain and "plain_removals" in given else "removals"])
    if name.startswith("cleansing"):
        return f"{given['reported_share'] * given['pretrain_size']:.0f} at once"
    if name.startswith("nlp"):
        return f"{given['groups']} groups of {100 * given['share']:g} %"
    return ""


def _accuracy(name: str, record: Mapping[str, Any]) -> float | None:
    """Mean accuracy of the finetuned models, in per cent; None where it was not kept."""
    values, given = record["values"], record["parameters"]
    if name.startswith("cleansing"):  # in per cent already, as the paper has it
        case = given["cases"][0]
        return fmean(row["accuracy"] for row in values["nothing_removed"] if row["case"] == case)
    rows: Iterable[Mapping[str, Any]] = ()
    if name.startswith("nlp"):
        rows = values["seeds"]
    elif name.startswith("similarity"):
        rows = (row for row in values["pairs"] if row["case"] == given["cases"][0])
    elif name.startswith("finetune_size"):
        asked = (
            "fitted" if name.endswith("fitted") else "pull",
            given["base_size"],
            str(given["base_steps"]),
        )
        rows = (row for row in values["grid"] if (row["way"], row["n"], str(row["k"])) == asked)
    found = [100 * row["accuracy"] for row in rows]
    return fmean(found) if found else None


def read_two_stage(folder: Path, share: float = 0.01) -> list[Found]:
    """What the two-stage benchmark has on finetuning as people do it.

    Parameters
    ----------
    folder
        Of its records.
    share
        Of the pretraining examples that is left out in each set.
    """
    found = []
    for name, judged in read_judged(folder).items():
        if not judged.as_usual:
            continue
        asked = {"two_stage_case_2": "case 2, no damping", "two_stage_exact": judged.exact}
        for claim, method in asked.items():
            estimate = judged.estimate(method, share)
            if estimate is not None:
                tested = [100 * finetuned for _, finetuned in judged.values["accuracy"]]
                found.append(
                    Found(
                        claim,
                        name,
                        "",
                        estimate,
                        len(judged.seeds),
                        judged.values["parameters"][0],
                        f"{judged.values['subsets']} sets of {100 * share:g} %",
                        fmean(tested),
                    )
                )
    return found


def shown(estimate: Estimate) -> str:
    """A number and its interval, in two to four digits: ends that would round to one say so.

    Parameters
    ----------
    estimate
        The number.
    """

    def end(number: float, digits: int) -> str:
        if abs(number) < 1 == abs(round(number, digits)):
            bound = 1 - 10.0**-digits
            return f">{bound:.{digits}f}" if number > 0 else f"<-{bound:.{digits}f}"
        return f"{round(number, digits) + 0.0:.{digits}f}" if abs(number) < 1e3 else f"{number:.0e}"

    numbers = (estimate.value, estimate.low, estimate.high)
    for digits in range(2, 5):
        value, low, high = (end(number, digits) for number in numbers)
        if value[0] not in "<>" and low != high:
            break
    return f"{value} [{low}, {high}]"


def row(found: Found) -> dict[str, str]:
    """One of our numbers beside the paper's, as a row of a table.

    Parameters
    ----------
    found
        Our number.

    Returns
    -------
    dict
        ``verdict`` where the paper gives a number, else ``effect``; ``claim``; ``paper``, what it
        has on these data; ``ours``, with the data; ``size``, the parameters;
        ``accuracy``; ``left out``; ``seeds``.
    """
    claim = claim_of(found)
    judged = verdict(claim, found)
    seen = judged if judged in ("diverged", "no interval") else effect(claim, found)
    same = compared(claim, found)
    tested = "–" if found.accuracy is None else f"{found.accuracy:.0f} %"
    if same and claim.accuracy is not None:
        tested += f" (paper {claim.accuracy:.0f} %)"
    return {
        **({"verdict": judged} if same else {"effect": seen or "–"}),
        "claim": claim.about,
        "paper": claim.text if claim.data == found.data else "–",
        "ours": f"{shown(found.estimate)}, {found.label}",
        "size": "–" if found.parameters is None else f"{found.parameters:,}",
        "accuracy": tested,
        "left out": found.removals or "–",
        "seeds": str(found.seeds),
    }


def in_order(found: Iterable[Found]) -> list[Found]:
    """Numbers in the order of the claims, of the paper's data and main settings first."""
    names = list(dict.fromkeys(claim.name for claim in CLAIMS))
    return sorted(
        found,
        key=lambda one: (names.index(one.name), not compared(claim_of(one), one), one.setting),
    )


def front(recorded: Iterable[Found]) -> dict[str, str]:
    """The texts that the front page shows, by the names under which it asks for them.

    Parameters
    ----------
    recorded
        All numbers of ours; those of other settings than the main one are left out.

    Returns
    -------
    dict
        For each number ``<claim>_ours``, ``_verdict``, ``_size``, ``_left_out`` and ``_paper``, the
        last where the paper gives a correlation. A number of the two-stage benchmark has its
        setting after the claim: ``two_stage_exact_digits_sgd_ours``.
    """
    texts: dict[str, str] = {}
    for found in recorded:
        if found.setting or (found.name.startswith("r_") and not compared(claim_of(found), found)):
            continue
        claim, cells = claim_of(found), row(found)
        setting = f"_{found.data.replace('-', '_')}" if found.name.startswith("two_stage") else ""
        parts = {
            "ours": shown(found.estimate),
            "verdict": verdict(claim, found),
            "size": f"{found.label}, {cells['size']} parameters, {cells['seeds']} seeds",
            "left_out": cells["left out"],
        }
        if claim.paper is not None and claim.interval is not None:
            parts["paper"] = shown(Estimate(claim.paper, *claim.interval))
        texts |= {f"{found.name}{setting}_{part}": text for part, text in parts.items()}
    return texts


def seed_row(record: Mapping[str, Any], case: str) -> dict[str, Any] | None:
    """How much the seeds of a record can say about a case: the spread of r, and its tail.

    Parameters
    ----------
    record
        Of the correlations.
    case
        ``"fixed"`` or ``"updated"``.

    Returns
    -------
    dict or None
        ``seeds``; ``lowest``, ``median`` and ``highest`` r of the examples of largest influence;
        ``poor``, how many seeds are below :data:`POOR`; ``at most``, the upper end of the 95 %
        interval of Clopper and Pearson for the share of such seeds. None where the record has
        nothing on the case.
    """
    found = [
        row["agreement"]["pearson"]["value"]
        for row in record["values"].get("agreements", ())
        if (row["case"], row["selection"], row["method"]) == (case, "top", "influence")
    ]
    if not found:
        return None
    poor = sum(r < POOR for r in found)
    return {
        "seeds": len(found),
        "lowest": min(found),
        "median": median(found),
        "highest": max(found),
        "poor": poor,
        "at most": float(binomtest(poor, len(found)).proportion_ci().high),
    }


def costs(folder: Path) -> list[dict[str, str]]:
    """What scores cost beside the two times that the paper names, as rows of a table.

    Parameters
    ----------
    folder
        Of the benchmarks' records; those that are not there are left out.
    """
    rows = []
    path = folder / "pretraining_set.json"
    if path.exists():
        record = read_record(path)
        values = record["values"]
        for case, found in values["cases"].items():
            for kind in ("ours", "tight"):
                solved = ", ".join(f"{solve['residual']:.0e}" for solve in found[kind]["solves"])
                rows.append(
                    {
                        "work": f"scores of {values['examples']:,} examples, {case}, "
                        f"to residuals {solved}",
                        "paper": f"{values['paper_seconds']:g} s (V100)",
                        "here": f"{found[kind]['seconds']['total']:.0f} s",
                        "in units of": f"{found[kind]['gradients']['total']:.0f} gradients",
                        "machine": _machine(record),
                    }
                )
    for path in sorted(folder.glob("sentences-elmo-*.json")):
        record = read_record(path)
        for model in record["values"]["models"]:
            size = (model["embedding_parameters"] + model["head_parameters"]) / 1e6
            rows.append(
                {
                    "work": f"one sentence, {model['model']}, {size:.1f} M parameters",
                    "paper": f"{record['values']['paper_seconds_a_sentence']:g} s (GPU not named)",
                    "here": f"{model['scoring_seconds_a_sentence']:.2f} s",
                    "in units of": f"{model['ratio']:.2f} forward passes",
                    "machine": _machine(record),
                }
            )
    return rows


def _machine(record: Mapping[str, Any]) -> str:
    machine, threads = record["values"].get("machine") or {}, record["provenance"]["threads"]
    processor = f"{machine.get('processor', 'CPU')}, {threads} thread{'s' * (threads != 1)}"
    return str(machine.get("gpu") or processor)
