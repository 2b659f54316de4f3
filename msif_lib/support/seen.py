"""Whether a stage still is what it was when an operator was made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from msif_lib.support.data import Examples, leaves


class StageLike(Protocol):
    """What is looked at."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    l2: float
    regularizer: Callable[[dict[str, Tensor]], Tensor] | None
    examples: Examples
    weights: Tensor


class Seen:
    """What the derivatives of a stage depended on, beside its parameters, when it was looked at.

    For little, as each product asks: buffers are compared by value, data and weights by torch's
    counters of changes, functions by which they are. A whole call of a chain is worth more: there
    what code computes is compared (:func:`msif_lib.support.identity.identity_of`).

    Parameters
    ----------
    stage
        The stage.
    """

    def __init__(self, stage: StageLike) -> None:
        self._buffers = [buffer.clone() for buffer in _buffers_of(stage)]
        self._things, self._counts = _things_of(stage), _counts_of(stage)

    def require(self, stage: StageLike, name: str) -> None:
        """Refuse a stage that changed since `name` was made of it.

        Raises
        ------
        ValueError
            It did.
        """
        buffers, things = _buffers_of(stage), _things_of(stage)
        if not (
            len(buffers) == len(self._buffers)
            and all(map(torch.equal, buffers, self._buffers))
            and all(one is other for one, other in zip(things, self._things, strict=True))
            and _counts_of(stage) == self._counts
        ):
            raise ValueError(
                f"the stage's data, weights, buffers, loss, l2 or regularizer changed since {name} "
                "was made of it, which would mix the two; make it again"
            )


def _buffers_of(stage: StageLike) -> list[Tensor]:
    modules = (one for one in (stage.model, stage.loss) if isinstance(one, nn.Module))
    return [buffer.detach() for module in modules for buffer in module.buffers()]


def _data_of(stage: StageLike) -> list[Tensor]:
    examples = stage.examples
    return [stage.weights, *(leaves(examples.tensors()) if examples.in_memory else [])]


def _things_of(stage: StageLike) -> list[object]:
    return [stage.loss, stage.regularizer, stage.examples, *_data_of(stage)]


def _counts_of(stage: StageLike) -> list[object]:
    return [stage.l2, *(None if one.is_inference() else one._version for one in _data_of(stage))]
