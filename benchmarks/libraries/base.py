"""What a measurement needs of a library."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.problems import Problem


@dataclass(frozen=True)
class Method:
    """One way of a library to the scores.

    Attributes
    ----------
    name
        As in the tables.
    package
        The distribution whose version is recorded.
    modules
        What is imported before anything is timed.
    note
        What a reader of the table should know.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    note: str = ""

    def load(self) -> None:
        """Import the library."""
        for module in self.modules:
            importlib.import_module(module)


@dataclass(frozen=True)
class Exact(Method, ABC):
    """A method that solves A x = b to a tolerance.

    Attributes
    ----------
    settings
        Values of the tolerance parameter (or numbers of iterations), from loose to tight. The
        first is tried, and the next where the residual is not reached.
    most_columns
        Right-hand sides that the library takes at once.
    fixed_iterations
        Whether `settings` are numbers of iterations.
    separate_scores
        Whether it computes scores from given solutions,
    several_scores
        and from several at once.
    """

    settings: tuple[float, ...] = (1e-3, 7e-4, 5e-4, 3e-4, 1e-4, 3e-5, 1e-5)
    most_columns: int = 16
    fixed_iterations: bool = False
    separate_scores: bool = True
    several_scores: bool = True

    @abstractmethod
    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        """x ``(p, k)`` for right-hand sides ``(p, k)``, in at most `limit` iterations."""

    def scorer(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        """A function from solutions ``(p, k)`` to scores ``(m, k)``, where the library has one."""
        raise TypeError(f"{self.name} has no scores of its own")


@dataclass(frozen=True)
class Approximate(Method, ABC):
    """A method that replaces the Hessian by something easier, with its own right-hand sides."""

    @abstractmethod
    def fit(self, problem: Problem) -> Callable[[int], Tensor]:
        """Prepare; returns a function from a number of test examples to scores ``(m, k)``."""


def loader(problem: Problem, batch_size: int) -> DataLoader:
    """The training examples as a data loader, in order."""
    return DataLoader(TensorDataset(problem.inputs, problem.targets), batch_size=batch_size)
