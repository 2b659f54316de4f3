"""Ratios over seeds, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest

from msif_lib.evaluation import Estimate
from msif_lib.study.experiments.ratios import claim, compared, ratio, shown


def test_a_ratio_is_the_geometric_mean_and_its_interval_lies_around_it() -> None:
    found = ratio(np.log([0.5, 2.0, 8.0]))
    assert found.value == pytest.approx(2.0)
    assert found.value / found.low == pytest.approx(found.high / found.value)
    assert found.low < 0.5


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.01, 3.0, "larger"), (0.2, 0.99, "smaller"), (0.9, 1.1, "not clearly different")],
)
def test_what_an_interval_says(low: float, high: float, expected: str) -> None:
    assert compared(Estimate((low * high) ** 0.5, low, high)) == expected


def test_what_is_far_from_one_is_written_in_powers_of_ten() -> None:
    assert shown(Estimate(0.81, 0.62, 1.06)) == "0.81 [0.62, 1.06]"
    assert shown(Estimate(0.4, 1.2e-6, 129684.0)) == "0.40 [1.2e-06, 1.3e+05]"


def test_a_claim_keeps_the_interval_and_what_else_is_given() -> None:
    found = claim(Estimate(2.0, 1.0, 3.0), 4, p=0.03)
    assert found == {"value": 2.0, "low": 1.0, "high": 3.0, "seeds": 4, "p": 0.03}
