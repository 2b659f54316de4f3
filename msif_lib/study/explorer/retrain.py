"""Both stages trained again in the reader's browser, with other weights of pretraining images.

:func:`collect` puts the data, the start and the batches of two recorded trainings together with the
scores that a chain gave them, and :func:`fragment` wraps them into HTML. Its script takes the same
steps in double precision: a hundred lines in place of TensorFlow.js, whose single precision cannot
take the derivative of a training and whose step took nine times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msif_lib.influence import Chain
from msif_lib.links import Unrolled
from msif_lib.optimisers import SGD
from msif_lib.stage import cross_entropy
from msif_lib.study.data.datasets import TwoStageData
from msif_lib.study.explorer.page import (
    assemble,
    pictures,
    rounded,
    static_image,
    static_table,
)

_STATIC_IMAGES = 6  # in the table for readers without scripts
_DIGITS = 6  # significant, of scores


def collect(data: TwoStageData, chain: Chain, scores: Tensor) -> dict[str, Any]:
    """What the page needs to train again, as values for JSON.

    Parameters
    ----------
    data
        Images and classes.
    chain
        Two ``Unrolled`` links: an embedding of one layer of tanh units under a linear head, each
        stage trained whole by SGD with or without momentum.
    scores
        I_i of every pretraining image on the loss of each of the first T test images, ``(m, T)``.

    Returns
    -------
    dict
        ``levels``, the input that each value of a pixel becomes; ``hidden``; ``embedding``, its
        parameters at the start; ``stages`` with pixels, labels, the head at the start, weight
        decay, momentum, and a rate and a batch a step; ``pretrain`` and ``test`` with their images
        and digits; ``scores``.

    Raises
    ------
    ValueError
        The chain is of another kind, or the scores are not those of its first stage.
    """
    stages = []
    drawn = (data.pretrain[1], data.pretrain_indices), (data.finetune[1], data.finetune_indices)
    for link, (labels, indices) in zip(chain.links, drawn):
        if len(chain.links) != 2 or not isinstance(link, Unrolled) or not _can_take(link):
            raise ValueError(
                "the page can take two Unrolled links: one layer of tanh units, a linear head, "
                "cross-entropy, weights of 1, all of it trained by SGD(lr, momentum)"
            )
        rule = link.path.optimiser
        assert isinstance(rule, SGD)  # so it was found
        start, size = link.path.start, link.stage.embedding_vector().numel()
        stages.append(
            {
                "pixels": data.images.train_pixels[indices].flatten(1).tolist(),
                "labels": labels.tolist(),
                "head": start[size:].tolist(),
                "l2": link.stage.l2,
                "momentum": rule.momentum,
                "rates": list(link.path.learning_rates),
                "batches": [batch.tolist() for batch in link.path.batches],
            }
        )
    first = chain.links[0]
    tests = scores.shape[-1]
    if tuple(scores.shape) != (first.stage.size, tests) or not 1 <= tests <= len(data.test[1]):
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, not (m, T) with m = {first.stage.size}"
        )
    seen = data.images.train_pixels[data.pretrain_indices]
    values = torch.arange(data.images.white + 1)[:, None, None, None]
    levels = data.images.normalise(values, first.stage.dtype).flatten()
    test = data.test_indices[:tests]
    return {
        "levels": levels.tolist(),
        "hidden": first.stage.head.in_features,
        "embedding": first.path.start[: first.stage.embedding_vector().numel()].tolist(),
        "stages": stages,
        "pretrain": {"images": pictures(data, seen), "digits": data.pretrain_original.tolist()},
        "test": {
            "images": pictures(data, data.images.test_pixels[test]),
            "digits": data.test_original[:tests].tolist(),
            "pixels": data.images.test_pixels[test].flatten(1).tolist(),
            "labels": data.test[1][:tests].tolist(),
        },
        "scores": rounded(scores, _DIGITS),
    }


def fragment(values: Mapping[str, Any], changes: Tensor) -> str:
    """The page's part as HTML.

    Parameters
    ----------
    values
        As :func:`collect` gives them.
    changes
        The change of every test loss when a pretraining image is left out and both stages are
        trained again, ``(m, T)``; the table for readers without scripts shows some.

    Returns
    -------
    str
        Style, a table for readers without scripts, the values as JSON, and the scripts.
    """
    pretrain, size = values["pretrain"], len(values["scores"])
    predicted = [-sum(row) / len(row) / size for row in values["scores"]]
    found = changes.mean(1).tolist()
    order = sorted(range(size), key=lambda i: -abs(predicted[i]))[:_STATIC_IMAGES]
    rows = [
        [
            f"{static_image(pretrain['images'][i], f'pretraining image {i}')} "
            f"a {pretrain['digits'][i]}",
            f"{predicted[i]:+.2g}",
            f"{found[i]:+.2g}",
        ]
        for i in order
    ]
    caption = "Change of the mean test loss without an image. Training here needs JavaScript."
    table = static_table(caption, ("left out", "predicted", "true"), rows)
    return assemble("retrain", ("training.js", "retrain.js"), table, values)


def _can_take(link: Unrolled) -> bool:
    """Whether the script knows this model and these steps."""
    stage, optimiser = link.stage, link.path.optimiser
    layers = [type(layer) for layer in [*stage.embedding.children(), stage.head]]
    return (
        layers == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear]
        and stage.loss is cross_entropy
        and stage.regularizer is None
        and stage.trained == stage.parameters.all
        and bool((stage.weights == 1).all())
        and link.path.augment is None
        and isinstance(optimiser, SGD)
        and optimiser == SGD(optimiser.lr, optimiser.momentum)
    )
