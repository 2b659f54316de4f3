"""How well predicted effects agree with true ones, with 95 % confidence intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from msif_lib.support.arguments import between, dense, flag, whole

_Statistic = Callable[..., Any]

# Numbers that the jackknife holds at once.
_AT_ONCE = 2_000_000
# Values that differ by this share of their size differ by rounding.
_ROUNDING = 8 * np.finfo(float).eps


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Value and interval: ``0.98 [0.97, 0.99]``.

        Two digits, or as many as keep what is below 1 in size from being shown as 1, and the ends
        of the interval apart.
        """
        numbers = (self.value, self.low, self.high)
        point = self.high - self.low <= _ROUNDING * abs(self.high)
        for digits in range(2, 18):
            value, low, high = rounded = [round(number, digits) + 0.0 for number in numbers]
            risen = any(
                abs(end) == 1 and 1 - abs(number) > _ROUNDING
                for end, number in zip(rounded, numbers, strict=True)
            )
            if not risen and (point or low != high):
                return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{self.value:.2e} [{self.low:.2e}, {self.high:.2e}]"


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


def _relative_error(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> Any:
    y, size = _centred(y, axis)
    x = (x - x.mean(axis, keepdims=True)) / np.expand_dims(size, axis)
    return np.sqrt(((y - x) ** 2).sum(axis) / (y * y).sum(axis))


def pearson(
    x: ArrayLike,
    y: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Estimate:
    """Pearson's correlation of two vectors ``(N,)``, with a bootstrap interval.

    The interval is that of other pairs, by resampling them. Where pairs come from several seeds and
    functionals, :func:`linear_datamodeling_score` and :func:`fidelity` allow for these too.

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


@dataclass(frozen=True)
class Fidelity:
    """How well predicted effects of leaving subsets out agree with true ones.

    Each measure is taken over the subsets of one seed for one functional, and averaged over both.

    Attributes
    ----------
    lds
        Linear datamodeling score: Spearman's ρ.
    pearson
        Pearson's r.
    slope
        Slope of the true effects on the predicted ones; None where predictions have no scale.
    error
        Size of predicted minus true effects, relative to that of the true ones, both taken from
        their mean over the subsets: 0 is perfect, and a prediction that is constant has 1. None
        where predictions have no scale.
    quantiles
        5, 25, 50, 75 and 95 % quantiles over the functionals of Spearman's ρ, which is averaged
        over the seeds first. It is measured on S subsets, so it spreads more than what it measures.
    """

    lds: Estimate
    pearson: Estimate
    slope: Estimate | None
    error: Estimate | None
    quantiles: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Reliability:
    """How well true effects that are means over R trainings predict themselves.

    Attributes
    ----------
    halves
        Spearman's ρ over the subsets between the means of two disjoint halves of the trainings,
        averaged over the splits and the functionals.
    stepped_up
        The same between means over R trainings and over R others, by Spearman and Brown (1910):
        :math:`kr / (1 + (k - 1) r)` for means over k times as many. Below 0 counts as 0.
    ceiling
        Its root: the score of the expected effect itself against the mean over R trainings, which
        no prediction made without these trainings exceeds, but by chance.
    """

    halves: Estimate
    stepped_up: Estimate
    ceiling: Estimate


def _by_functional(
    predicted: ArrayLike, actual: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predicted and true effects, each ``(K, T, S)``."""
    a, b = _numbers("predicted", predicted), _numbers("actual", actual)
    if a.shape != b.shape or a.ndim not in (1, 2, 3):
        raise ValueError(
            "predicted and actual must both be (S,), (S, T) or (K, S, T), not "
            f"{a.shape} and {b.shape}"
        )
    return _checked("predicted", a), _checked("actual", b)


def _checked(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Effects ``(..., S, T)`` with the subsets last, ``(..., T, S)``, none of them constant."""
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim == 2:
        values = values[None]
    if not values.size or values.shape[-2] < 3:
        raise ValueError(
            f"{name} needs a seed, a functional and 3 subsets at least: its shape is {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite")
    constant = np.ptp(values, axis=-2) <= _ROUNDING * np.abs(values).max(-2)
    if constant.any():
        *_, functional = np.argwhere(constant)[0]
        raise ValueError(
            f"{name} is constant over the subsets at functional {functional}: no correlation is "
            f"defined there ({constant.sum()} of {constant.size} are so)"
        )
    return values.swapaxes(-1, -2)


def _pseudo_values(
    statistic: _Statistic, samples: tuple[NDArray[np.float64], ...]
) -> NDArray[np.float64]:
    """The jackknife's n s − (n − 1) s₋ᵢ of samples ``(..., n)``, s₋ᵢ being without the i-th."""
    n = samples[0].shape[-1]
    others = np.nonzero(~np.eye(n, dtype=bool))[1].reshape(n, n - 1)
    flat = [sample.reshape(-1, n) for sample in samples]
    rows = max(1, _AT_ONCE // n**2)
    without = [
        statistic(*(one[first : first + rows, others] for one in flat))
        for first in range(0, len(flat[0]), rows)
    ]
    return n * statistic(*samples)[..., None] - (n - 1) * np.concatenate(without).reshape(
        samples[0].shape
    )


def _student(values: NDArray[np.float64], confidence: float) -> float:
    """Half of Student's interval of the mean of independent values ``(N,)``, N ≥ 2."""
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return error * float(scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1))


def _estimate(
    statistic: _Statistic,
    samples: tuple[NDArray[np.float64], ...],
    confidence: float,
    least: float = -math.inf,
    most: float = math.inf,
) -> Estimate:
    """Mean over seeds and functionals of a statistic of the subsets, from samples ``(K, T, S)``.

    The interval lies within `least` and `most`. See :func:`linear_datamodeling_score`.
    """
    between("confidence", confidence)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(*samples).mean())
        pseudo = _pseudo_values(statistic, samples)
    if not np.isfinite(pseudo).all():
        raise ValueError("effects that are constant but for one subset have no interval")
    table = pseudo.mean(-1) if len(pseudo) > 1 else pseudo[0].T
    half = math.hypot(
        *(_student(one, confidence) for one in (table.mean(0), table.mean(1)) if len(one) > 1)
    )
    unbiased = float(table.mean())
    low, high = min(value, unbiased) - half, max(value, unbiased) + half
    return Estimate(value, max(low, least), min(high, most))


def linear_datamodeling_score(
    predicted: ArrayLike,
    actual: ArrayLike,
    *,
    against: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Linear datamodeling score (Park et al. 2023): rank agreement over random subsets.

    The interval allows for other seeds, subsets and functionals. The scores are a table, a row a
    seed and a column a functional. Half of Student's interval over the means of the rows, and half
    of that over the means of the columns, are added in quadrature, as for two independent errors
    (Howe 1974). What differs from seed to seed holds what their subsets do to it, as each has its
    own. Where there is one seed, the rows are the subsets, with the jackknife's pseudo-values
    (Tukey 1958; Dorfman, Berbaum and Metz 1992 compare readers and cases so). Noise that is neither
    the row's nor the column's is counted in both, which errs on the wide side.

    Spearman's ρ of S subsets is too low, on average by 3 (ρ − τ)/(S + 1) with Kendall's τ: 0.0035
    where ρ is 0.97 and S is 100. The value is the plain one, as others report it; the jackknife has
    one without this bias, and the interval reaches as far below the lower of the two as above the
    higher.

    Percentiles of a bootstrap of all three cover less than they say: with few seeds, which are
    drawn from too few, and near 1, where draws with replacement bring ties. The tests measure both.

    Parameters
    ----------
    predicted
        Predicted effect of S random removals on T test functionals: ``(S,)``, ``(S, T)``, or
        ``(K, S, T)`` of K models trained from seeds of their own, each with S removals of its own
        and all with the same functionals. An effect is the sum of the removed examples' scores
        (:meth:`msif_lib.scores.Scores.group_effect`).
    actual
        The effect measured by retraining, of the same shape.
    against
        Other predictions of the same effects. Then the value is how far the score of `predicted` is
        above theirs, with the interval of paired differences.
    confidence
        Level of the interval. Over two or three seeds it is wide: Student's t is 12.7 and 4.3.

    Returns
    -------
    Estimate
        Spearman's ρ over the removals, averaged over functionals and seeds; the interval lies
        within −1 and 1.

    Raises
    ------
    ValueError
        Unequal shapes, no seed or functional, fewer than three removals, values that are not
        finite, or effects on some functional that are constant, if need be without one removal.
    """
    samples = _by_functional(predicted, actual)
    if against is None:
        return _estimate(_spearman, samples, confidence, -1, 1)

    def above(x: NDArray[np.float64], other: NDArray[np.float64], y: NDArray[np.float64]) -> Any:
        return _spearman(x, y) - _spearman(other, y)

    other, _ = _by_functional(against, actual)
    return _estimate(above, (samples[0], other, samples[1]), confidence, -2, 2)


def fidelity(
    predicted: ArrayLike, actual: ArrayLike, *, scaled: bool = True, confidence: float = 0.95
) -> Fidelity:
    """All measures of predicted against true effects, with intervals.

    A constant that is added to all effects on a functional changes none of them: where predictions
    are expanded elsewhere than where all examples are in, they are known up to such a constant.

    Parameters
    ----------
    predicted, actual, confidence
        As for :func:`linear_datamodeling_score`.
    scaled
        Whether predictions are in the units of the effects. Others, cosines say, have no slope and
        no error.

    Returns
    -------
    Fidelity
        Scores, correlations, slopes and errors, averaged over functionals and seeds.

    Raises
    ------
    ValueError
        As for :func:`linear_datamodeling_score`.
    """
    flag("scaled", scaled)
    samples = _by_functional(predicted, actual)
    of_functionals = _spearman(*samples).mean(0)
    return Fidelity(
        lds=_estimate(_spearman, samples, confidence, -1, 1),
        pearson=_estimate(_pearson, samples, confidence, -1, 1),
        slope=_estimate(_slope, samples, confidence) if scaled else None,
        error=_estimate(_relative_error, samples, confidence, 0) if scaled else None,
        quantiles=tuple(np.quantile(of_functionals, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()),
    )


def reliability(
    actual_by_seed: ArrayLike,
    *,
    splits: int = 20,
    confidence: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Reliability:
    """How high any prediction of mean true effects can score, from the trainings they are means of.

    Parameters
    ----------
    actual_by_seed
        Effects of S removals on T functionals in R ≥ 2 trainings from other random seeds, the same
        removals in each: ``(R, S)``, ``(R, S, T)``, or ``(K, R, S, T)`` of K models, each with
        removals of its own.
    splits
        All splits of the trainings into halves are taken, or so many random ones of more. An odd
        training is left out.
    confidence
        Level of the intervals, as in :func:`linear_datamodeling_score`: over other models, removals
        and functionals. A single model's is that of its R trainings.
    seed
        Seed or generator of random splits.

    Returns
    -------
    Reliability
        Agreement of the halves, of means over R, and the ceiling. Step-up and root are exact of
        Pearson's r where noise is alike in all trainings, and taken of the mean over functionals,
        which makes them no lower than the mean of those of each.

    Raises
    ------
    ValueError
        Fewer than two trainings; as for :func:`linear_datamodeling_score`.
    """
    values = _numbers("actual_by_seed", actual_by_seed)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim not in (3, 4) or values.shape[-3] < 2:
        raise ValueError(
            "actual_by_seed must be (R, S), (R, S, T) or (K, R, S, T) with R of 2 or more, not "
            f"{values.shape}"
        )
    whole("splits", splits, 1)
    values = _checked("actual_by_seed", values[None] if values.ndim == 3 else values)
    trainings = tuple(np.moveaxis(values, 1, 0))
    pairs = _halves(len(trainings), splits, seed)

    def mean_of(half: tuple[int, ...], of_each: tuple[NDArray[np.float64], ...]) -> Any:
        return np.mean([of_each[training] for training in half], axis=0)

    def between_halves(*of_each: NDArray[np.float64]) -> Any:
        return np.mean(
            [_spearman(mean_of(a, of_each), mean_of(b, of_each)) for a, b in pairs], axis=0
        )

    halves = _estimate(between_halves, trainings, confidence, -1, 1)
    ratio = len(trainings) / len(pairs[0][0])

    def stepped_up(r: float) -> float:
        r = max(r, 0.0)
        return ratio * r / (1 + (ratio - 1) * r)

    ends = [stepped_up(r) for r in (halves.value, halves.low, halves.high)]
    return Reliability(halves, Estimate(*ends), Estimate(*map(math.sqrt, ends)))


def _halves(
    count: int, most: int, seed: int | np.random.Generator
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint halves of `count` things: all, or `most` random ones where there are more.

    A half of an odd number is rounded down.
    """
    half = count // 2
    ways = math.comb(count, half) * math.comb(count - half, half) // 2
    if ways > most:
        if not isinstance(seed, np.random.Generator):
            whole("seed", seed, 0)
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(count).tolist() for _ in range(most)]
        return [(tuple(order[:half]), tuple(order[half : 2 * half])) for order in orders]
    return [
        (first, second)
        for first in itertools.combinations(range(count), half)
        for second in itertools.combinations(sorted(set(range(count)) - set(first)), half)
        if first < second
    ]


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
    half = _student(sample, confidence)
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
