"""Whether a stage still is what it was when something of it was kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from msif_lib.support.data import Examples, leaves


class Stage(Protocol):
    """What is looked at."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    l2: float
    regularizer: Callable[[dict[str, Tensor]], Tensor] | None
    trained: tuple[int, ...]
    examples: Examples
    weights: Tensor

    def vector(self) -> Tensor:
        """All parameters ``(p,)``, a copy."""
        ...


class Seen:
    """What the derivatives of a stage depended on when it was looked at.

    Parameters and buffers are compared by value, data and weights by torch's counters of changes,
    which see whatever torch has written into them, and functions by which they are.

    Parameters
    ----------
    stage
        The stage.
    parameters
        Whether its parameters are part of it.
    """

    def __init__(self, stage: Stage, parameters: bool = True) -> None:
        self._parameters = parameters
        self._values = [value.clone() for value in self._values_of(stage)]
        self._things, self._counts = _things_of(stage), _counts_of(stage)

    def holds(self, stage: Stage) -> bool:
        """Whether all of it is as it was."""
        values, things = self._values_of(stage), _things_of(stage)
        return (
            len(values) == len(self._values)
            and all(map(torch.equal, values, self._values))
            and all(one is other for one, other in zip(things, self._things, strict=True))
            and _counts_of(stage) == self._counts
        )

    def require(self, stage: Stage, name: str) -> None:
        """Refuse a stage that changed since `name` was made of it.

        Raises
        ------
        ValueError
            It did.
        """
        if not self.holds(stage):
            raise ValueError(
                f"the stage's data, weights, buffers, loss, l2 or regularizer changed since {name} "
                "was made of it, which would mix the two; make it again"
            )

    def _values_of(self, stage: Stage) -> list[Tensor]:
        buffers = [buffer.detach() for buffer in stage.model.buffers()]
        return [stage.vector(), *buffers] if self._parameters else buffers


def _data_of(stage: Stage) -> list[Tensor]:
    examples = stage.examples
    return [stage.weights, *(leaves(examples.tensors()) if examples.in_memory else [])]


def _things_of(stage: Stage) -> list[object]:
    return [stage.loss, stage.regularizer, stage.examples, *_data_of(stage)]


def _counts_of(stage: Stage) -> list[object]:
    counts = [None if one.is_inference() else one._version for one in _data_of(stage)]
    return [stage.l2, stage.trained, *counts]
