"""Examples and steps: a small run against chains, and what is said of rows that are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from msif_lib import Chain
from msif_lib.links import Optimum, Proximal, Unrolled
from msif_lib.solvers import Dense
from msif_lib.study.experiments.experiment import Setting, train_two_stages
from msif_lib.study.experiments.finetune_size import (
    OPTIMUM,
    WAYS,
    Design,
    Results,
    Run,
    beside_row,
    run_seed,
)
from msif_lib.training import SGD, descend

ALPHA = 0.03


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Design:
    return Design(
        "digits", None, None, 40, 20, (12, 24), (1, 2), 12, 1, 2, 0.1, [0.3],
        Setting(widths=(2,), alpha=ALPHA, gradient_tol=1e-8), Dense(),
        tmp_path_factory.mktemp("kept"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(design: Design) -> Run:
    return run_seed(design, 1)


def test_the_two_ends_are_those_of_chains(design: Design, run: Run) -> None:
    data = design.part(design.draw(1), 12)
    trained = train_two_stages(data, design.setting, 1, checkpoint=design.checkpoint)
    pretrain, updated = Optimum(trained.pretrain, Dense()), trained.finetuned["updated"]
    optimum = Chain([pretrain, Proximal(updated, ALPHA, Dense())], progress=False)
    expected = optimum.scores(trained.test)[0].values.numpy()
    found = run.column(kind="grid", way="pull", n=12, k=OPTIMUM)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)

    start = design.start(trained.pretrain, design.fresh_head(data, 1), data)
    path = descend(start, SGD(0.1), 2, start.size, 0, progress=False)
    expected = Chain([pretrain, Unrolled(start, path)], progress=False).scores(trained.test)[0]
    found = run.column(kind="grid", way="plain", n=12, k=2)
    np.testing.assert_allclose(found, expected.values.numpy(), rtol=1e-6, atol=1e-9)


def test_every_way_and_cell_is_there_once(design: Design, run: Run) -> None:
    cells = [(row["way"], row["n"], row["k"]) for row in run.rows if row["kind"] == "grid"]
    expected = [(way, n, k) for way in WAYS for n in (12, 24) for k in (1, 2)]
    expected += [("pull", n, OPTIMUM) for n in (12, 24)]
    assert sorted(map(str, cells)) == sorted(map(str, expected))
    assert len(run.indefinite) == 4 and len(run.sharpest) == 2
    # Pretraining and both cases, for each size; then the optima at both α.
    assert len(run.converged) == 2 * 3 + 2
    for row, scores in zip(run.rows, run.scores.T):
        assert row["size"] == pytest.approx(np.abs(scores).mean())


def test_an_unchanged_filter_predicts_the_optimum_itself(design: Design, run: Run) -> None:
    results = Results(design, {1: run})
    at_optimum = results.cell("pull", 12, OPTIMUM)
    for times in (1, 2):
        unchanged = results.logs(kind="alpha", times=times, alpha=ALPHA)
        assert unchanged == pytest.approx(at_optimum, abs=1e-6)
    measured = results.logs(kind="alpha measured", alpha=ALPHA)
    assert measured == pytest.approx(at_optimum, abs=1e-4)
    # A stronger pull keeps more of what pretraining gave.
    assert results.logs(kind="alpha measured", alpha=0.3) > at_optimum


def test_a_finetuning_that_diverges_is_said_to(design: Design) -> None:
    long = dataclasses.replace(design, learning_rate=1e9, grid_steps=(1, 20))
    with pytest.raises(FloatingPointError, match="diverges"):
        run_seed(long, 1)


def known(shift: float) -> Run:
    """Logarithms of size: −1 a doubling of examples, −2 a doubling of steps, and `shift`."""
    run = Run()
    for way in WAYS:
        for n in (0, 1):
            for k in (0, 1, OPTIMUM):
                steps = 3 if k == OPTIMUM else k
                run.rows.append({"kind": "grid", "way": way, "n": 12 * 2**n,
                                 "k": k if k == OPTIMUM else 2**k,
                                 "size": np.exp(shift - n - 2 * steps)})  # fmt: skip
    for changed, size in (("S", -6.5), ("b", -6.2)):
        run.rows.append({"kind": "swapped", "small": 12, "large": 24, "changed": changed,
                         "size": np.exp(shift + size)})  # fmt: skip
    run.rows += [{"kind": "case 1", "n": 12 * 2**n, "size": np.exp(0.1 * n)} for n in (0, 1)]
    for times in (1, 2):
        for alpha in (ALPHA, 0.3):
            run.rows.append({"kind": "alpha", "times": times, "alpha": alpha,
                             "size": np.exp(shift - 6 + times * (alpha == 0.3))})  # fmt: skip
        run.rows += [{"kind": "steps", "times": times, "k": k,
                      "size": np.exp(shift - times * (k - 1))} for k in (1, 2)]  # fmt: skip
    run.rows += [{"kind": "alpha measured", "alpha": alpha,
                  "size": np.exp(shift - 6 + 2 * (alpha == 0.3))}
                 for alpha in (ALPHA, 0.3)]  # fmt: skip
    run.rows = [{"seed": int(shift), **row} for row in run.rows]
    return run


def test_what_the_rows_say(design: Design) -> None:
    results = Results(design, {2: known(2.0), 1: known(1.0)})
    summary = results.summary("pull")
    assert np.log(summary["C"]) == pytest.approx(1.5)
    assert np.log(summary["D"]) == pytest.approx(-1.5)
    logs = {what: np.log(summary[what].value) for what in ("both", "examples", "steps")}
    assert logs == pytest.approx({"both": -3.0, "examples": -1.0, "steps": -2.0})
    swaps = {name: np.log(found.value) for name, found in results.swaps(12, 24).items()}
    assert list(swaps.values()) == pytest.approx([-1.0, -0.5, -0.2, 0.1])
    assert beside_row("x", "pull", summary, 2, {"steps": "k"})["k"].startswith("0.14 [")


def test_how_far_predictions_are_off(design: Design) -> None:
    off = Results(design, {2: known(2.0), 1: known(1.0)}).factors_off()
    alpha = {name: np.log(value) for name, value in off["another α"].items()}
    assert alpha == pytest.approx({"no change": 2.0, "filter once": 1.0, "filter twice": 0.0})
    assert np.log(off["fewer steps, new head"]["filter once"]) == pytest.approx(np.sqrt(0.5))
    assert off["fewer steps, new head"]["filter twice"] == pytest.approx(1.0)
