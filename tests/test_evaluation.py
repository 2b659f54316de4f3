"""Agreement measures against scipy.stats and hand computation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from msif_lib.evaluation import (
    Estimate,
    compare,
    fidelity,
    linear_datamodeling_score,
    mean_estimate,
    paired,
    pearson,
    reliability,
    slope,
    spearman,
)


def sample(n: int, rho: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=n)


@given(n=st.integers(3, 60), rho=st.floats(-0.99, 0.99), seed=st.integers(0, 2**16))
def test_values_are_scipys(n, rho, seed):
    x, y = sample(n, rho, seed)
    y = np.round(y, 1) if n > 20 else y  # ties, for the ranks
    few = {"resamples": 10}
    assert pearson(x, y, **few).value == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-12)
    assert spearman(x, y, **few).value == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-12)
    assert slope(x, y, **few).value == pytest.approx(scipy.stats.linregress(x, y)[0], abs=1e-12)


def test_intervals_are_those_of_scipys_bootstrap():
    """Two percentile bootstraps of many resamples agree to their own noise."""
    x, y = sample(80, 0.6, 0)
    for ours, statistic in (
        (pearson, lambda a, b: scipy.stats.pearsonr(a, b)[0]),
        (spearman, lambda a, b: scipy.stats.spearmanr(a, b)[0]),
        (slope, lambda a, b: scipy.stats.linregress(a, b)[0]),
    ):
        theirs = scipy.stats.bootstrap(
            (x, y), statistic, paired=True, vectorized=False, n_resamples=2000,
            method="percentile", rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        estimate = ours(x, y, resamples=4000)
        assert estimate.low == pytest.approx(theirs.low, abs=0.03)
        assert estimate.high == pytest.approx(theirs.high, abs=0.03)


def test_pearsons_interval_is_near_fishers():
    x, y = sample(400, 0.5, 1)
    fisher = scipy.stats.pearsonr(x, y).confidence_interval(0.95)
    estimate = pearson(x, y)
    assert estimate.low == pytest.approx(fisher.low, abs=0.03)
    assert estimate.high == pytest.approx(fisher.high, abs=0.03)


@pytest.mark.parametrize("statistic", [pearson, spearman, slope])
def test_intervals_cover_the_truth_about_as_often_as_they_say(statistic):
    rho = 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2) if statistic is spearman else rho
    covered = 0
    for seed in range(120):
        estimate = statistic(*sample(60, rho, seed), resamples=400, seed=seed)
        covered += estimate.low <= truth <= estimate.high
    assert 0.88 <= covered / 120 <= 0.99


def test_more_confidence_is_a_wider_interval():
    x, y = sample(50, 0.5, 2)
    narrow, wide = pearson(x, y, confidence=0.5), pearson(x, y, confidence=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_a_perfect_prediction():
    x = np.random.default_rng(0).normal(size=30)
    agreement = compare(x, x)
    for estimate in (agreement.pearson, agreement.spearman, agreement.slope):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1))
    assert str(agreement.pearson) == "1.00 [1.00, 1.00]"


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        ((0.984, -0.5, 1), "0.98 [-0.50, 1.00]"),
        ((0.9996, 0.9991, 0.9999), "0.9996 [0.9991, 0.9999]"),
        ((0.98, 0.97, 0.9996), "0.9800 [0.9700, 0.9996]"),
        ((-0.997, -0.999, -0.99), "-0.997 [-0.999, -0.990]"),
        ((1.0004, 1.0002, 1.0006), "1.000 [1.000, 1.001]"),
        ((1 - 1e-16, 1 - 2e-16, 1 + 2e-16), "1.00 [1.00, 1.00]"),
        ((1234.5, 1234.0, 1236.0), "1234.50 [1234.00, 1236.00]"),
        ((-0.001, -0.002, 0.3), "0.00 [0.00, 0.30]"),
        ((1e-20, 0.0, 2e-20), "1.00e-20 [0.00e+00, 2.00e-20]"),
    ],
)
def test_an_estimate_is_shown_to_as_many_digits_as_it_needs(numbers, shown):
    assert str(Estimate(*numbers)) == shown


@given(
    value=st.floats(-1, 1),
    width=st.floats(1e-14, 0.5),
    near=st.floats(1e-12, 1),
    sign=st.booleans(),
)
def test_less_than_one_is_not_shown_as_one_nor_a_width_as_none(value, width, near, sign):
    """Parsed again, the text has each number on its side of 1, and the ends apart."""
    for middle in (value, (1 - near) * (1 if sign else -1)):
        estimate = Estimate(middle, middle - width, middle + width)
        value_, low, high = (float(text.strip("[],")) for text in str(estimate).split())
        assert low < high
        for number, read in zip((estimate.value, estimate.low, estimate.high), (value_, low, high)):
            assert abs(number) > 1 - 1e-14 or abs(read) != 1
            assert read == pytest.approx(number, abs=0.0051)


def test_only_the_slope_sees_the_scale():
    x, y = sample(40, 0.9, 3)
    once, scaled = compare(x, y), compare(2 * x, y)
    assert scaled.pearson.value == pytest.approx(once.pearson.value)
    assert scaled.spearman == once.spearman
    assert scaled.slope.value == pytest.approx(once.slope.value / 2)


def test_seeds():
    x, y = sample(40, 0.5, 4)
    assert pearson(x, y) == pearson(x, y, seed=0)
    assert pearson(x, y, seed=1) != pearson(x, y, seed=0)
    assert pearson(x, y, seed=np.random.default_rng(0)) == pearson(x, y, seed=0)
    assert compare(x, y, seed=5).pearson == pearson(x, y, seed=5)


def test_tensors_and_lists():
    x, y = sample(10, 0.5, 5)
    assert pearson(torch.tensor(x), torch.tensor(y)) == pearson(list(x), list(y))


def test_three_points_still_have_an_interval():
    """Resamples of one point only have no correlation; they are left out, quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for statistic in (pearson, spearman, slope):
            estimate = statistic([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
            assert np.isfinite([estimate.low, estimate.high]).all()


# --- means over seeds -----------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_the_t_test():
    values = np.random.default_rng(3).normal(2.0, 1.0, 6)
    interval = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    expected = (values.mean(), interval.low, interval.high)
    found = mean_estimate(values, confidence=0.9)
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "at least 2 values"),
        ([[1.0, 2.0]], "at least 2 values"),
        ([1.0, float("nan")], "finite"),
    ],
)
def test_what_has_no_interval(values, message):
    with pytest.raises(ValueError, match=message):
        mean_estimate(values)


# --- subsets left out: measures -------------------------------------------------------------------


def effects(
    shape: tuple[int, int, int], seed: int, rho: float = 0.7
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    predicted = rng.normal(size=shape)
    return predicted, rho * predicted + np.sqrt(1 - rho**2) * rng.normal(size=shape)


def each(statistic, predicted, actual):
    """A statistic of two vectors for every seed and functional ``(K, T)``, one by one."""
    seeds, _, functionals = predicted.shape
    return np.array(
        [
            [statistic(predicted[k, :, t], actual[k, :, t]) for t in range(functionals)]
            for k in range(seeds)
        ]
    )


def rank_correlation(x, y):
    return scipy.stats.spearmanr(x, y)[0]


def test_the_linear_datamodeling_score_by_hand():
    """Spearman over the removals, test by test, and the mean: (0.5 + 1 - 1) / 3."""
    predicted = np.array([[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [3.0, 3.0, 1.0]])
    actual = np.array([[2.0, 10.0, 1.0], [1.0, 20.0, 2.0], [3.0, 30.0, 3.0]])
    estimate = linear_datamodeling_score(predicted, actual)
    assert estimate.value == pytest.approx((0.5 + 1.0 - 1.0) / 3)
    assert -1 <= estimate.low < estimate.value < estimate.high <= 1


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(8, 25), st.integers(1, 4)),
    rho=st.floats(-0.99, 0.99),
    seed=st.integers(0, 2**16),
    digits=st.sampled_from([0, 1, 9]),
)
def test_all_measures_are_scipys_averaged(shape, rho, seed, digits):
    predicted, actual = (np.round(v, digits) for v in effects(shape, seed, rho))
    ends = [np.sort(v, axis=1) for v in (predicted, actual)]
    assume(all((v[:, 1] < v[:, -1]).all() and (v[:, 0] < v[:, -2]).all() for v in ends))
    found = fidelity(predicted, actual)
    ranks = each(rank_correlation, predicted, actual)
    assert found.lds.value == pytest.approx(ranks.mean(), abs=1e-12)
    assert found.quantiles == pytest.approx(
        np.quantile(ranks.mean(0), [0.05, 0.25, 0.5, 0.75, 0.95]), abs=1e-12
    )
    for measure, statistic in (
        (found.pearson, lambda x, y: scipy.stats.pearsonr(x, y)[0]),
        (found.slope, lambda x, y: scipy.stats.linregress(x, y)[0]),
        (found.error, lambda x, y: np.std(y - x) / np.std(y)),
    ):
        assert measure.value == pytest.approx(each(statistic, predicted, actual).mean(), abs=1e-11)
    assert linear_datamodeling_score(predicted, actual) == found.lds


def test_one_seed_and_one_functional_need_no_axis():
    predicted, actual = effects((1, 20, 3), 1)
    assert fidelity(predicted[0], actual[0]) == fidelity(predicted, actual)
    x, y = predicted[0, :, 0], actual[0, :, 0]
    assert fidelity(x, y) == fidelity(x[:, None], y[:, None])
    assert linear_datamodeling_score(x, y).value == spearman(x, y, resamples=2).value
    assert fidelity(torch.tensor(predicted), actual.tolist()) == fidelity(predicted, actual)


@pytest.mark.parametrize("seeds", [1, 4])
def test_scores_are_compared_in_pairs(seeds):
    """Predictions that err alike differ by less than their own intervals would let one think."""
    predicted, actual = effects((seeds, 30, 6), 4, 0.5)
    noise = np.random.default_rng(5).normal(size=predicted.shape)
    other = predicted + 0.2 * predicted.std() * noise
    found = linear_datamodeling_score(predicted, actual, against=other)
    ours, theirs = (linear_datamodeling_score(one, actual) for one in (predicted, other))
    assert found.value == pytest.approx(ours.value - theirs.value, abs=1e-14)
    assert found.low < found.value < found.high
    apart = np.hypot(ours.high - ours.low, theirs.high - theirs.low)
    assert found.high - found.low < 0.7 * apart
    back = linear_datamodeling_score(other, actual, against=predicted)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    same = linear_datamodeling_score(predicted, actual, against=np.exp(predicted))
    assert same.value == same.low == same.high == 0
    with pytest.raises(ValueError, match="must both be"):
        linear_datamodeling_score(predicted, actual, against=other[:, :5])


def as_numbers(found) -> np.ndarray:
    measures = [m for m in (found.lds, found.pearson, found.slope, found.error) if m is not None]
    return np.array([[m.value, m.low, m.high] for m in measures])


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_order_of_seeds_subsets_and_functionals_does_not_matter(seeds):
    predicted, actual = effects((seeds, 12, 5), 2)
    rng = np.random.default_rng(3)
    whole = as_numbers(fidelity(predicted, actual))
    for axis in range(3):
        order = rng.permutation(predicted.shape[axis])
        moved = fidelity(predicted.take(order, axis), actual.take(order, axis))
        assert as_numbers(moved) == pytest.approx(whole, abs=1e-10)


@pytest.mark.parametrize("seeds", [1, 3])
def test_only_ranks_make_the_score(seeds):
    """Monotone maps, of each seed and functional its own, change nothing; falling ones the sign."""
    predicted, actual = effects((seeds, 15, 4), 4)
    score = linear_datamodeling_score(predicted, actual)
    rng = np.random.default_rng(5)
    scale, shift = np.exp(rng.normal(size=(seeds, 1, 4))), rng.normal(size=(seeds, 1, 4))
    assert linear_datamodeling_score(np.exp(scale * predicted + shift), actual) == score
    assert linear_datamodeling_score(predicted, np.arctan(scale * actual - shift)) == score
    turned = linear_datamodeling_score(-predicted, actual)
    assert (turned.value, turned.low, turned.high) == pytest.approx(
        (-score.value, -score.high, -score.low), abs=1e-12
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_constant_is_no_error_and_a_factor_is(seeds):
    predicted, actual = effects((seeds, 15, 4), 6)
    offset = 3 * np.random.default_rng(7).normal(size=(seeds, 1, 4))
    found = fidelity(predicted, actual)
    assert as_numbers(fidelity(predicted + offset, actual - offset)) == pytest.approx(
        as_numbers(found), abs=1e-10
    )
    doubled = fidelity(2 * predicted, actual)
    assert doubled.lds == found.lds
    assert doubled.slope.value == pytest.approx(found.slope.value / 2)
    exact = fidelity(0.75 * actual, actual)
    assert as_numbers(exact) == pytest.approx(
        np.array([[1.0] * 3, [1.0] * 3, [4 / 3] * 3, [0.25] * 3]), abs=1e-9
    )
    assert fidelity(1e-200 * predicted, 1e-200 * actual).error.value == pytest.approx(
        found.error.value
    )


def test_predictions_without_a_scale_have_neither_slope_nor_error():
    predicted, actual = effects((2, 10, 3), 8)
    plain, scaled = fidelity(predicted, actual, scaled=False), fidelity(predicted, actual)
    assert plain.slope is None and plain.error is None
    assert (plain.lds, plain.pearson, plain.quantiles) == (
        scaled.lds, scaled.pearson, scaled.quantiles,
    )  # fmt: skip


# --- subsets left out: intervals ------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Normal effects, whose correlations vary with the seed and with the functional.

    `common` is the share of the variance of an effect that all functionals have together.
    """

    seeds: int
    subsets: int
    functionals: int
    level: float
    of_seed: float = 0.0
    of_functional: float = 0.2
    common: float = 0.5

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rho = np.tanh(
            self.level
            + self.of_seed * rng.normal(size=(self.seeds, 1, 1))
            + self.of_functional * rng.normal(size=(1, 1, self.functionals))
        )

        def field() -> np.ndarray:
            together = rng.normal(size=(self.seeds, self.subsets, 1))
            alone = rng.normal(size=(self.seeds, self.subsets, self.functionals))
            return np.sqrt(self.common) * together + np.sqrt(1 - self.common) * alone

        predicted = field()
        return predicted, rho * predicted + np.sqrt(1 - rho**2) * field()

    def mean(self, of_correlation) -> float:
        """Of a function of the correlation over seeds and functionals, by Gauss–Hermite."""
        points, weights = np.polynomial.hermite_e.hermegauss(80)
        spread = np.hypot(self.of_seed, self.of_functional)
        return float(of_correlation(np.tanh(self.level + spread * points)) @ weights) / float(
            weights.sum()
        )

    @property
    def score(self) -> float:
        """Spearman's ρ of a normal pair is 6/π arcsin(r/2) (Pearson 1907)."""
        return self.mean(lambda r: 6 / np.pi * np.arcsin(r / 2))

    @property
    def truths(self) -> dict[str, float]:
        """All measures; both effects have variance 1."""
        return {
            "lds": self.score,
            "pearson": self.mean(lambda r: r),
            "slope": self.mean(lambda r: r),
            "error": self.mean(lambda r: np.sqrt(2 - 2 * r)),
        }


def lines(slopes: np.ndarray, subsets: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true effects whose slopes are exactly these, ``(K, T)``."""
    predicted = np.random.default_rng(0).normal(size=(len(slopes), subsets, slopes.shape[1]))
    return predicted, slopes[:, None] * predicted


def close_to(estimate: Estimate, expected: Estimate) -> bool:
    wanted = (expected.value, expected.low, expected.high)
    return (estimate.value, estimate.low, estimate.high) == pytest.approx(wanted, rel=1e-9)


def test_of_one_functional_the_interval_is_students_over_the_seeds():
    slopes = np.random.default_rng(9).normal(1, 0.3, size=(5, 1))
    found = fidelity(*lines(slopes), confidence=0.9).slope
    assert close_to(found, mean_estimate(slopes[:, 0], confidence=0.9))


def test_where_subsets_do_not_matter_the_interval_is_students_over_the_functionals():
    slopes = np.random.default_rng(10).normal(1, 0.3, size=(1, 6))
    assert close_to(fidelity(*lines(slopes)).slope, mean_estimate(slopes[0]))


def test_of_one_functional_and_seed_the_interval_is_the_jackknifes():
    """Quenouille's bias (n − 1)(mean − s) and variance (n − 1)/n Σ (s₋ᵢ − mean)², one by one."""
    (x, y), n = sample(30, 0.6, 11), 30
    value = rank_correlation(x, y)
    without = [rank_correlation(np.delete(x, i), np.delete(y, i)) for i in range(n)]
    bias = (n - 1) * (np.mean(without) - value)
    error = np.sqrt((n - 1) / n * ((without - np.mean(without)) ** 2).sum())
    half = scipy.stats.t.ppf(0.975, n - 1) * error
    expected = Estimate(value, value - max(bias, 0) - half, value - min(bias, 0) + half)
    assert close_to(linear_datamodeling_score(x, y), expected)


@pytest.mark.parametrize("seeds", [1, 4])
def test_the_bias_that_widens_the_interval_is_kendalls(seeds):
    """Without ties ((n + 1) r − 3 τ)/(n − 2) has no bias (Kendall 1948)."""
    world = World(seeds, 40, 6, 2.0)
    predicted, actual = world.draw(np.random.default_rng(29))
    found = linear_datamodeling_score(predicted, actual)
    ranks = each(rank_correlation, predicted, actual)
    kendall = each(lambda x, y: scipy.stats.kendalltau(x, y)[0], predicted, actual)
    bias = (3 * (kendall - ranks) / (40 - 2)).mean()
    assert bias < -0.005
    assert (found.value - found.low) - (found.high - found.value) == pytest.approx(bias, rel=0.05)


def test_the_intervals_over_seeds_and_functionals_are_added_in_quadrature():
    slopes = np.random.default_rng(12).normal(1, 0.3, size=(4, 7))
    halves = [
        (interval := scipy.stats.ttest_1samp(means, 0).confidence_interval()).high - interval.low
        for means in (slopes.mean(0), slopes.mean(1))
    ]
    half, value = np.hypot(*halves) / 2, slopes.mean()
    found = fidelity(*lines(slopes)).slope
    assert close_to(found, Estimate(value, value - half, value + half))


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 0, 0), (0.1, 1, 0), (0, 0, 1), (0.2, 0.5, 3)])
def test_the_mean_of_a_crossed_table_is_covered(seeds, sizes):
    """Effects of seed and functional and their interaction in various sizes, 200 tables each."""
    rng = np.random.default_rng(13)
    covered = 0
    for _ in range(200):
        slopes = sum(
            size * rng.normal(size=shape)
            for size, shape in zip(sizes, [(seeds, 1), (1, 6), (seeds, 6)], strict=True)
        )
        found = fidelity(*lines(np.asarray(slopes))).slope
        covered += found.low <= 0 <= found.high
    assert covered / 200 >= 0.92


def rank_correlations(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Spearman's ρ over the subsets of ``(..., S, T)``."""
    x, y = (scipy.stats.rankdata(values, axis=-2) for values in (predicted, actual))
    x, y = (values - values.mean(-2, keepdims=True) for values in (x, y))
    return (x * y).sum(-2) / np.sqrt((x * x).sum(-2) * (y * y).sum(-2))


def coverage(world: World, interval, repeats: int) -> float:
    """Share of drawn problems in which an interval of the score holds the true one."""
    rng = np.random.default_rng(14)
    found = [interval(*world.draw(rng)) for _ in range(repeats)]
    return float(np.mean([e.low <= world.score <= e.high for e in found]))


WORLDS = {
    "one seed": World(1, 30, 10, 0.8),
    "one seed, high": World(1, 60, 10, 2.0),
    "one seed, one functional": World(1, 40, 1, 1.0, of_functional=0.0, common=0.0),
    "one seed, none": World(1, 30, 10, 0.0, of_functional=0.0),
    "two seeds": World(2, 30, 10, 1.0, of_seed=0.2),
    "three seeds": World(3, 40, 10, 1.0, of_seed=0.3),
    "three seeds alike": World(3, 40, 10, 1.0),
    "five seeds, high": World(5, 40, 10, 1.8, of_seed=0.2),
    "five seeds alike, high": World(5, 40, 10, 2.2, of_functional=0.1),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_intervals_cover_about_as_often_as_they_say(world):
    rng, repeats = np.random.default_rng(14), 200
    covered = dict.fromkeys(world.truths, 0)
    for _ in range(repeats):
        found = fidelity(*world.draw(rng))
        for name, truth in world.truths.items():
            measure = getattr(found, name)
            covered[name] += measure.low <= truth <= measure.high
    for name, count in covered.items():
        # Near 1 the score's interval is for the mean over such subsets as well.
        most = 1 if name == "lds" and world.level > 1.5 else 0.995
        assert 0.89 <= count / repeats <= most


def test_functionals_alone_make_too_narrow_an_interval():
    """What the subsets have in common moves the scores of all functionals together."""
    world = World(1, 30, 20, 0.8, of_functional=0.1)

    def of_functionals(predicted, actual):
        return mean_estimate(rank_correlations(predicted, actual)[0])

    assert coverage(world, of_functionals, 200) < 0.8
    assert coverage(world, linear_datamodeling_score, 100) >= 0.9


@pytest.mark.parametrize(
    "world", [World(1, 60, 20, 2.0), WORLDS["three seeds"], WORLDS["five seeds, high"]]
)
def test_so_do_percentiles_of_a_bootstrap_of_seeds_subsets_and_functionals(world):
    """K seeds drawn from K have too little variance, and ties pull high scores down."""
    rng, resamples = np.random.default_rng(15), 100

    def nested(predicted, actual):
        seeds, subsets, functionals = predicted.shape
        drawn = (
            rng.integers(seeds, size=(resamples, seeds, 1, 1)),
            rng.integers(subsets, size=(resamples, seeds, subsets, 1)),
            rng.integers(functionals, size=(resamples, 1, 1, functionals)),
        )
        scores = rank_correlations(predicted[drawn], actual[drawn])
        low, high = np.quantile(scores.mean((-2, -1)), [0.025, 0.975])
        return Estimate(0.0, float(low), float(high))

    assert coverage(world, nested, 100) < 0.9


# --- reliability ----------------------------------------------------------------------------------


def trainings(count: int, shape: tuple[int, int], noise: float, seed: int) -> np.ndarray:
    """True effects of variance 1 in so many trainings ``(R, S, T)``, with noise of their own."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) + noise * rng.normal(size=(count, *shape))


def test_two_trainings_are_two_halves():
    effect = trainings(2, (25, 3), 0.5, 16)
    found = reliability(effect)
    halves = each(rank_correlation, effect[:1], effect[1:]).mean()
    assert found.halves == linear_datamodeling_score(effect[0], effect[1])
    assert found.halves.value == pytest.approx(halves)
    assert found.stepped_up.value == pytest.approx(2 * halves / (1 + halves))
    assert found.ceiling.value == pytest.approx(np.sqrt(2 * halves / (1 + halves)))
    one = reliability(effect[..., 0])
    assert one == reliability(effect[..., :1])


@pytest.mark.parametrize(
    ("count", "pairs"),
    [
        (3, ["0 1", "0 2", "1 2"]),
        (4, ["01 23", "02 13", "03 12"]),
    ],
)
def test_all_splits_count_alike(count, pairs):
    effect = trainings(count, (20, 2), 0.8, 17)
    found = reliability(effect)
    means = [[effect[[int(i) for i in half]].mean(0)[None] for half in p.split()] for p in pairs]
    halves = np.mean([each(rank_correlation, *pair) for pair in means])
    assert found.halves.value == pytest.approx(halves)
    ratio = {3: 3, 4: 2}[count]
    assert found.stepped_up.value == pytest.approx(ratio * halves / (1 + (ratio - 1) * halves))
    order = np.random.default_rng(0).permutation(count)
    assert reliability(effect[order]).halves.value == pytest.approx(halves)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_the_step_up_is_the_reliability_of_the_mean_over_all(count):
    """By variances it is 1/(1 + noise²/R), whatever the number of halves; ranks come close."""
    noise, shape = 1.0, (400, 6)
    found = reliability(trainings(count, shape, noise, 18), splits=10)
    assert found.stepped_up.value == pytest.approx(1 / (1 + noise**2 / count), abs=0.035)


def test_the_ceiling_is_what_the_expected_effect_scores():
    expected = np.random.default_rng(19).normal(size=(600, 5))
    effect = expected + np.random.default_rng(20).normal(size=(4, 600, 5))
    score = linear_datamodeling_score(expected, effect.mean(0))
    assert reliability(effect).ceiling.value == pytest.approx(score.value, abs=0.02)


def test_trainings_that_agree_and_that_have_nothing_in_common():
    same = reliability(np.repeat(trainings(1, (10, 2), 0.0, 21), 4, axis=0))
    assert (same.halves.value, same.stepped_up.value, same.ceiling.low) == pytest.approx((1, 1, 1))
    opposite = trainings(1, (10, 2), 0.0, 22)[0]
    none = reliability(np.stack([opposite, -opposite]))
    assert none.halves.value == pytest.approx(-1)
    assert none.stepped_up == none.ceiling == Estimate(0.0, 0.0, 0.0)


def test_the_interval_of_the_halves_covers_about_as_often_as_it_says():
    """Halves of two: variance 1 for the effect, noise²/2 for each; functionals half in common."""
    noise, repeats = 0.8, 200
    truth = 6 / np.pi * np.arcsin(1 / (1 + noise**2 / 2) / 2)
    rng, covered = np.random.default_rng(22), 0
    for _ in range(repeats):
        parts = [rng.normal(size=(5, 30, count)) / np.sqrt(2) for count in (1, 4)]
        expected, *noises = sum(parts)
        found = reliability(expected + noise * np.array(noises)).halves
        covered += found.low <= truth <= found.high
    assert 0.9 <= covered / repeats <= 0.995


def test_models_have_trainings_of_their_own():
    models = np.stack([trainings(4, (20, 3), 0.6, seed) for seed in (23, 24, 25)])
    found = reliability(models)
    alone = [reliability(model).halves.value for model in models]
    assert found.halves.value == pytest.approx(np.mean(alone))
    two = reliability(models[:, :2]).halves
    assert two == linear_datamodeling_score(models[:, 0], models[:, 1])


def test_random_splits_take_a_seed():
    effect = trainings(8, (15, 2), 1.0, 26)
    first = reliability(effect, splits=5)
    assert reliability(effect, splits=5, seed=np.random.default_rng(0)) == first
    assert reliability(effect, splits=5, seed=1) != first
    assert reliability(effect, splits=35, seed=1) == reliability(effect, splits=35, seed=2)


# --- subsets left out: errors ---------------------------------------------------------------------


@pytest.mark.parametrize("measure", [linear_datamodeling_score, fidelity])
@pytest.mark.parametrize(
    ("predicted", "actual", "message"),
    [
        (np.ones((3, 2)), np.ones((2, 3)), r"both be .* or \(K, S, T\), not \(3, 2\) and \(2, 3\)"),
        (np.ones((1, 3, 2, 2)), np.ones((1, 3, 2, 2)), r"both be \(S,\), \(S, T\)"),
        (np.float64(1), np.float64(1), r"both be \(S,\), \(S, T\)"),
        (np.ones((0, 5, 2)), np.ones((0, 5, 2)), r"a seed, .* its shape is \(0, 5, 2\)"),
        (np.ones((2, 5, 0)), np.ones((2, 5, 0)), r"a functional .* its shape is \(2, 5, 0\)"),
        (np.ones((2, 2)), np.ones((2, 2)), "3 subsets at least"),
        ([1.0, 2.0, np.nan], [1.0, 2.0, 3.0], "^predicted must be finite"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, np.inf], "^actual must be finite"),
        (np.ones((3, 2)), np.arange(6.0).reshape(3, 2), "^predicted is constant .* functional 0"),
        (
            np.arange(6.0).reshape(3, 2), np.array([[1.0, 2], [2, 2], [3, 2]]),
            r"^actual is constant .* functional 1.* \(1 of 2",
        ),
        ([0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0], "constant but for one subset"),
    ],
)  # fmt: skip
def test_what_has_no_score(measure, predicted, actual, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            measure(predicted, actual)


@pytest.mark.parametrize(
    ("effect", "message"),
    [
        (np.ones(4), r"with R of 2 or more, not \(4,\)"),
        (np.ones((1, 5, 2)), r"with R of 2 or more, not \(1, 5, 2\)"),
        (np.ones((2, 2, 1)), "3 subsets"),
        (np.ones((2, 5, 1)), "^actual_by_seed is constant"),
        (np.full((2, 5, 1), np.nan), "^actual_by_seed must be finite"),
    ],
)
def test_what_has_no_reliability(effect, message):
    with pytest.raises(ValueError, match=message):
        reliability(effect)


def test_settings_of_measures_over_subsets():
    predicted, actual = effects((2, 5, 2), 27)
    for measure in (linear_datamodeling_score, fidelity, reliability):
        arguments = (predicted,) if measure is reliability else (predicted, actual)
        with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
            measure(*arguments, confidence=95)
    with pytest.raises(TypeError, match="scaled must be True or False"):
        fidelity(predicted, actual, scaled="yes")
    with pytest.raises(ValueError, match="splits must be at least 1"):
        reliability(predicted, splits=0)
    with pytest.raises(TypeError, match="seed must be a whole number"):
        reliability(trainings(8, (5, 2), 1.0, 28), splits=2, seed=0.5)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", [pearson, spearman, slope, compare])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0], r"vectors of one length, not \(3,\) and \(2,\)"),
        ([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], "vectors of one length"),
        ([1.0, 2.0], [1.0, 2.0], "at least 3 points, not 2"),
        ([1.0, 2.0, float("nan")], [1.0, 2.0, 3.0], "must be finite"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, float("inf")], "must be finite"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "not defined where x or y is constant"),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], "not defined where x or y is constant"),
    ],
)
def test_what_has_no_correlation(statistic, x, y, message):
    with pytest.raises(ValueError, match=message):
        statistic(x, y)


def test_arguments():
    x, y = sample(10, 0.5, 7)
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
            pearson(x, y, confidence=confidence)
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        pearson(x, y, resamples=0)


def test_students_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        estimate = mean_estimate(rng.normal(1.0, 2.0, 6))
        covered += estimate.low <= 1.0 <= estimate.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_paired_p_values_are_scipys():
    rng = np.random.default_rng(2)
    before = rng.normal(size=8)
    after = before + rng.normal(0.5, 1, 8)
    result = paired(after, before)
    assert result.t_test == pytest.approx(scipy.stats.ttest_rel(after, before).pvalue)
    assert result.wilcoxon == pytest.approx(scipy.stats.wilcoxon(after, before).pvalue)
    assert result.difference.value == pytest.approx((after - before).mean())


def test_paired_tests_bear_ties_zeros_and_constant_differences():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
        assert (same.t_test, same.wilcoxon, same.difference.value) == (1.0, 1.0, 0.0)
        assert paired([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]).wilcoxon == 1.0
        shifted = paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
        assert (shifted.t_test, shifted.wilcoxon) == (0.0, 0.25)
        # Two zeros dropped, four equal differences: 2 of the 16 sign patterns are as extreme.
        tied = paired([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], np.zeros(6))
        assert tied.wilcoxon == pytest.approx(2 / 16)


def test_pairs_must_be_of_one_length():
    with pytest.raises(ValueError, match="one length"):
        paired([1.0, 2.0], [1.0])
