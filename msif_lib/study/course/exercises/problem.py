"""What an exercise and its problems consist of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Endless(Exception):
    """A solver asked for more products than any reasonable one needs."""


@dataclass(frozen=True)
class Problem:
    """Calls of a function with known results.

    Attributes
    ----------
    calls
        The positional arguments of each call.
    truth
        The right results of all calls, one after the other.
    each
        What one number of a result belongs to, with its preposition.
    wrong
        By kind of mistake, the results it leads to.
    factors
        By kind of mistake, the factor it puts on the right results.
    shapes
        Wrong shapes that are common, and what a result of that shape probably is.
    """

    calls: Sequence[Sequence[Any]]
    truth: Array
    each: str
    wrong: dict[str, Array] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    shapes: dict[tuple[int, ...], str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Numbers in the result of one call."""
        return len(self.truth) // len(self.calls)


@dataclass(frozen=True)
class Outcome:
    """What a judge of its own says: a kind of mistake (empty for none) and a message."""

    kind: str
    message: str


@dataclass(frozen=True)
class Exercise:
    """One function that a student writes.

    Attributes
    ----------
    signature
        How it is called.
    returns
        What it returns, in a sentence.
    hint
        Where the book says what is right.
    mistakes
        By kind of mistake, what is wrong, in a sentence or two.
    problems
        Makes the problems.
    square
        Makes problems in which all sizes agree, for functions that raise where they do not.
    tolerance
        The relative error up to which an answer is right; single precision stays below it.
    near, inexact
        What may be the matter with an answer that is near but not right: its name, and the end of
        a sentence.
    judge
        Replaces the comparison with the right answer.
    """

    signature: str
    returns: str
    hint: str
    mistakes: dict[str, str]
    problems: Callable[[], list[Problem]]
    square: Callable[[], list[Problem]] = list
    tolerance: float = 1e-4
    near: str = "unconverged solve"
    inexact: str = "a solve that stopped early, or a small term that is missing, would do this."
    judge: Callable[[Sequence[Problem], Sequence[Array]], Outcome] | None = None

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments."""
        return [part.strip() for part in self.signature.split("(")[1].rstrip(")").split(",")]


def solve(a: Array, b: Array) -> Array:
    """Return the solution of a x = b."""
    return np.asarray(np.linalg.solve(a, b), dtype=np.float64)


def tensor(values: Array) -> Tensor:
    """Return an array as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def definite(rng: np.random.Generator, size: int, low: float, high: float) -> Array:
    """Return a symmetric matrix with eigenvalues between two bounds."""
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return (q * rng.uniform(low, high, size)) @ q.T
