"""Tasks cut out of one draw of images: other classes, or fewer examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from msif_lib.study.data.datasets import TwoStageData


def balanced(labels: Tensor, size: int | None = None) -> Tensor:
    """Positions of `size` examples, the classes as equally many as they can be.

    The examples of a class come in their order, so that a smaller size gives a subset of what a
    larger one gives.

    Parameters
    ----------
    labels : Tensor
        Class numbers, shape (N,).
    size : int, optional
        How many; by default all.

    Returns
    -------
    Tensor
        Positions, shape (size,).

    Raises
    ------
    ValueError
        If there are fewer examples than that, or the size is not positive.
    """
    size = len(labels) if size is None else size
    if not 0 < size <= len(labels):
        raise ValueError(f"size must lie in 1..{len(labels)}, the number of examples, not {size}")
    column = pd.Series(labels.cpu().numpy())
    turn = column.groupby(column).cumcount().to_numpy()
    return torch.from_numpy(np.argsort(turn, kind="stable")[:size])


def restrict(
    data: TwoStageData,
    pretrain_classes: Sequence[int],
    finetune_classes: Sequence[int],
    pretrain_size: int | None = None,
    finetune_size: int | None = None,
    test_size: int | None = None,
) -> TwoStageData:
    """Keep some classes of a draw.

    Two tasks cut out of the same draw share the images of the classes that they share, and the
    images of pretraining stay apart from those of finetuning.

    Parameters
    ----------
    data : TwoStageData
        The draw, in which every class asked for has to occur.
    pretrain_classes, finetune_classes : sequence of int
        Class numbers in the data set.
    pretrain_size, finetune_size, test_size : int, optional
        Number of examples, balanced over the classes; by default all that there are.

    Returns
    -------
    TwoStageData
        The kept examples, labelled from 0 in the order in which the classes are named.

    Raises
    ------
    ValueError
        If a class is not in the draw, fewer than two are asked for or one is asked for twice, or
        a size asks for more examples than there are.
    """
    parts: dict[str, object] = {}
    for stage, classes, size in (
        ("pretrain", pretrain_classes, pretrain_size),
        ("finetune", finetune_classes, finetune_size),
        ("test", finetune_classes, test_size),
    ):
        wanted = tuple(int(label) for label in classes)
        original: Tensor = getattr(data, f"{stage}_original")
        missing = sorted(set(wanted) - set(original.tolist()))
        if missing or len(wanted) < 2 or len(set(wanted)) < len(wanted):
            raise ValueError(
                f"the classes of the {stage} set must be two or more different ones of "
                f"{sorted(set(original.tolist()))}, not {wanted}"
            )
        among = torch.isin(original, torch.tensor(wanted)).nonzero()[:, 0]
        try:
            chosen = among[balanced(original[among], size)]
        except ValueError as error:
            raise ValueError(f"{stage} set of the classes {wanted}: {error}") from error
        labels = torch.tensor([wanted.index(int(label)) for label in original[chosen]])
        parts[stage] = getattr(data, stage)[0][chosen], labels
        parts[f"{stage}_original"] = original[chosen]
        parts[f"{stage}_indices"] = getattr(data, f"{stage}_indices")[chosen]
    return dataclasses.replace(
        data,
        **parts,  # type: ignore[arg-type]
        pretrain_classes=tuple(int(label) for label in pretrain_classes),
        finetune_classes=tuple(int(label) for label in finetune_classes),
    )
