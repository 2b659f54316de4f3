"""Ratios of sizes, as the experiments compare them: seed by seed, in logarithms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from msif_lib.evaluation import Estimate, mean_estimate


def ratio(logarithms: ArrayLike) -> Estimate:
    """Geometric mean of ratios, with Student's interval.

    Parameters
    ----------
    logarithms
        Of the ratios, one a seed ``(N,)``, at least two.
    """
    found = mean_estimate(logarithms)
    return Estimate(*np.exp([found.value, found.low, found.high]).tolist())


def compared(estimate: Estimate, one: float = 1.0) -> str:
    """What the interval of a ratio says: larger, smaller, or not clearly different.

    Parameters
    ----------
    estimate
        The ratio.
    one
        What it is held against.
    """
    if estimate.low > one:
        return "larger"
    return "smaller" if estimate.high < one else "not clearly different"


def claim(estimate: Estimate, seeds: int, **more: Any) -> dict[str, Any]:
    """One number of a record's ``"claims"``.

    Parameters
    ----------
    estimate
        The number.
    seeds
        Over how many seeds.
    **more
        What else is kept of it, such as ``p``.
    """
    return {
        "value": estimate.value, "low": estimate.low, "high": estimate.high, "seeds": seeds, **more
    }  # fmt: skip


def shown(estimate: Estimate) -> str:
    """A ratio and its interval in figures that can be read, however far the interval goes.

    Parameters
    ----------
    estimate
        The ratio.
    """

    def figure(value: float) -> str:
        return f"{value:.2f}" if 0.095 <= value < 99.5 else f"{value:.1e}"

    numbers = (estimate.value, estimate.low, estimate.high)
    if all(0.095 <= value < 99.5 for value in numbers):
        return str(estimate)
    value, low, high = map(figure, numbers)
    return f"{value} [{low}, {high}]"
