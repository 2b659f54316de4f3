"""Agreement measures against scipy.stats and hand computation."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from msif_lib.evaluation import (
    Estimate,
    compare,
    linear_datamodeling_score,
    mean_estimate,
    paired,
    pearson,
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
    assert str(Estimate(0.984, -0.5, 1)) == "0.98 [-0.50, 1.00]"


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


def test_the_linear_datamodeling_score_by_hand():
    """Spearman over the removals, test by test, and the mean: (0.5 + 1 - 1) / 3."""
    predicted = np.array([[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [3.0, 3.0, 1.0]])
    actual = np.array([[2.0, 10.0, 1.0], [1.0, 20.0, 2.0], [3.0, 30.0, 3.0]])
    estimate = linear_datamodeling_score(predicted, actual)
    assert estimate.value == pytest.approx((0.5 + 1.0 - 1.0) / 3)
    assert estimate.low < estimate.value < estimate.high


def test_the_linear_datamodeling_score_against_scipy():
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=(20, 7))
    actual = predicted + rng.normal(size=(20, 7))
    each = [scipy.stats.spearmanr(a, b)[0] for a, b in zip(predicted.T, actual.T)]
    estimate = linear_datamodeling_score(predicted, actual)
    assert estimate.value == pytest.approx(np.mean(each))
    error = np.std(each) / np.sqrt(7)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.3)


def test_the_linear_datamodeling_score_of_one_functional_is_spearman():
    x, y = sample(25, 0.7, 6)
    assert linear_datamodeling_score(x, y) == spearman(x, y)
    assert linear_datamodeling_score(x[:, None], y[:, None]) == spearman(x, y)


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
    with pytest.raises(ValueError, match=r"both be \(S, T\) or \(S,\), not \(3, 2\) and \(2, 3\)"):
        linear_datamodeling_score(np.ones((3, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"both be \(S, T\)"):
        linear_datamodeling_score(np.ones((3, 2, 2)), np.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="constant"):
        linear_datamodeling_score(np.ones((3, 2)), np.arange(6.0).reshape(3, 2))


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
