"""Whether losses depend on the random numbers that their evaluation draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from msif_lib.support.chance import Generators
from msif_lib.support.checks import innermost, returned
from msif_lib.support.data import Batch, map_leaves
from msif_lib.support.model import Model

# Evaluations by which what happens at 2 % shows, but for once in 20,000, from whatever generator.
# Where it is a Mersenne twister's, whatever its rate shows for certain: see `Generators.stir`.
_EVALUATIONS = 500
# Batches among which these are shared out, at most.
_BATCHES = 8
# Roundings by which a sum in another order may differ.
_ROUNDINGS = 1000


class Chance:
    """Batches in whose evaluation a generator moved, evaluated again from other states.

    That one moved does not mean that losses depend on it: code may seed it, multiply what it draws
    by zero, or leave something out at a rate of zero.

    Parameters
    ----------
    model
        The model, at its parameters, and its loss.
    generators
        Those that it may draw from.
    copied
        Makes the copies of a batch's tensors that are evaluated.
    """

    def __init__(
        self, model: Model, generators: Generators, copied: Callable[[Tensor], Tensor]
    ) -> None:
        self._model, self._generators, self._copied = model, generators, copied
        self._parts = model.parameters.views(model.vector())
        self._choice = random.Random(0)
        self._drawing: list[tuple[Batch, list[Any], Tensor]] = []

    def look_at(self, batch: Batch, began: list[Any]) -> None:
        """Evaluate a batch once more, in whose evaluation generators moved from these states.

        Raises
        ------
        ValueError
            Its losses are others; the message names the module that makes them so.
        """
        ended = self._generators.states()
        self._compare(batch, began, self._from(began, batch))
        self._model.held.draws()
        if self._generators.states() == ended or len(self._drawing) == _BATCHES:
            return  # it seeds them by itself: what it draws is the same
        batch = self._smallest(batch, began)
        self._drawing.append((batch, began, self._from(began, batch)))

    def draw_often(self) -> None:
        """Evaluate those again until what happens rarely has happened.

        Raises
        ------
        ValueError
            As above.
        """
        for number in range(_EVALUATIONS if self._drawing else 0):
            self._compare(*self._drawing[number % len(self._drawing)])

    def _smallest(self, batch: Batch, began: list[Any]) -> Batch:
        """One example, where that draws too."""
        inputs, targets = map_leaves(itemgetter(slice(0, 1)), batch)
        self._generators.put(began)
        before = self._generators.states()
        self._losses((inputs, targets))
        return batch if self._generators.states() == before else (inputs, targets)

    def _losses(self, batch: Batch) -> Tensor:
        return self._model.batch_losses(self._parts, *map_leaves(self._copied, batch))

    def _from(self, state: list[Any], batch: Batch) -> Tensor:
        self._generators.put(state)
        return self._losses(batch)

    def _compare(self, batch: Batch, began: list[Any], losses: Tensor) -> None:
        self._generators.stir(self._choice)
        stirred = self._generators.get()
        if not _same(losses, self._losses(batch)):
            self._refuse(batch, began, stirred)

    def _refuse(self, batch: Batch, *states: list[Any]) -> NoReturn:
        model = self._model.model
        found: list[list[tuple[str, Tensor]]] = []
        outputs = list[Any]()
        for state in states:
            inputs, _ = map_leaves(self._copied, batch)
            self._generators.put(state)

            def evaluate(inputs: Any = inputs) -> None:
                outputs.append(self._model.batch_outputs(self._parts, inputs))

            found.append(returned(model, evaluate))
        who = next(
            (name or "the model" for (name, a), (_, b) in zip(*found) if not _same(a, b)), None
        )
        if who is None and all(isinstance(one, Tensor) for one in outputs):
            who = "the loss"  # of equal outputs
        if who is None:
            who = innermost(model, evaluate, self._generators.states) or "the loss"
        raise ValueError(
            f"the model or loss depends on chance: random numbers change what {who} "
            "returns; switch them off (module.eval())"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return True
    if one.shape != other.shape or not (one.is_floating_point() or one.is_complex()):
        return False
    eps = _ROUNDINGS * torch.finfo(one.dtype).eps
    size = float(one.abs().nan_to_num(posinf=0.0).mean()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=eps, atol=eps * size, equal_nan=True)
