"""The plots refuse what they cannot show."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from msif_lib.evaluation import Estimate
from msif_lib.study.figures import bars, forest, ratio_axis


def test_bars_write_their_values_out() -> None:
    _, axis = plt.subplots()
    bars(axis, ["a", "b"], [1.0, 1234.5], "ratio", ranges=[(0.9, 1.1), (1000.0, 1300.0)])
    assert [text.get_text() for text in axis.texts] == ["1", "1,200"]
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first on top
    plt.close()


def test_bars_refuse_what_does_not_fit() -> None:
    _, axis = plt.subplots()
    with pytest.raises(ValueError, match="1 labels, 2 values, 2 ranges and 1 colors"):
        bars(axis, ["a"], [1.0, 2.0], "ratio")
    with pytest.raises(ValueError, match="a logarithmic axis has no place for -2"):
        bars(axis, ["a", "b"], [1.0, -2.0], "ratio")
    plt.close()


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0.6, 1.25, ["0.7", "1"]), (0.2, 12, ["0.3", "1", "3", "10"]), (1e-5, 1e3, None)],
)
def test_an_axis_of_ratios_shows_them_with_few_marks(
    low: float, high: float, marks: list[str] | None
) -> None:
    _, axis = plt.subplots()
    forest(axis, ["a"], [Estimate(1.1, low, high)], "ratio", no_effect=1)
    ratio_axis(axis)
    ends = axis.get_xlim()
    shown = [label.get_text() for label in axis.get_xticklabels()]
    assert axis.get_xscale() == "log" and 0.02 <= ends[0] < 1.1 < ends[1] <= 50
    if marks is None:
        assert shown == ["0.03", "0.1", "0.3", "1", "3", "10", "30"] and ends == (0.02, 50)
    else:
        assert shown == marks and ends[0] > 0.7 * low and ends[1] < 1.4 * high
    plt.close()


def test_a_forest_marks_the_value_of_no_effect() -> None:
    _, axis = plt.subplots()
    forest(axis, ["a"], [Estimate(0.8, 0.7, 0.9)], "AUC", no_effect=0.5)
    assert list(axis.lines[-1].get_xdata()) == [0.5, 0.5]
    assert [text.get_text() for text in axis.texts] == ["0.80 [0.70, 0.90]"]
    plt.close()
