"""What the pages on section 4.1 measure and say, on the smallest trainings that show it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from msif_lib.evaluation import Agreement, Estimate, compare
from msif_lib.solvers import ConjugateGradient, Dense, MinRes
from msif_lib.study.data.datasets import TwoStageData, two_stages
from msif_lib.study.experiments import agreement, step_size, trainings
from msif_lib.study.experiments.agreement import Run, Truth
from msif_lib.study.experiments.experiment import Setting, Trained, train_two_stages
from msif_lib.study.records import write_record

SETTING = Setting("mlp", (3,), l2_pretrain=0.2, l2_finetune=0.1, alpha=0.1, gradient_tol=1e-8)
TRUTH = Truth(1e-8)
SOLVER = Dense()


@pytest.fixture(scope="module")
def data() -> TwoStageData:
    return two_stages("digits", (0, 1), (2, 3), 24, 24, 12)


@pytest.fixture(scope="module")
def trained(data: TwoStageData) -> Trained:
    return train_two_stages(data, SETTING)


@pytest.fixture(scope="module")
def runs(trained: Trained) -> list[Run]:
    return agreement.measure(trained, 0, ["fixed", "updated"], SOLVER, 4, ["top", "random"], TRUTH)


def of(values: list[float], **where: str) -> Run:
    """A run whose truth is what influence says, and whose identity says the opposite."""
    effect = np.array(values)
    kinds = {"seed": 0, "case": "fixed", "selection": "top", **where}
    return Run(
        **kinds, indices=np.arange(len(effect)), effect=effect, baseline=-effect, change=effect,
        converged=1.0, evaluations=5.0,
    )  # type: ignore[arg-type] # fmt: skip


def test_each_solver_is_made_by_its_name() -> None:
    made = [agreement.make_solver(name, 1e-5, 7, 0.1) for name in ("minres", "cg", "dense")]
    assert [type(one) for one in made] == [MinRes, ConjugateGradient, Dense]
    assert all(one.damping == 0.1 for one in made)
    with pytest.raises(KeyError):
        agreement.make_solver("lu")


def test_the_largest_in_size_are_chosen_and_the_draw_follows_the_seed() -> None:
    effect = np.array([1.0, -3.0, 2.0, 0.0, -0.5])
    assert agreement.largest(effect, 2).tolist() == [1, 2]
    drawn = [agreement.chosen(effect, 3, ["random", "top"], seed) for seed in (1, 1, 2)]
    assert list(drawn[0]) == ["random", "top"] and drawn[0]["top"].tolist() == [1, 2, 0]
    assert drawn[0]["random"].tolist() == drawn[1]["random"].tolist()
    assert len(set(drawn[0]["random"])) == 3


def test_runs_hold_what_a_removal_of_one_example_shows(trained: Trained, runs: list[Run]) -> None:
    assert [(run.case, run.selection) for run in runs] == [
        (case, name) for case in ("fixed", "updated") for name in ("top", "random")
    ]
    for run in runs[::2]:
        chain = trained.influence(run.case, SOLVER)
        effect = chain.scores(trained.test).removal_effect
        assert np.allclose(run.effect, effect[torch.from_numpy(run.indices)])
        assert np.abs(run.effect).min() >= np.sort(np.abs(effect.numpy()))[-4] - 1e-15
        alone = TRUTH.change(chain, run.indices[:1], trained.test)
        assert np.allclose(alone, run.change[:1], rtol=1e-5)
        small = TRUTH.change(chain, run.indices, trained.test, 1e-3)
        assert np.allclose(small, run.effect, rtol=0.01)
        assert run.converged == 1 and run.evaluations > 0


def test_the_convention_of_the_prediction_is_that_of_the_truth(trained: Trained) -> None:
    chain = trained.influence("fixed", SOLVER)
    scores = chain.scores(trained.test)
    truth = Truth(1e-8, renormalise=True)
    assert truth.predicted(scores).tolist() == scores.removal_effect_renormalised.tolist()
    indices = agreement.largest(truth.predicted(scores), 3)
    change = truth.change(chain, indices, trained.test, 1e-3)
    # A whole example less of m makes the others' weights larger by m / (m − 1), a part hardly.
    m = trained.pretrain.size
    assert np.allclose(change, truth.predicted(scores)[indices] * (m - 1) / m, rtol=0.01)


def test_rows_of_a_record_are_one_a_method(runs: list[Run]) -> None:
    rows = [row for run in runs for row in run.rows()]
    assert [row["method"] for row in rows[:2]] == ["influence", "identity"]
    assert set(rows[0]) == {"seed", "case", "selection", "method", "agreement", "converged"}
    assert rows[0]["agreement"] == compare(runs[0].effect, runs[0].change)


def test_claims_carry_the_names_of_the_comparison(runs: list[Run]) -> None:
    found = agreement.claims(runs)
    assert set(found) == {
        "r_fixed_top", "r_fixed_random", "r_updated_top", "r_updated_random", "r_identity_top",
    }  # fmt: skip
    assert found["r_fixed_top"]["seeds"] == 1
    assert found["r_fixed_top"]["value"] == runs[0].agreements["influence"].pearson.value
    assert set(agreement.claims(runs[3:])) == {"r_updated_random"}


def test_seeds_are_averaged_on_fishers_scale() -> None:
    found = agreement.over_seeds([Estimate(0.9, 0.8, 1.0), Estimate(0.5, 0.4, 0.6)])
    assert found["value"] == pytest.approx(np.tanh((np.arctanh(0.9) + np.arctanh(0.5)) / 2))
    assert -1 < found["low"] < found["value"] < found["high"] < 1 and found["seeds"] == 2
    assert agreement.over_seeds([Estimate(0.9, 0.8, 1.0)]) == {
        "value": 0.9, "low": 0.8, "high": 1.0, "seeds": 1,
    }  # fmt: skip


def test_sentences_say_what_the_runs_show() -> None:
    good, bad = of([1, 2, 3, 5]), replace(of([1, 2, 3, 5], case="updated"), change=-np.arange(4.0))
    said = agreement.answer([good, bad])
    assert (
        "In case 1, embedding fixed, predicted and true change correlate at **r = 1.000**" in said
    )
    assert "for the 4 examples of largest |I|" in said and "at -1.000; the paper has 0.60" in said
    assert "the paper has 0.46 on CIFAR-10" in said and said.endswith("Each number is of one seed.")
    both = agreement.answer([good, replace(good, seed=1)])
    assert "**r = 1.000 (1.000 to 1.000)**" in both and "the median over 2 seeds" in both
    told = agreement.below([good, bad], 0.95)
    assert told.startswith("Of 2 correlations of the influence function 1 are at least 0.95.")
    assert "Below it: case 2, top, r = -0.98" in told
    assert "Below" not in agreement.below([good], 0.95)


def test_a_training_that_missed_its_tolerance_is_named(trained: Trained) -> None:
    rows = agreement.reached(trained, 3)
    assert [row.stage for row in rows] == [
        "pretraining", "case 1, embedding fixed", "case 2, embedding updated",
    ]  # fmt: skip
    assert all(0 <= row.accuracy <= 1 and row.seed == 3 for row in rows)
    assert agreement.reached_in_words(rows) == "Every stage reached its tolerance at a minimum."
    missed = agreement.reached_in_words([replace(rows[0], converged=False), *rows[1:]])
    assert "(pretraining, seed 3)" in missed


def test_the_papers_solver_ends_at_the_residual_that_it_tells(
    trained: Trained, runs: list[Run]
) -> None:
    few, many = (
        agreement.paper_solver(trained, runs[:2], SOLVER, [0.0], count, 1e-10, TRUTH)
        for count in (2, 400)
    )
    assert [row["λ"] for row in few] == [0.0, None] and few[1]["error"] == 0
    assert few[0]["error"] > 0.01 > many[0]["error"]
    assert few[0]["products with H"] < many[0]["products with H"]
    assert few[1]["r"] == runs[0].agreements["influence"].pearson


def test_other_data_stand_beside_the_papers(runs: list[Run], tmp_path: Path) -> None:
    rows = [row for run in runs for row in run.rows()]
    write_record(tmp_path / "mine.json", "4.1", "digits", {"agreements": rows}, {}, [0], 1.0)
    write_record(tmp_path / "other.json", "4.1", "digits", {"linearity": []}, {}, [0], 1.0)
    shown = agreement.beside_the_paper(runs, "digits", tmp_path)
    assert [row["r, influence"] for row in shown[:3]] == ["0.60", "0.46", ""]
    assert [row["data"] for row in shown[3:]] == ["digits"] * 4 + ["mine (recorded)"] * 4
    assert [{**row, "data": ""} for row in shown[3:7]] == [{**row, "data": ""} for row in shown[7:]]


def test_a_smaller_step_brings_the_same_examples_nearer(trained: Trained, runs: list[Run]) -> None:
    (step,) = step_size.measure_step(trained, SETTING, 0, ["fixed"], SOLVER, 4, 0.01, TRUTH)
    assert np.array_equal(step.run.indices, runs[0].indices)
    assert abs(step.partial.slope.value - 1) < abs(step.whole.slope.value - 1)
    assert 0 < step.own < 1
    row = step.row()
    assert (row["widths"], row["weight decay"], row["case"]) == ("3", 0.2, "case 1")
    assert row["whole"] == runs[0].agreements["influence"]


def test_the_answer_on_the_step_follows_the_numbers() -> None:
    def agreed(r: float) -> Agreement:
        one = Estimate(r, r - 0.05, r + 0.05)
        return Agreement(one, one, one)

    run = replace(of([1, 2, 4]), change=np.array([1, 2.9, 6.5]))
    step = step_size.Step(SETTING, run, 0.3, agreed(0.3), agreed(0.96))
    better = replace(step, whole=agreed(0.8), setting=replace(SETTING, l2_pretrain=0.5))
    assert step.off == 1
    said = step_size.answer([better, step], 0.1)
    assert "Over 2 combinations" in said and "**r = 0.30 [0.25, 0.35]**: widths 3, weight" in said
    assert "weight decay 0.2, case 1" in said and "With 10 %" in said and "size of the step" in said
    assert "the scores are right to first order there" in said
    said = step_size.answer([replace(step, partial=agreed(0.5))], 0.1)
    assert "does not bring these points onto the line" in said


@pytest.fixture(scope="module")
def plain(trained: Trained) -> list[trainings.Plain]:
    return trainings.measure_plain(trained, 0, [0.5, 1.0], 4, 0.5, SOLVER, TRUTH)


def test_steps_follow_from_alpha(trained: Trained) -> None:
    stage = trained.finetuned["fixed"]
    rate, steps = trainings.fitting_steps(stage, 1e-3, 0.5, 1.0)
    assert steps == round(0.5 / (2e-3 * rate)) > 1
    assert trainings.fitting_steps(stage, 1e-3, 0.5, 0.5)[1] == pytest.approx(steps / 2, abs=1)
    assert trainings.fitting_steps(stage, 1e6, 0.5, 1.0) == (rate, 1)
    before = stage.vector().clone()
    tuned, path = trainings.finetuned_plainly(stage, rate, 0.5, 3, 0)
    assert stage.vector().equal(before) and not tuned.vector().equal(before)
    assert len(path.batches) == 3


def test_the_walk_back_predicts_plain_finetuning(plain: list[trainings.Plain]) -> None:
    assert [one.length for one in plain] == [0.5, 1.0] and plain[0].steps <= plain[1].steps
    for one in plain:
        assert one.through.pearson.value > 0.99 > one.optimum.pearson.value
    assert trainings.fitting(plain) == plain[1:]
    row = plain[0].row()
    assert {"seed", "length", "steps", "gradient norm", "optimum", "there", "through"} <= set(row)
    found = trainings.claims(plain)
    assert found["r_updated_plain_through_steps"]["value"] == plain[1].through.pearson.value
    assert set(found) == {"r_updated_plain", "r_updated_plain_through_steps"}
    assert trainings.claims([]) == {}


def test_pretraining_that_stops_early_is_walked_back(data: TwoStageData, trained: Trained) -> None:
    early, optimum = trainings.measure_early(trained, data, SETTING, 0, [3], 4, 0.05, SOLVER, TRUTH)
    assert early.stopped == "after 3 epochs of Adam" and optimum.stopped == "at the optimum"
    assert early.gradient_norm > 100 * optimum.gradient_norm
    assert early.partial is not None and early.partial.pearson.value > 0.99
    assert abs(early.partial.slope.value - 1) < 0.1
    assert (optimum.through, optimum.partial) == (None, None)
    assert optimum.row()["epochs"] is None and early.row()["epochs"] == 3
    said = trainings.answer([], [early, optimum])
    assert f"r is {early.same.pearson.value:.2f} for the formulas of an optimum" in said
    assert said.endswith(f"at the optimum the formulas have {optimum.same.pearson}.")


def test_answers_name_what_was_run(plain: list[trainings.Plain]) -> None:
    said = trainings.answer(plain, [])
    assert f"at **r = {plain[1].optimum.pearson.value:.2f}**" in said and "early" not in said
    assert trainings.answer([], []) == "Nothing was run: both numbers of removals are 0."


def test_recorded_plain_finetuning_is_read(plain: list[trainings.Plain], tmp_path: Path) -> None:
    values = {"plain": [one.row() for one in plain]}
    write_record(tmp_path / "mine.json", "4.1", "digits", values, {}, [0], 1.0)
    write_record(tmp_path / "none.json", "4.1", "digits", {"plain": []}, {}, [0], 1.0)
    (row,) = trainings.recorded(tmp_path)
    assert (row["data"], row["seeds"]) == ("mine (recorded)", 1)
    assert row["r, through the steps"] == f"{plain[1].through.pearson.value:.2f}"
