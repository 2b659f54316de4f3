"""The methods that are judged, by their names.

A method is a function of a trained :class:`~benchmarks.two_stage.settings.Problem`. It returns
dq/dw_i ``(m, T)``: by how much the loss of each of T functionals moves with the weight of each of m
pretraining examples. The predicted change without some examples is minus their sum::

    @register("gradient dot product", scaled=False)
    def gradient_dot(problem):
        tested = problem.finetune.with_data(problem.data.functionals, "functionals")
        ...
        return scores                     # (m, T); here only their order counts
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.two_stage.bank import Truth
from benchmarks.two_stage.settings import Problem


@dataclass(frozen=True)
class Method:
    """A method and how it is called.

    Attributes
    ----------
    name
        Of its row.
    function
        ``function(problem)``, or ``function(problem, share)`` where `by_share`; or
        ``function(problem, share, left_out, truth)`` where it predicts the changes ``(M, T)`` of
        subsets ``(M, m)`` itself (`of_subsets`).
    scaled
        Whether its values are in units of the loss, so that their size can be judged too.
    by_share, of_subsets
        As above.
    shares
        Those that it is meant for; None: all.
    only
        ``"descent"``: settings with recorded trainings; ``"optimum"``: those at an optimum; None:
        all.
    group
        ``"row"`` of the table, or ``"budget"`` for the error budget.
    """

    name: str
    function: Callable[..., Tensor]
    scaled: bool = True
    by_share: bool = False
    of_subsets: bool = False
    shares: tuple[float, ...] | None = None
    only: str | None = None
    group: str = "row"

    def fits(self, problem: Problem, share: float) -> bool:
        """Whether it says something of this share of this problem."""
        kind = "descent" if problem.setting.recipes else "optimum"
        return self.only in (None, kind) and (self.shares is None or share in self.shares)


#: Every method that was registered, in that order.
METHODS: dict[str, Method] = {}


def register(name: str, **how: object) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add a function to the methods; `how` are attributes of :class:`Method`.

    Raises
    ------
    ValueError
        A method is called so already.
    """
    if name in METHODS:
        raise ValueError(f"a method is called {name!r} already")

    def added(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = Method(name, function, **how)  # type: ignore[arg-type]
        return function

    return added


class Predictions:
    """What one method predicts of one problem, each thing computed once, and what that cost.

    Parameters
    ----------
    method, problem, truth
        What is asked of which.
    """

    def __init__(self, method: Method, problem: Problem, truth: Truth) -> None:
        self.method, self.problem, self.truth = method, problem, truth
        #: Seconds so far.
        self.seconds = 0.0
        self._scores: dict[float | None, Tensor] = {}

    def of(self, share: float) -> Tensor:
        """Predicted changes ``(M, T)`` of the subsets that judge."""
        left_out, _ = self.truth.judged(share)
        if self.method.of_subsets:
            return self._timed(self.problem, share, left_out, self.truth)
        key = share if self.method.by_share else None
        if key not in self._scores:
            asked = (share,) if self.method.by_share else ()
            self._scores[key] = self._timed(self.problem, *asked)
        scores = self._scores[key]
        expected = (self.problem.size, len(self.truth.before))
        if tuple(scores.shape) != expected:
            raise ValueError(
                f"{self.method.name}: scores must be (m, T) = {expected}, not {tuple(scores.shape)}"
            )
        return -(left_out.to(scores) @ scores)

    def _timed(self, *asked: object) -> Tensor:
        began = time.perf_counter()
        found = self.method.function(*asked)
        self.seconds += time.perf_counter() - began
        if not found.isfinite().all():
            raise FloatingPointError(f"{self.method.name}: a value is not finite")
        return found
