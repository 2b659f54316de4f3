"""How well predicted effects agree with true ones, with 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from msif_lib.support.arguments import between, dense, whole

_Statistic = Callable[..., Any]

# Values that differ by this share of their size differ by rounding.
_ROUNDING = 8 * np.finfo(float).eps


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Value and interval: ``0.98 [0.97, 0.99]``."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Agreement:
    """Pearson's r, Spearman's ρ and the slope of the true effects on the predicted ones."""

    pearson: Estimate
    spearman: Estimate
    slope: Estimate


def _numbers(name: str, values: Any) -> NDArray[np.float64]:
    """Real numbers in an array; a tensor's too, from wherever it is."""
    if isinstance(values, Tensor):
        values = dense(name, values).detach().cpu().double()
    try:
        found = np.asarray(values)
        if found.dtype.kind in "iufb" or not found.size:
            return found.astype(float)
        said = str(found.dtype)
    except (TypeError, ValueError) as error:  # rows of unequal length
        said = str(error)
    raise TypeError(f"{name} must hold numbers, not {said}")


def _paired(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = _numbers("x", x), _numbers("y", y)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"x and y must be vectors of one length, not {a.shape} and {b.shape}")
    if len(a) < 3:
        raise ValueError(f"a correlation needs at least 3 points, not {len(a)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("x and y must be finite")
    for one in (a, b):
        if np.ptp(one) <= _ROUNDING * np.abs(one).max():
            raise ValueError("a correlation is not defined where x or y is constant")
    return a, b


def _bootstrap(
    statistic: _Statistic,
    samples: tuple[NDArray[np.float64], ...],
    resamples: int,
    confidence: float,
    seed: int | np.random.Generator,
) -> Estimate:
    """Percentile bootstrap over pairs (Efron & Tibshirani 1993).

    A resample in which a variable is constant, which few points make likely, has no correlation
    and is left out.
    """
    between("confidence", confidence)
    whole("resamples", resamples, 1)
    if not isinstance(seed, np.random.Generator):
        whole("seed", seed, 0)
    size = len(samples[0])
    drawn = np.random.default_rng(seed).integers(size, size=(resamples, size))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(*(sample[drawn] for sample in samples), axis=-1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[np.isfinite(values)], [tail, 1 - tail])
    return Estimate(float(statistic(*samples)), float(low), float(high))


def _centred(x: NDArray[np.float64], axis: int) -> tuple[NDArray[np.float64], Any]:
    """Differences from the mean in units of the largest, whose squares are numbers, and that."""
    x = x - x.mean(axis, keepdims=True)
    size = np.abs(x).max(axis, keepdims=True)
    return x / size, size.squeeze(axis)


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> Any:
    x, y = _centred(x, axis)[0], _centred(y, axis)[0]
    return (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> Any:
    return _pearson(
        scipy.stats.rankdata(x, axis=axis), scipy.stats.rankdata(y, axis=axis), axis=axis
    )


def _slope(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> Any:
    (x, x_size), (y, y_size) = _centred(x, axis), _centred(y, axis)
    return (x * y).sum(axis) / (x * x).sum(axis) * (y_size / x_size)


def pearson(
    x: ArrayLike,
    y: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Estimate:
    """Pearson's correlation of two vectors ``(N,)``, with a bootstrap interval.

    Parameters
    ----------
    x, y
        The pairs, in the same order.
    resamples
        Bootstrap samples of pairs.
    confidence
        Level of the interval.
    seed
        Seed or generator of the resampling.

    Returns
    -------
    Estimate
        r with its interval.

    Raises
    ------
    ValueError
        Vectors of unequal length, fewer than three points, values that are not finite, or a
        constant vector.
    """
    return _bootstrap(_pearson, _paired(x, y), resamples, confidence, seed)


def spearman(
    x: ArrayLike,
    y: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Estimate:
    """Spearman's rank correlation of two vectors ``(N,)``; arguments as for :func:`pearson`."""
    return _bootstrap(_spearman, _paired(x, y), resamples, confidence, seed)


def slope(
    x: ArrayLike,
    y: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Estimate:
    """Slope of the regression line of `y` on `x`; arguments as for :func:`pearson`."""
    return _bootstrap(_slope, _paired(x, y), resamples, confidence, seed)


def compare(
    predicted: ArrayLike,
    actual: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Agreement of predicted with true effects, each ``(N,)`` and in the same units.

    A perfect prediction has r = ρ = slope = 1. The slope, unlike r, sees a wrong scale.

    Raises
    ------
    ValueError
        As for :func:`pearson`.
    """
    settings = {"resamples": resamples, "confidence": confidence, "seed": seed}
    return Agreement(
        pearson(predicted, actual, **settings),  # type: ignore[arg-type]
        spearman(predicted, actual, **settings),  # type: ignore[arg-type]
        slope(predicted, actual, **settings),  # type: ignore[arg-type]
    )


def linear_datamodeling_score(
    predicted: ArrayLike,
    actual: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Estimate:
    """Linear datamodeling score (Park et al. 2023): rank agreement over random subsets.

    Parameters
    ----------
    predicted
        Predicted effect of S random removals on T test functionals, ``(S, T)`` or ``(S,)``: the
        sums of the removed examples' scores (:meth:`msif_lib.scores.Scores.group_effect`).
    actual
        The effect measured by retraining, of the same shape.
    resamples, confidence, seed
        Bootstrap over the test functionals, or over the removals where T = 1.

    Returns
    -------
    Estimate
        Spearman's ρ over the removals, averaged over the test functionals.

    Raises
    ------
    ValueError
        Unequal shapes; as for :func:`pearson`.
    """
    a, b = _numbers("predicted", predicted), _numbers("actual", actual)
    if a.shape != b.shape or a.ndim not in (1, 2):
        raise ValueError(
            f"predicted and actual must both be (S, T) or (S,), not {a.shape} and {b.shape}"
        )
    if a.ndim == 1 or a.shape[1] == 1:
        return spearman(a.ravel(), b.ravel(), resamples=resamples, confidence=confidence, seed=seed)
    each = np.array([_spearman(*_paired(x, y)) for x, y in zip(a.T, b.T, strict=True)], dtype=float)

    def mean(values: NDArray[np.float64], axis: int = -1) -> Any:
        return values.mean(axis)

    return _bootstrap(mean, (each,), resamples, confidence, seed)


def mean_estimate(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of independent values ``(N,)``, one a seed say, with Student's t interval.

    Parameters
    ----------
    values
        At least two.
    confidence
        Level of the interval.

    Returns
    -------
    Estimate
        The mean with its interval.

    Raises
    ------
    ValueError
        Fewer than two values, or some that are not finite.
    """
    sample = _numbers("values", values)
    if sample.ndim != 1 or len(sample) < 2:
        raise ValueError(f"an interval needs a vector of at least 2 values, not {sample.shape}")
    if not np.isfinite(sample).all():
        raise ValueError("values must be finite")
    between("confidence", confidence)
    middle = float(sample.mean())
    error = float(sample.std(ddof=1)) / len(sample) ** 0.5
    half = error * float(scipy.stats.t.ppf((1 + confidence) / 2, len(sample) - 1))
    return Estimate(middle, middle - half, middle + half)


@dataclass(frozen=True)
class Paired:
    """Differences between two treatments of the same units: their mean, and its tests.

    Attributes
    ----------
    difference
        Mean difference with Student's interval.
    t_test, wilcoxon
        Two-sided p-values of the paired t-test and of Wilcoxon's signed-rank test.
    """

    difference: Estimate
    t_test: float
    wilcoxon: float


def paired(after: ArrayLike, before: ArrayLike, *, confidence: float = 0.95) -> Paired:
    """Compare two treatments of the same units, such as seeds: `after` minus `before`.

    Parameters
    ----------
    after, before
        Values ``(N,)`` in the same order, at least two.
    confidence
        Level of the interval.

    Returns
    -------
    Paired
        Mean difference and p-values. Wilcoxon's is exact up to N = 13, ties and zeros included.

    Raises
    ------
    ValueError
        As for :func:`mean_estimate`, or vectors of unequal length.
    """
    a, b = _numbers("after", after), _numbers("before", before)
    if a.shape != b.shape:
        raise ValueError(f"after and before must be of one length, not {a.shape} and {b.shape}")
    differences = a - b
    difference = mean_estimate(differences, confidence=confidence)
    if np.ptp(differences) == 0:
        # Student's t is 0/0 or infinite here.
        t_test = 1.0 if difference.value == 0 else 0.0
    else:
        t_test = float(scipy.stats.ttest_1samp(differences, 0).pvalue)
    return Paired(difference, t_test, _wilcoxon(differences))


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test by its permutation distribution."""
    if np.count_nonzero(differences) < 2:  # both signs of a single difference are equally extreme
        return 1.0
    resampling = scipy.stats.PermutationMethod(n_resamples=9999, rng=np.random.default_rng(0))
    return float(scipy.stats.wilcoxon(differences, method=resampling).pvalue)
