"""Sentences and their influence on texts of another task (section 4.5).

An embedding of ELMo's form is pretrained as a language model and kept; a classifier of texts is
trained on it. Scores of the pretraining sentences are held against leaving groups of them out and
training both stages again, beside three simpler guesses.
"""

from __future__ import annotations

import copy
import html
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.curvature import Hessian
from msif_lib.evaluation import Agreement, Estimate, compare, mean_estimate
from msif_lib.links import Optimum
from msif_lib.retraining import Retraining, RetrainingSettings
from msif_lib.scores import Scores
from msif_lib.solvers import Dense, MinRes, Solver
from msif_lib.study.data.texts import Text, TwoStageTexts, bm25
from msif_lib.study.models.language import (
    PADDING,
    UNKNOWN,
    LanguageModel,
    SentenceClassifier,
    Sizes,
    TokenPredictor,
    Vocabulary,
    encode_characters,
    language_loss,
)
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.data import map_leaves
from msif_lib.support.fingerprint import fingerprint
from msif_lib.training import TrainingReport, TrainingWarning, train_kept

#: What predicts the change of a test loss, by its name in the records.
METHODS = {
    "influence": "multi-stage influence",
    "gradient_dot": "gradient dot product",
    "embedding": "embedding similarity",
    "bm25": "BM25",
}


@dataclass(frozen=True)
class Design:
    """Models, training, scores and retraining.

    Attributes
    ----------
    size, smooth
        Of the embedding, as for :class:`msif_lib.study.models.language.LanguageModel`.
    hidden
        Width of the classifier's hidden layer.
    characters
        Bytes kept of a token.
    l2_pretrain, l2_finetune
        Weight decay of each stage.
    decay_to
        Where that of finetuning pulls the classifier: ``"zero"``, or ``"start"``, its initial
        weights.
    epochs, learning_rate, evaluations, gradient_tol
        Of training: Adam's, then how many gradients of L-BFGS at most, and where it ends.
    solver
        Of the pretraining Hessian: ``"dense"`` or ``"minres"``.
    groups, share
        Groups of sentences that are left out, and the share of the sentences in one.
    retrain_tol, retrain_evaluations, retrain_damping
        Of retraining, as for :class:`msif_lib.retraining.RetrainingSettings`.
    device
        Where to train.
    checkpoint
        A folder that keeps every training; None: none.
    """

    size: Sizes
    smooth: bool
    hidden: int
    characters: int
    l2_pretrain: float
    l2_finetune: float
    decay_to: str
    epochs: int
    learning_rate: float
    evaluations: int
    gradient_tol: float
    solver: str
    groups: int
    share: float
    retrain_tol: float
    retrain_evaluations: int
    retrain_damping: float
    device: str = "cpu"
    checkpoint: str | None = None

    def encoded(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """The embedding's inputs, on the device."""
        inputs = encode_characters([text.tokens for text in texts], self.characters)
        return map_leaves(lambda leaf: leaf.to(self.device), inputs)

    def train(self, stage: Stage, seed: int, **more: Any) -> TrainingReport:
        """Train a stage in place, or read it from the checkpoint."""
        with warnings.catch_warnings():
            # A table says how each training ended.
            warnings.simplefilter("ignore", TrainingWarning)
            return train_kept(
                stage, self.gradient_tol, checkpoint=self.checkpoint, epochs=self.epochs,
                seed=seed, learning_rate=self.learning_rate, lbfgs_evaluations=self.evaluations,
                newton_steps=0, **more,
            )  # fmt: skip

    def decay(self, head: nn.Module, l2: float) -> dict[str, Any]:
        """The regularizer of finetuning: l2/2 ‖Θ‖², or l2/2 ‖Θ − Θ₀‖² with Θ₀ the head as it is."""
        if self.decay_to == "zero":
            return {"l2": l2}
        start = {f"head.{name}": value.detach().clone() for name, value in head.named_parameters()}

        def towards_start(named: Mapping[str, Tensor]) -> Tensor:
            away = [((named[name] - value) ** 2).sum() for name, value in start.items()]
            return l2 / 2 * cast(Tensor, sum(away))

        return {"regularizer": towards_start}

    def retraining(self, hessian: Any) -> RetrainingSettings:
        """How to retrain, where the Hessian of pretraining is there already."""
        return RetrainingSettings(
            tol=self.retrain_tol, max_evaluations=self.retrain_evaluations,
            damping=self.retrain_damping, models_at_once=8,
            first_hessian=hessian if self.solver == "dense" else None,
        )  # fmt: skip

    def solve(self, damping: float) -> Solver:
        """The solver of the pretraining Hessian."""
        return Dense(damping=damping) if self.solver == "dense" else MinRes(damping=damping)


@dataclass(frozen=True)
class Stages:
    """Both trained stages of a seed.

    Attributes
    ----------
    seed, data, vocabulary
        The draw, its texts and its vocabulary.
    pretrain, finetune
        The stages.
    test
        The scored test texts, encoded, and their labels.
    reports
        How the trainings ended: ``"pretraining"`` and ``"finetuning"``.
    accuracy
        Share of all test texts that the classifier gets right.
    untrained
        The same on the embedding before pretraining, at the best of three weight decays.
    """

    seed: int
    data: TwoStageTexts
    vocabulary: Vocabulary
    pretrain: Stage
    finetune: Stage
    test: tuple[Any, Tensor]
    reports: dict[str, TrainingReport]
    accuracy: float
    untrained: float

    def ended(self, name: str) -> dict[str, str]:
        """How a training ended, as the first columns of a table."""
        report = self.reports[name]
        return {
            name: f"seed {self.seed}",
            "gradient norm": f"{report.gradient_norm:.0e}",
            "lowest eigenvalue": f"{report.lowest_eigenvalue:.1e}",
        }


def unknown_share(data: TwoStageTexts, vocabulary: Vocabulary) -> tuple[int, float]:
    """How many tokens the pretraining sentences have, and what share the vocabulary lacks."""
    ids = vocabulary.encode([text.tokens for text in data.pretrain])
    tokens = int((ids != PADDING).sum()) - 2 * len(ids)
    return tokens, float((ids == UNKNOWN).sum()) / tokens


def accuracy(stage: Stage, inputs: Any, labels: Tensor) -> float:
    """Share of the texts that a finetuned stage gets right."""
    with torch.no_grad():
        outputs = stage.outputs(stage.embedding_vector(), stage.head_vector(), inputs)
    return float((outputs.argmax(1) == labels).double().mean())


def two_stages(
    design: Design, data: TwoStageTexts, vocabulary: Vocabulary, seed: int, scored: int
) -> Stages:
    """Pretrain the language model, and train the classifier on it.

    Parameters
    ----------
    design
        Models and training.
    data, vocabulary
        The texts, and the entries of the softmax.
    seed
        Of the initial weights and the order of mini-batches.
    scored
        Test texts whose influences will be computed.

    Raises
    ------
    ValueError
        Weight decay has shrunk a part of the model to nothing, so that no sentence has influence.
    """
    size, device = design.size, design.device
    settings: dict[str, Any] = {"seed": seed, "dtype": torch.float64}
    inputs, labels = design.encoded(data.finetune), data.finetune_labels.to(device)
    test = design.encoded(data.test), data.test_labels.to(device)

    def classifier_on(embedding: nn.Module, l2: float) -> tuple[Stage, TrainingReport]:
        head = SentenceClassifier(
            size.projection, len(data.corpus.classes), design.hidden, size.layers, **settings
        ).to(device)
        stage = Stage(embedding, head, cross_entropy, (inputs, labels), **design.decay(head, l2))
        return stage, design.train(stage, seed, head_only=True)

    embedding = LanguageModel(size, smooth=design.smooth, **settings).to(device)
    predictor = TokenPredictor(size.projection, len(vocabulary), **settings).to(device)
    untrained = max(
        accuracy(classifier_on(embedding, factor * design.l2_finetune)[0], *test)
        for factor in (0.1, 1, 10)
    )
    targets = vocabulary.encode([text.tokens for text in data.pretrain]).to(device)
    sentences = design.encoded(data.pretrain), targets
    pretrain = Stage(embedding, predictor, language_loss, sentences, l2=design.l2_pretrain)
    reports = {"pretraining": design.train(pretrain, seed)}
    finetune, reports["finetuning"] = classifier_on(embedding, design.l2_finetune)
    for part, vector in (
        ("l2_pretrain", pretrain.embedding_vector()), ("l2_finetune", finetune.head_vector())
    ):  # fmt: skip
        if vector.abs().max() < 1e-3:
            raise ValueError(
                f"seed {seed}: weight decay has shrunk the model to nothing, so that no sentence "
                f"has influence; lower {part}"
            )
    few = map_leaves(lambda leaf: leaf[:scored], test)
    right = accuracy(finetune, *test)
    return Stages(seed, data, vocabulary, pretrain, finetune, few, reports, right, untrained)


def frequency_loss(targets: Tensor) -> float:
    """Loss of the best model that ignores the context, in nats a token."""
    counts = targets[targets != PADDING].bincount().double()
    shares = counts[counts > 0] / counts.sum()
    return -float(shares @ shares.log())


def pretraining_hessian(design: Design, stage: Stage) -> Any:
    """H_G; where the solver wants it dense, the matrix, from the checkpoint if it is there."""
    if design.solver != "dense":
        return Hessian(stage)
    kept, name = Checkpoint(design.checkpoint), f"hessian-{fingerprint(stage.identity())}"
    found = kept.get(name)
    if found is None:
        found = {"matrix": Hessian(stage).dense()}
        kept.put(name, found)
    return found["matrix"]


class _OnceForAll:
    """A solver with the Hessian that is there already, one for all dampings."""

    def __init__(self, method: Solver, hessian: Any) -> None:
        self.method, self.hessian = method, hessian

    def solve(self, operator: Any, b: Tensor, *, progress: bool = False) -> Any:
        """Solve with the kept Hessian in place of `operator`."""
        return self.method.solve(self.hessian, b, progress=progress)


def scores_of(
    design: Design, pretrain: Stage, hessian: Any, sensitivity: Tensor, damping: float
) -> Scores:
    """I of every sentence on every test text ``(m, T)``, at a damping of the pretraining's solve.

    Parameters
    ----------
    design
        Which solver.
    pretrain, hessian
        The stage, and its Hessian as :func:`pretraining_hessian` has it.
    sensitivity
        dq/dx at the pretrained model, a column a test text ``(p, T)``.
    damping
        λ.
    """
    solver = cast(Solver, _OnceForAll(design.solve(damping), hessian))
    return Chain([Optimum(pretrain, solver)], progress=False).pull_back(sensitivity)[0]


@dataclass(frozen=True)
class Scored:
    """The scores of a seed, and what simpler guesses need.

    Attributes
    ----------
    hessian
        Of pretraining.
    sensitivity
        dq/dx at the pretrained model, a column a test text ``(p, T)``.
    scores
        Of every sentence on every test text.
    gradient_norms
        Of the sentences ``(m,)``.
    gradient_dot
        Products of their gradients with the test texts' over the embedding ``(m, T)``.
    seconds
        That the scores took, the Hessian apart.
    """

    hessian: Any
    sensitivity: Tensor
    scores: Scores
    gradient_norms: Tensor
    gradient_dot: Tensor
    seconds: float

    @property
    def values(self) -> Tensor:
        """I ``(m, T)``."""
        return self.scores.values


def score(design: Design, stages: Stages, chain: Chain, damping: float) -> Scored:
    """Score every sentence for every test text.

    Parameters
    ----------
    design
        Which solver.
    stages, chain
        The trained stages, and the chain of both.
    damping
        λ of the pretraining's solve.
    """
    pretrain = stages.pretrain
    hessian = pretraining_hessian(design, pretrain)
    began = time.perf_counter()
    at_end = chain.test_gradients(stages.test, per_test=True)
    sensitivity = pretrain.parameters.put(chain.sensitivity(at_end), pretrain.shared)
    scores = scores_of(design, pretrain, hessian, sensitivity, damping)
    seconds = time.perf_counter() - began
    gradients = torch.cat(list(pretrain.per_example_gradients()))
    of_embedding = stages.finetune.split(at_end)[0]
    dot = pretrain.split(gradients.T)[0].T @ of_embedding
    return Scored(hessian, sensitivity, scores, gradients.norm(dim=1), dot, seconds)


def extreme_rows(stages: Stages, values: Tensor, shown: int) -> Iterator[dict[str, str]]:
    """The rows of the paper's Table 1: sentences of largest and smallest absolute influence.

    Parameters
    ----------
    stages
        Whose texts.
    values
        I ``(m, T)``.
    shown
        Test texts.
    """
    data = stages.data
    for column in range(shown):
        of_text = values[:, column]
        label = data.corpus.class_names[int(data.test_labels[column])]
        for which, index in (
            ("largest", of_text.abs().argmax()), ("smallest", of_text.abs().argmin())
        ):  # fmt: skip
            yield {
                "test text": f"{data.test[column].text} ({label})" if which == "largest" else "",
                "|I|": which,
                "I": f"{float(of_text[index]):+.1g}",
                "pretraining sentence": data.pretrain[int(index)].text,
            }


def wrapped_table(rows: Iterable[Mapping[str, str]]) -> str:
    """HTML of a table of long texts, whose lines break; the book's tables do not break lines."""

    def line(tag: str, texts: Iterable[str]) -> str:
        style = "style='white-space: normal'"
        return "<tr>" + "".join(f"<{tag} {style}>{html.escape(t)}</{tag}>" for t in texts) + "</tr>"

    listed = list(rows)
    body = "".join(line("td", row.values()) for row in listed)
    head = f"<thead>{line('th', listed[0])}</thead>"
    return f"<table class='dataframe'>{head}<tbody>{body}</tbody></table>"


def specificity(stages: Stages, scored: Scored) -> dict[str, float]:
    """What the ranking by |I| shares between test texts, and with properties of the sentence.

    Parameters
    ----------
    stages, scored
        Of a seed.

    Returns
    -------
    dict
        ``between texts``, the mean rank correlation of |I| for two test texts; ``on top``, how
        many sentences have the largest |I| of some text; and the rank correlation of the mean |I|
        with the length of the gradient, the number of tokens and the loss.
    """
    size = scored.values.abs().cpu().numpy()
    ranks = scipy.stats.rankdata(size, axis=0)
    between = np.corrcoef(ranks.T)[np.triu_indices(size.shape[1], 1)]
    mean = size.mean(1)
    properties = {
        "gradient": scored.gradient_norms.cpu(),
        "tokens": [len(text.tokens) for text in stages.data.pretrain],
        "loss": stages.pretrain.example_losses().cpu(),
    }
    return {
        "between texts": float(between.mean()),
        "on top": len(set(size.argmax(0).tolist())),
        **{
            name: float(scipy.stats.spearmanr(mean, values).statistic)
            for name, values in properties.items()
        },
    }


def groups_left_out(design: Design, sentences: int, seed: int) -> list[list[int]]:
    """Random groups of sentences, each a list of positions."""
    rng = np.random.default_rng(seed)
    size = round(design.share * sentences)
    return [rng.permutation(sentences)[:size].tolist() for _ in range(design.groups)]


def guesses(stages: Stages, scored: Scored) -> dict[str, Tensor]:
    """Predicted change of each test loss on removal of each sentence, ``(m, T)``, by method.

    Those of `METHODS` but influence are right at best but for a factor.
    """

    def pooled(stage: Stage, inputs: Any) -> Tensor:
        """What the classifier's first layer sees: the mixed layers, averaged over the tokens."""
        head = copy.deepcopy(stages.finetune.head)
        head.classify = nn.Identity()
        with torch.no_grad():
            return nn.functional.normalize(head(stage.embedding(inputs)))

    pretrain, tests = stages.pretrain, scored.values.shape[1]
    sentences = pooled(pretrain, cast(tuple, pretrain.data)[0])
    return {
        "influence": -scored.values / pretrain.size,
        "gradient_dot": scored.gradient_dot / pretrain.size,
        "embedding": sentences @ pooled(stages.finetune, stages.test[0]).T,
        "bm25": bm25(
            [text.tokens for text in stages.data.test[:tests]],
            [text.tokens for text in stages.data.pretrain],
        ),
    }


def mean_rank_correlation(predicted: NDArray, change: NDArray) -> float:
    """Spearman's correlation over the groups, averaged over the test texts; 0 of a constant.

    Parameters
    ----------
    predicted, change
        Of each test loss with each group, ``(R, T)``.
    """
    ranks = [scipy.stats.rankdata(values, axis=0) for values in (predicted, change)]
    x, y = (values - values.mean(0) for values in ranks)
    lengths = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return float(np.where(lengths > 0, (x * y).sum(0) / np.maximum(lengths, 1e-12), 0.0).mean())


def datamodeling_score(predicted: NDArray, change: NDArray, resamples: int = 1000) -> Estimate:
    """Linear datamodeling score; its interval resamples both the groups and the test texts.

    Parameters
    ----------
    predicted, change
        Of each test loss with each group, ``(R, T)``.
    resamples
        Of the bootstrap.
    """
    rng = np.random.default_rng(0)
    count, texts = change.shape
    found = []
    for _ in range(resamples):
        drawn_groups, drawn_texts = rng.integers(count, size=count), rng.integers(texts, size=texts)
        pick = np.ix_(drawn_groups, drawn_texts)
        found.append(mean_rank_correlation(predicted[pick], change[pick]))
    value = mean_rank_correlation(predicted, change)
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value))


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over the seeds with Student's interval, within ±1; of one seed, its own."""
    if len(estimates) == 1:
        return estimates[0]
    mean = mean_estimate([estimate.value for estimate in estimates])
    return Estimate(mean.value, max(mean.low, -1.0), min(mean.high, 1.0))


@dataclass(frozen=True)
class Held:
    """Predictions of a seed beside retrainings that take a share of the groups' weight.

    Attributes
    ----------
    truth
        The retrainings.
    change
        The true change of each test loss with each group, over the share ``(R, T)``.
    members
        Which sentences are in each group, ``(R, m)`` of 0 and 1.
    predicted
        The change by each method ``(R, T)``.
    seconds
        That the retrainings took.
    """

    truth: Retraining
    change: NDArray
    members: Tensor
    predicted: Mapping[str, NDArray]
    seconds: float

    @property
    def scores(self) -> dict[str, Estimate]:
        """The linear datamodeling score of each method."""
        return {
            name: datamodeling_score(values, self.change)
            for name, values in self.predicted.items()
        }  # fmt: skip

    def score_of(self, scores: Tensor) -> Estimate:
        """The linear datamodeling score of scores ``(m, T)`` of another damping."""
        return datamodeling_score((self.members @ -scores.cpu().double()).numpy(), self.change)

    @property
    def summed(self) -> tuple[NDArray, NDArray]:
        """The change of the summed test loss with each group: by influence, and the truth."""
        return self.predicted["influence"].sum(1), self.change.sum(1)

    @property
    def agreement(self) -> Agreement:
        """Of these two."""
        return compare(*self.summed)

    @property
    def ended(self) -> float:
        """Share of the retrainings that converged, that without any removal among them."""
        converged = self.truth.converged
        return (float(converged.sum()) + self.truth.converged_before) / (len(converged) + 1)


def hold(
    stages: Stages,
    scored: Scored,
    groups: Sequence[Sequence[int]],
    truth: Retraining,
    fraction: float,
    seconds: float,
) -> Held:
    """Hold what each method predicts against retrainings.

    Parameters
    ----------
    stages, scored
        Of a seed.
    groups
        Positions of sentences.
    truth
        Both stages trained again, one retraining a group.
    fraction
        Share of the groups' weight that was taken away; 1: they were left out.
    seconds
        That the retrainings took.
    """
    members = torch.zeros(len(groups), stages.pretrain.size, dtype=torch.float64)
    for row, group in enumerate(groups):
        members[row, list(group)] = 1
    predicted = {
        name: (members @ guess.cpu().double()).numpy()
        for name, guess in guesses(stages, scored).items()
    }
    change = truth.per_test_change.cpu().numpy() / fraction
    return Held(truth, change, members, predicted, seconds)


def beside_column(data: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A column of the comparison with the paper and other records.

    Parameters
    ----------
    data
        What the data are called.
    values
        The values of a record.
    """
    claims, seeds = values["claims"], values["seeds"]

    def mean_of(name: str) -> str:
        return f"{np.mean([seed[name] for seed in seeds]):.2f}"

    worst = max(seed["retraining_gradient_norm"] for seed in seeds)
    titles = METHODS | {f"{name}_part": f"{title}, part" for name, title in METHODS.items()}
    return {
        "data": data,
        "embedding": f"{values['sizes']['p_embedding']:,d}",
        "sentences": values["sizes"]["m"],
        "seeds": len(seeds),
        "test accuracy": mean_of("accuracy"),
        "test accuracy, untrained": mean_of("accuracy_untrained"),
        "gradient norm after retraining, at worst": f"{worst:.0e}",
        "largest |I|": f"{claims['nlp_max_abs']['value']:.2g}",
        "smallest |I|": f"{claims['nlp_min_abs']['value']:.1g}",
        "forward passes a score": f"{claims['nlp_forward_passes_a_sentence']['value']:.1f}",
        **{
            title: "{value:.2f} [{low:.2f}, {high:.2f}]".format(**claims[f"nlp_lds_{name}"])
            for name, title in titles.items()
            if f"nlp_lds_{name}" in claims
        },
    }
