"""What the paper claims in its section 4, as numbers, and the rule that judges ours beside them."""

from __future__ import annotations

from dataclasses import dataclass

_OPTIMUM = (
    "The paper trains its stages for an unstated time and itself expects gradients that are not "
    "zero. Here both stages are trained to a stationary point and retrained to one, so that what "
    "remains is the error of a first-order prediction. The page on the "
    "[correlations](correlation.html) shows r as training goes on, by the same formulas and by a "
    "walk back through the steps, and what is left when only a part of an example's weight is "
    "removed."
)
_PLAIN = (
    "Equation 12 holds for finetuning with a pull towards the pretrained embedding. Plain "
    "finetuning stops early instead, which is no optimum of anything; the page on the "
    "[correlations](correlation.html) shows the scores of a chain that has these steps as a "
    "link of its own, beside those of equation 12."
)
_NOISE = (
    "The paper's gain is smaller than the binomial standard error of its test accuracy, from one "
    "model. The page on [cleansing](cleansing.html) repeats the removal over seeds, chooses on "
    "images that no stage has seen and measures on the test images, and shows what training again "
    "from other initial weights does alone."
)
_TASKS = (
    "The raw size of a score goes with the test loss and with all else that sets one task apart "
    "from another. The page on [similar tasks](similarity.html) compares all pairs of several "
    "tasks, so that these cancel, and takes the score apart."
)
_SIZE = (
    "The paper changes the number of examples and of steps at once. The page on the [size of the "
    "finetuning set](finetune_size.html) varies them one by one, and tests the forgetting filter "
    "as the explanation. The paper does not say from which head finetuning began: with a new one "
    "the first steps fit the head, and until it is fitted scores may well grow."
)
_QUALITY = (
    "The paper shows two pairs of images. The page on [misclassified images](misclassified.html) "
    "measures the quality of the most harmful examples against that of the others."
)
_AS_PEOPLE_DO = (
    "Equation 12 against a finetuning as people do it, by SGD with momentum from the pretrained "
    "embedding, stopped early. Random sets of 1 % of the pretraining examples are left out of both "
    "stages, and the order of the changes is compared. The paper leaves out single images and "
    "compares otherwise, so that there is no verdict. Beside it stands the exact derivative, back "
    "through the steps of the same trainings. The page on the "
    "[benchmark](../chapters/benchmark.html) has all methods and settings."
)
_TABLE = (
    "The paper's table shows which sentences have extreme scores; none of them was left out. The "
    "page on [sentences](nlp.html) leaves out groups of them and trains both stages again, beside "
    "three simpler guesses."
)


@dataclass(frozen=True)
class Claim:
    """One number of the paper, and how ours is held against it.

    Attributes
    ----------
    name
        Its key under ``"claims"`` in the records.
    section
        Where the paper makes it.
    about
        What it is, in a few words.
    dataset
        The data set, or the record of ours on it by the name of its file.
    paper
        The paper's number; None where it gives none.
    paper_text
        How the paper has it.
    none
        The value of no effect; None where the claim is not of an effect.
    direction
        +1 where the paper claims more than `none`, −1 where it claims less.
    paper_interval
        95 % interval of the paper's correlation, Fisher's for 100 points.
    digits
        After the point, in tables.
    why
        Where a difference is looked into.
    comparable
        Whether the paper measured the same; else our number stands for itself.
    """

    name: str
    section: str
    about: str
    dataset: str
    paper: float | None
    paper_text: str
    none: float | None = 0.0
    direction: int = 1
    paper_interval: tuple[float, float] | None = None
    digits: int = 2
    why: str = ""
    comparable: bool = True


CLAIMS = (
    Claim("r_fixed_top", "4.1, Fig. 2a", "case 1, r with retraining", "cifar10", 0.6, "r = 0.6",
          paper_interval=(0.46, 0.71), why=_OPTIMUM),
    Claim("r_fixed_top", "4.1, Fig. 2a", "the same, all 10,000 images", "cifar10-10000", 0.6,
          "r = 0.6", why=_OPTIMUM),
    Claim("r_fixed_top", "4.1, Fig. A", "case 1, r with retraining, MNIST", "mnist", None,
          "a plot", why=_OPTIMUM),
    Claim("r_updated_top", "4.1, Fig. 2b", "case 2, r with retraining", "cifar10", 0.46,
          "r = 0.46", paper_interval=(0.29, 0.60), why=_OPTIMUM),
    Claim("r_updated_plain", "4.1, Fig. 2b", "case 2, finetuned without the pull", "cifar10", 0.46,
          "r = 0.46", why=_PLAIN),
    Claim("r_updated_plain_through_steps", "4.1, Fig. 2b", "the same, scores through its steps",
          "cifar10", 0.46, "r = 0.46", why=_PLAIN),
    *(
        Claim(name, "4.1, Fig. 2b", f"{about}{where}", dataset, None, "not measured", none=None,
              why=_AS_PEOPLE_DO, comparable=False)
        for dataset, where in (("digits-sgd", ""), ("mnist-sgd", ", MNIST"))
        for name, about in (
            ("two_stage_case_2", "case 2 against finetuning as people do it"),
            ("two_stage_exact", "the exact derivative of the same"),
        )
    ),
    Claim("r_identity_top", "4.1, Fig. 2c", "identity for the inverse Hessians", "mnist", 0.17,
          "r = 0.17", none=None, paper_interval=(-0.03, 0.35)),
    Claim("harmful_loss_quantile", "4.1, Fig. 3", "rank by own loss, most harmful",
          "cifar10", None, "“low quality”", none=0.5, why=_QUALITY),
    Claim("harmful_knn_disagreement", "4.1, Fig. 3",
          "unlike neighbours, over random", "cifar10", None,
          "“low quality”", why=_QUALITY),
    Claim("cleansing_accuracy_gain_10", "4.2", "10 % most harmful out, points",
          "cifar10", 0.21, "58.15 → 58.36 %", why=_NOISE),
    Claim("cleansing_random_gain_10", "4.2", "10 % at random out, points", "cifar10",
          -0.07, "58.15 → 58.08 %", direction=-1, why=_NOISE),
    Claim("similarity_ratio", "4.3, Fig. B", "mean |I|, like task over unlike", "cifar10",
          0.055 / 0.025, "0.055 / 0.025", none=1.0, why=_TASKS),
    Claim("finetune_size_ratio", "4.4, Fig. C", "mean |I|, 3 × examples and steps",
          "cifar10", None, "smaller (0.15)", none=1.0, direction=-1, why=_SIZE),
    Claim("finetune_size_ratio_fitted", "4.4, Fig. C", "the same, from a fitted head",
          "cifar10", None, "smaller (0.15)", none=1.0, direction=-1, why=_SIZE),
    Claim("nlp_lds_influence", "4.5, Table 1", "linear datamodeling score", "gop",
          None, "a table", why=_TABLE),
    Claim("nlp_lds_influence_part", "4.5, Table 1", "the same, a part of the weight", "gop",
          None, "a table", why=_TABLE),
    Claim("nlp_lds_influence", "4.5, Table 1", "news alone, all of the weight", "news",
          None, "a table", why=_TABLE),
    Claim("nlp_lds_influence_part", "4.5, Table 1", "news alone, a part of the weight", "news",
          None, "a table", why=_TABLE),
)  # fmt: skip


def verdict(claim: Claim, value: float, low: float, high: float) -> str:
    """Judge one of our numbers, by its 95 % interval.

    Parameters
    ----------
    claim
        What the paper claims.
    value, low, high
        Our number and its interval.

    Returns
    -------
    str
        ``"not significant"`` where the interval holds the value of no effect, ``"opposite"``
        where it lies on the other side of it, ``"reproduced"`` where it holds the paper's number
        or there is none, else ``"stronger"`` or ``"weaker"``. ``"not comparable"`` where the paper
        measured something else.

    Raises
    ------
    ValueError
        The value lies outside its interval.
    """
    if not low <= value <= high:
        raise ValueError(f"{claim.name}: {value} is not within its interval [{low}, {high}]")
    if not claim.comparable:
        return "not comparable"
    if claim.none is not None:
        if low <= claim.none <= high:
            return "not significant"
        if (value - claim.none) * claim.direction < 0:
            return "opposite"
    if claim.paper is None or low <= claim.paper <= high:
        return "reproduced"
    return "stronger" if (value - claim.paper) * claim.direction > 0 else "weaker"
