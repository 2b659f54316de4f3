"""The plots refuse what they cannot show."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from msif_lib.evaluation import Estimate
from msif_lib.study.figures import bars, forest


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


def test_a_forest_marks_the_value_of_no_effect() -> None:
    _, axis = plt.subplots()
    forest(axis, ["a"], [Estimate(0.8, 0.7, 0.9)], "AUC", no_effect=0.5)
    assert list(axis.lines[-1].get_xdata()) == [0.5, 0.5]
    assert [text.get_text() for text in axis.texts] == ["0.80 [0.70, 0.90]"]
    plt.close()
