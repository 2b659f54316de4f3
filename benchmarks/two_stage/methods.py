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
        ``function(problem, share, left_out, given)`` where it predicts the changes ``(M, T)`` of
        subsets ``(M, m)`` itself (`of_subsets`); `given` are other subsets and their changes. Where
        values are `tried`, the chosen one comes last.
    scaled
        Whether its values are in units of the loss, so that their size can be judged too.
    by_share, of_subsets
        As above.
    shares
        Those that it is meant for; None: all.
    only
        A condition that a problem must meet, :func:`by_steps` say; None: none.
    effort
        0: tens of trainings' time at most for all functionals; 1: more, where trainings are long;
        2: hundreds. Not asked of settings with less patience.
    trainings
        Retrainings that it is given a share, which count among its cost.
    tried
        Values of what is left to choose, a damping say. Which is taken on a setting is decided by
        the rule of :mod:`benchmarks.two_stage.choices`.
    group
        ``"row"`` of the table, or ``"budget"`` for the error budget.
    """

    name: str
    function: Callable[..., Tensor]
    scaled: bool = True
    by_share: bool = False
    of_subsets: bool = False
    shares: tuple[float, ...] | None = None
    only: Callable[[Problem], bool] | None = None
    effort: int = 0
    trainings: int = 0
    tried: tuple[float, ...] = ()
    group: str = "row"

    def fits(self, problem: Problem, share: float) -> bool:
        """Whether it says something of this share of this problem."""
        return (
            self.effort <= problem.setting.patience
            and (self.only is None or self.only(problem))
            and (self.shares is None or share in self.shares)
        )


def by_steps(problem: Problem) -> bool:
    """Whether the steps of both trainings are recorded."""
    return problem.setting.recipes is not None


def at_optimum(problem: Problem) -> bool:
    """Whether both stages are at an optimum."""
    return problem.setting.recipes is None


def of_classes(problem: Problem) -> bool:
    """Whether a pretraining example has one class, not a word at each place."""
    return problem.data.pretrain[1].dim() == 1


def of_words(problem: Problem) -> bool:
    """Whether inputs are texts."""
    return isinstance(problem.data.pretrain[0], tuple)


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
    chosen
        Of the values that the method tries.
    """

    def __init__(
        self, method: Method, problem: Problem, truth: Truth, chosen: float | None = None
    ) -> None:
        self.method, self.problem, self.truth = method, problem, truth
        self._chosen = () if chosen is None else (chosen,)
        #: Seconds of processor time so far.
        self.seconds = 0.0
        self._scores: dict[float | None, Tensor] = {}

    def of(self, share: float) -> Tensor:
        """Predicted changes ``(M, T)`` of the subsets that judge."""
        left_out, _ = self.truth.judged(share)
        if self.method.of_subsets:
            return self._timed(self.problem, share, left_out, self.truth.given(share))
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
        began = time.process_time()
        found = self.method.function(*asked, *self._chosen)
        self.seconds += time.process_time() - began
        if not found.isfinite().all():
            raise FloatingPointError(f"{self.method.name}: a value is not finite")
        return found
