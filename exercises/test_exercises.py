"""Examines the functions in influence.py; run ``pytest exercises``."""

from __future__ import annotations

import influence
import pytest

from msif_lib.study.course.grader import check

FUNCTIONS = {
    "influence": "influence_scores",
    "retraining": "leave_one_out",
    "hvp": "hvp",
    "conjugate_gradient": "conjugate_gradient",
    "case1": "case1_scores",
    "case2": "case2_scores",
    "chain": "chain_scores",
    "adjoint": "adjoint",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exercise(name: str) -> None:
    """The function is right, or not done yet."""
    verdict = check(name, getattr(influence, FUNCTIONS[name]))
    if verdict.state == "not done":
        pytest.skip("not done yet")
    if not verdict.passed:
        pytest.fail(str(verdict), pytrace=False)
