"""The settings of the benchmark: data, models and trainings of two stages, as people use them.

A setting fixes the examples, so that its functionals are the same for every seed; a seed draws the
initial weights of both stages and the order of their batches. Seeds from :data:`CHOICE` on take
another draw of examples from the same pool, of which the digits have few: most of their pretraining
examples are in both draws. The sizes and rates below, and the settings of every method, were chosen
on those seeds alone; ``README.md`` says how.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.links import Optimum, Proximal, Unrolled
from msif_lib.study.data.datasets import two_stages
from msif_lib.study.data.texts import two_stage_texts
from msif_lib.study.models.language import Vocabulary
from msif_lib.study.models.networks import feature_count, seeded
from msif_lib.training import SGD, AdamW, descend, train

#: Seeds from here on are those of choices: another draw of examples, never reported.
CHOICE = 100
# Shares of the pretraining examples that are left out.
SHARES = (0.01, 0.05, 0.2, 0.5)


class Data(NamedTuple):
    """The examples of both stages; accuracy is that of `test` and `validation`, never trained on.

    Attributes
    ----------
    pretrain, finetune
        Inputs and labels.
    functionals
        The test examples whose losses are the functionals, T of them.
    validation
        Examples of the finetuning task by which accuracy is measured.
    """

    pretrain: tuple[Any, Tensor]
    finetune: tuple[Any, Tensor]
    functionals: tuple[Any, Tensor]
    validation: tuple[Any, Tensor]


class Recipe(NamedTuple):
    """How a stage is trained: optimiser, epochs, batch size, and l2 of its objective."""

    optimiser: SGD | AdamW
    epochs: int
    batch_size: int
    l2: float


@dataclass(frozen=True)
class Setting:
    """What a problem is made of, for every seed.

    Attributes
    ----------
    name
        As on the command line.
    says
        What it is, in words.
    data
        Makes the examples from the seed of their draw.
    embedding
        Makes the embedding, for the shape of the inputs.
    recipes
        Of pretraining and finetuning; None: both are trained to an optimum, the paper's case.
    seeds
        How many are reported.
    frozen
        Whether finetuning keeps the embedding.
    alpha
        Of the proximal term, at an optimum.
    l2
        Of both objectives, at an optimum.
    other_seeds
        R, of the mean over other seeds; 0: only trainings from the same seed are the truth.
    at_once
        Models that are retrained together, which changes speed alone.
    patience
        The effort of methods that it can bear; 2: every method.
    picked
        Whether its training was picked by hand with the exact row's score on seed 100 in sight.
    """

    name: str
    says: str
    data: Callable[[int], Data]
    embedding: Callable[[], nn.Module]
    recipes: tuple[Recipe, Recipe] | None
    seeds: int
    frozen: bool = False
    alpha: float = 0.0
    l2: float = 0.0
    other_seeds: int = 0
    at_once: int = 32
    patience: int = 0
    picked: bool = False


@dataclass(frozen=True)
class Problem:
    """A setting trained with one seed: what a method is given.

    Attributes
    ----------
    setting, seed
        Of what, from which seed.
    chain
        Both stages and how they were trained.
    data
        The examples.
    accuracy
        Of the pretrained model on its own examples, of the finetuned one on `validation`.
    seconds
        Processor time of both trainings: the unit of every cost.
    """

    setting: Setting
    seed: int
    chain: Chain
    data: Data
    accuracy: tuple[float, float]
    seconds: float

    @property
    def pretrain(self) -> Stage:
        """The pretraining stage, at the end of its training."""
        return self.chain.links[0].stage

    @property
    def finetune(self) -> Stage:
        """The finetuning stage, at the end of its training."""
        return self.chain.links[1].stage

    @property
    def size(self) -> int:
        """m, the number of pretraining examples."""
        return self.pretrain.size

    @property
    def functionals(self) -> int:
        """T, the number of functionals."""
        return len(self.data.functionals[1])


# --- examples ------------------------------------------------------------------------------------

_VALIDATION = 1000


@cache
def images(
    name: str,
    classes: tuple[tuple[int, ...], tuple[int, ...]],
    sizes: tuple[int, int],
    shrink: int,
    flat: bool,
    seed: int,
    functionals: int = 50,
) -> Data:
    """Images of two groups of classes, each mean over `shrink` x `shrink` pixels."""
    kept = None if name == "digits" else functionals + _VALIDATION
    drawn = two_stages(name, *classes, *sizes, kept, seed)

    def part(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs = F.avg_pool2d(pair[0], shrink) if shrink > 1 else pair[0]
        return inputs.flatten(1) if flat else inputs, pair[1]

    tested, labels = part(drawn.test)
    return Data(
        part(drawn.pretrain),
        part(drawn.finetune),
        (tested[:functionals], labels[:functionals]),
        (tested[functionals:], labels[functionals:]),
    )


@cache
def sentences(
    names: str, sizes: tuple[int, int], vocabulary: int, seed: int, functionals: int = 50
) -> Data:
    """Sentences whose words are told from their neighbours, then texts of two classes.

    An input is the words' numbers ``(B, L)`` and how they are mixed: for each place the mean over
    two neighbours to the left and to the right ``(B, L, L)``, for a text the mean over all its
    words ``(B, 1, L)``.
    """
    drawn = two_stage_texts(
        names, *sizes, functionals + 200, longest=12, seed=seed, finetune_longest=30
    )
    read = Vocabulary([text.tokens for text in (*drawn.pretrain, *drawn.finetune)], vocabulary)

    def numbers(texts: Any) -> tuple[Tensor, Tensor]:
        words = read.encode([text.tokens for text in texts])
        return words, (words != 0).double()

    words, there = numbers(drawn.pretrain)
    place = torch.arange(words.shape[1])
    away = (place[:, None] - place).abs()
    near = ((away > 0) & (away <= 2)) * there[:, None, :]
    mixing = near / near.sum(2, keepdim=True).clamp(min=1)
    # Padding, starts and ends, and what the vocabulary has not, are no words to be told.
    told = torch.where(words > 3, words, -100)

    def text(texts: Any, labels: Tensor) -> tuple[Any, Tensor]:
        of, here = numbers(texts)
        return (of, (here / here.sum(1, keepdim=True))[:, None, :]), labels

    tested, labels = drawn.test, drawn.test_labels
    return Data(
        ((words, mixing), told),
        text(drawn.finetune, drawn.finetune_labels),
        text(tested[:functionals], labels[:functionals]),
        text(tested[functionals:], labels[functionals:]),
    )


# --- models --------------------------------------------------------------------------------------


def perceptron(*widths: int) -> nn.Module:
    """Layers with tanh after each."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers)


def convolutional(colours: int, *channels: int, groups: int = 4) -> nn.Module:
    """Convolutions, each with GroupNorm, GELU and a mean over 2 x 2."""
    layers: list[nn.Module] = []
    for given, made in zip((colours, *channels), channels):
        layers += [
            nn.Conv2d(given, made, 3, padding=1), nn.GroupNorm(groups, made), nn.GELU(),
            nn.AvgPool2d(2),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.Flatten())


class Words(nn.Module):
    """Vectors of words, mixed, then one layer with tanh: ``(B, K, width)`` of K mixtures."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.vectors, self.layer = nn.Embedding(vocabulary, length), nn.Linear(length, width)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Mix the vectors of the words ``(B, L)`` by ``(B, K, L)``."""
        words, mixing = inputs
        return torch.tanh(self.layer(mixing @ self.vectors(words)))


class Told(nn.Module):
    """Logits of words at every place, ``(B, V, L)``, or of the classes of a text, ``(B, C)``."""

    def __init__(self, width: int, classes: int, places: bool) -> None:
        super().__init__()
        self.layer, self.places = nn.Linear(width, classes), places

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features ``(B, K, width)``; K = 1 where a text has one."""
        logits = self.layer(features)
        return logits.transpose(1, 2) if self.places else logits[:, 0]


def _head(embedding: nn.Module, inputs: Any, labels: Tensor) -> nn.Module:
    """A linear head on the embedding's features."""
    if isinstance(embedding, Words):
        width, places = embedding.layer.out_features, labels.dim() > 1
        classes = embedding.vectors.num_embeddings if places else int(labels.max()) + 1
        return Told(width, classes, places)
    return nn.Linear(feature_count(embedding, inputs.shape[1:]), int(labels.max()) + 1)


# --- trainings -----------------------------------------------------------------------------------


def _accuracy(stage: Stage, pair: tuple[Any, Tensor]) -> float:
    inputs, labels = pair
    with torch.no_grad():
        found = stage.model(inputs).argmax(1)
    counted = labels >= 0
    return float((found == labels)[counted].double().mean())


def problem(of: str | Setting, seed: int) -> Problem:
    """Train both stages of a setting, given by its name or itself.

    Raises
    ------
    ValueError
        No setting is called so.
    """
    if isinstance(of, str) and of not in SETTINGS:
        raise ValueError(f"there is no setting {of!r}; there are {', '.join(SETTINGS)}")
    setting = SETTINGS[of] if isinstance(of, str) else of
    data = setting.data(int(seed >= CHOICE))
    with seeded(seed):
        embedding = setting.embedding().double()
        heads = [_head(embedding, *pair).double() for pair in (data.pretrain, data.finetune)]
    l2 = [recipe.l2 for recipe in setting.recipes] if setting.recipes else [setting.l2] * 2
    began = time.process_time()
    pretrain = Stage(embedding, heads[0], cross_entropy, data.pretrain, l2[0], check="data")
    first = _trained(setting, 0, pretrain, seed)
    tuned = copy.deepcopy(embedding)
    if setting.frozen:
        tuned.requires_grad_(False)
    finetune = Stage(tuned, heads[1], cross_entropy, data.finetune, l2[1], check="data")
    second = _trained(setting, 1, finetune, seed)
    seconds = time.process_time() - began
    accuracy = _accuracy(pretrain, data.pretrain), _accuracy(finetune, data.validation)
    chain = Chain([first, second], progress=False)
    return Problem(setting, seed, chain, data, accuracy, seconds)


def _trained(setting: Setting, number: int, stage: Stage, seed: int) -> Any:
    """The link of a stage, which is trained in place."""
    if setting.recipes is None:
        if number == 0:
            train(stage, 1e-9, seed=seed)
            return Optimum(stage)
        handed = stage.split(stage.vector())[0]
        train(stage, 1e-9, seed=seed, towards=handed, alpha=setting.alpha)
        return Proximal(stage, setting.alpha)
    optimiser, epochs, batch_size, _ = setting.recipes[number]
    return Unrolled(
        stage, descend(stage, optimiser, epochs, batch_size, 1000 * number + seed, progress=False)
    )


# --- the settings --------------------------------------------------------------------------------

_DIGITS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
_ANIMALS = ((2, 6), (0, 1, 3, 4, 5, 7, 8, 9))
_VEHICLES = ((0, 1, 8, 9), (2, 3, 4, 5, 6, 7))


def _of_images(name: str, classes: Any, sizes: Any, shrink: int = 1, flat: bool = True) -> Any:
    return partial(images, name, classes, sizes, shrink, flat)


_OF_DIGITS = _of_images("digits", _DIGITS, (600, 300))
_OF_MNIST = _of_images("mnist", _DIGITS, (1000, 300), 2)
_SLOW, _SGD, _FAST = (SGD(rate, momentum=0.9) for rate in (0.02, 0.05, 0.1))


def _adamw(rate: float) -> AdamW:
    """With an ε that smooths training; 1e-8 is torch's."""
    return AdamW(rate, eps=1e-4)


#: Every setting by its name.
SETTINGS = {
    one.name: one
    for one in (
        Setting(
            "digits-sgd",
            "digits 0-4, then 5-9; perceptron, SGD with momentum",
            _OF_DIGITS,
            partial(perceptron, 64, 32, 16),
            (Recipe(_SGD, 12, 150, 5e-3), Recipe(_SGD, 20, 150, 5e-3)),
            seeds=5,
            patience=2,
            other_seeds=4,
            picked=True,
        ),
        Setting(
            "digits-adamw",
            "digits 0-4, then 5-9; perceptron, AdamW with torch's epsilon",
            _OF_DIGITS,
            partial(perceptron, 64, 32, 16),
            (Recipe(AdamW(3e-3), 12, 150, 0.0), Recipe(AdamW(3e-3), 20, 150, 0.0)),
            seeds=5,
            patience=2,
        ),
        Setting(
            "digits-optimum",
            "digits 0-4, then 5-9; perceptron, both stages at an optimum, with a proximal term",
            _OF_DIGITS,
            partial(perceptron, 64, 32, 16),
            None,
            seeds=5,
            patience=2,
            alpha=1e-2,
            l2=1e-2,
            picked=True,
        ),
        Setting(
            "mnist-sgd",
            "MNIST 0-4, then 5-9; perceptron, SGD with momentum",
            _OF_MNIST,
            partial(perceptron, 196, 64, 32),
            (Recipe(_SGD, 12, 250, 5e-3), Recipe(_SGD, 20, 150, 5e-3)),
            seeds=5,
            patience=1,
            other_seeds=4,
            picked=True,
        ),
        Setting(
            "mnist-rough",
            "MNIST 0-4, then 5-9; a narrower perceptron, at twice the rate, in batches of 100, "
            "with less decay",
            _OF_MNIST,
            partial(perceptron, 196, 28, 16),
            (Recipe(_FAST, 10, 100, 1e-4), Recipe(_FAST, 13, 100, 1e-4)),
            seeds=5,
        ),
        Setting(
            "mnist-adamw",
            "MNIST 0-4, then 5-9; perceptron, AdamW",
            _OF_MNIST,
            partial(perceptron, 196, 64, 32),
            (Recipe(_adamw(1e-3), 15, 250, 0.0), Recipe(_adamw(2e-3), 20, 150, 0.0)),
            seeds=5,
            patience=1,
            picked=True,
        ),
        Setting(
            "mnist-cnn",
            "MNIST 0-4, then 5-9; convolutions with GroupNorm, AdamW",
            _of_images("mnist", _DIGITS, (1000, 300), 2, False),
            partial(convolutional, 1, 8, 24),
            (Recipe(_adamw(3e-3), 8, 250, 0.0), Recipe(_adamw(3e-3), 10, 150, 0.0)),
            seeds=3,
            at_once=4,
        ),
        Setting(
            "cifar-frozen",
            "CIFAR-10 bird and frog, then the other eight; perceptron, SGD with momentum, the "
            "embedding fixed in finetuning",
            _of_images("cifar10", _ANIMALS, (1000, 1000), 2),
            partial(perceptron, 768, 40, 32),
            (Recipe(_SLOW, 12, 250, 5e-3), Recipe(_SGD, 20, 250, 5e-3)),
            seeds=3,
            frozen=True,
            picked=True,
        ),
        Setting(
            "cifar-adamw",
            "CIFAR-10's four vehicles, then the six animals; perceptron, AdamW",
            _of_images("cifar10", _VEHICLES, (1000, 1000), 2),
            partial(perceptron, 768, 40, 32),
            (Recipe(_adamw(1e-3), 12, 250, 0.0), Recipe(_adamw(1e-3), 12, 250, 0.0)),
            seeds=3,
            picked=True,
        ),
        Setting(
            "words-adamw",
            "One Billion Word, words from their neighbours, then the sentiment of GOP tweets; "
            "vectors of words and one layer, AdamW",
            partial(sentences, "gop", (600, 800), 250),
            partial(Words, 250, 16, 24),
            (Recipe(_adamw(1e-2), 5, 100, 0.0), Recipe(_adamw(1e-2), 5, 100, 0.0)),
            seeds=3,
            at_once=4,
        ),
    )
}
