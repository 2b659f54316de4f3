"""Verdicts follow the rule that the page states."""

import pytest

from msif_lib.study.experiments.comparison import CLAIMS, Claim, verdict

GAIN = Claim("gain", "4.2", "a gain", "cifar10", 0.2, "0.2")
DROP = Claim("drop", "4.4", "a ratio", "cifar10", 0.5, "a half", none=1.0, direction=-1)
UNSTATED = Claim("r", "4.1", "a plot", "mnist", None, "a plot")
OTHER = Claim("lds", "4.1", "another test", "digits-sgd", None, "none such", comparable=False)
BASELINE = Claim("identity", "4.1", "a baseline", "mnist", 0.17, "0.17", none=None)


@pytest.mark.parametrize(
    ("claim", "interval", "word"),
    [
        (GAIN, (0.1, -0.1, 0.3), "not significant"),
        (GAIN, (0.1, 0.0, 0.3), "not significant"),  # the end belongs to the interval
        (GAIN, (-0.3, -0.4, -0.1), "opposite"),
        (GAIN, (0.15, 0.1, 0.2), "reproduced"),
        (GAIN, (0.5, 0.4, 0.6), "stronger"),
        (GAIN, (0.1, 0.05, 0.15), "weaker"),
        (DROP, (0.9, 0.7, 1.1), "not significant"),
        (DROP, (1.5, 1.2, 1.9), "opposite"),
        (DROP, (0.5, 0.4, 0.6), "reproduced"),
        (DROP, (0.3, 0.2, 0.4), "stronger"),
        (DROP, (0.8, 0.7, 0.9), "weaker"),
        (UNSTATED, (0.9, 0.8, 0.95), "reproduced"),
        (UNSTATED, (0.1, -0.1, 0.3), "not significant"),
        (OTHER, (0.9, 0.8, 0.95), "not comparable"),
        (OTHER, (0.1, -0.1, 0.3), "not comparable"),
        (BASELINE, (0.1, -0.1, 0.3), "reproduced"),
        (BASELINE, (0.4, 0.3, 0.5), "stronger"),
        (BASELINE, (-0.2, -0.3, -0.1), "weaker"),
    ],
)
def test_verdict(claim: Claim, interval: tuple[float, float, float], word: str) -> None:
    assert verdict(claim, *interval) == word


def test_a_value_outside_its_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gain: 0.5 is not within its interval \[0.1, 0.2\]"):
        verdict(GAIN, 0.5, 0.1, 0.2)


def test_what_the_paper_did_not_measure_has_no_number_of_its_own() -> None:
    others = [claim for claim in CLAIMS if not claim.comparable]
    assert {claim.dataset for claim in others} == {"digits-sgd", "mnist-sgd"}
    assert all(claim.paper is None and claim.why for claim in others)


def test_every_claim_of_an_effect_has_the_papers_sign() -> None:
    for claim in CLAIMS:
        if claim.paper is not None and claim.none is not None:
            assert (claim.paper - claim.none) * claim.direction > 0, claim
