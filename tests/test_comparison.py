"""Verdicts follow the rule that the page states, and the front page asks for what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from msif_lib.evaluation import Estimate
from msif_lib.study.experiments.comparison import (
    CLAIMS,
    Claim,
    Found,
    claim_of,
    compared,
    costs,
    effect,
    front,
    in_order,
    read_found,
    read_two_stage,
    row,
    seed_row,
    shown,
    verdict,
)
from msif_lib.study.records import read_record, write_record

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "results").glob("4.*/*.json"))

GAIN = Claim("gain", "4.2", "a gain", "0.2", paper=0.2)
DROP = Claim("drop", "4.4", "a ratio", "a half", paper=0.5, none=1.0, direction=-1)
# A printed number that an interval shuts out, whatever the size.
PRINTED = Claim("ratio", "4.4", "a ratio", "0.15", paper=0.15, none=1.0, direction=-1)
UNSTATED = Claim("r", "4.1", "a plot", "a plot")
BASELINE = Claim("identity", "4.1", "a baseline", "0.17", paper=0.17, none=None,
                 interval=(-0.03, 0.35))  # fmt: skip


def found(value: float, low: float, high: float, data: str = "cifar10", **more: object) -> Found:
    return Found("r_fixed_top", data, "", Estimate(value, low, high), 5, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("claim", "interval", "word"),
    [
        (GAIN, (0.1, -0.1, 0.3), "unclear"),
        (GAIN, (0.1, 0.0, 0.3), "unclear"),  # the end belongs to the interval
        (GAIN, (-0.3, -0.4, -0.1), "opposite"),
        (GAIN, (0.15, 0.1, 0.2), "reproduced"),
        (GAIN, (0.5, 0.4, 0.6), "stronger"),
        (GAIN, (0.1, 0.05, 0.15), "weaker"),
        (GAIN, (0.2, 0.2, 0.2), "no interval"),  # though it is the paper's number
        (DROP, (0.9, 0.7, 1.1), "unclear"),
        (DROP, (1.5, 1.2, 1.9), "opposite"),
        (DROP, (0.5, 0.4, 0.6), "reproduced"),
        (DROP, (0.3, 0.2, 0.4), "stronger"),
        (DROP, (0.8, 0.7, 0.9), "weaker"),
        (PRINTED, (0.34, 0.18, 0.65), "weaker"),
        (UNSTATED, (0.9, 0.8, 0.95), "not comparable"),
        (UNSTATED, (0.1, -0.1, 0.3), "not comparable"),
        (BASELINE, (0.1, -0.05, 0.3), "reproduced"),
        (BASELINE, (0.1, -0.6, 0.7), "unclear"),  # it would hold nearly any number
        (BASELINE, (0.4, 0.36, 0.5), "stronger"),
        (BASELINE, (-0.2, -0.3, -0.1), "weaker"),
    ],
)
def test_verdict(claim: Claim, interval: tuple[float, float, float], word: str) -> None:
    assert verdict(claim, found(*interval)) == word


def test_a_number_on_other_data_is_not_comparable() -> None:
    assert verdict(GAIN, found(0.15, 0.1, 0.2, data="digits")) == "not comparable"


def test_a_finetuning_that_diverged_is_said_to_have_diverged() -> None:
    assert verdict(GAIN, found(0.15, 0.1, 0.2, diverged=True)) == "diverged"
    assert row(found(0.15, 0.1, 0.2, diverged=True))["verdict"] == "diverged"
    assert row(found(0.15, 0.1, 0.2, data="digits", diverged=True))["effect"] == "diverged"


@pytest.mark.parametrize(
    ("claim", "interval", "word"),
    [
        (UNSTATED, (0.9, 0.8, 0.95), "seen"),
        (UNSTATED, (0.1, -0.1, 0.3), "not seen"),
        (UNSTATED, (-0.2, -0.3, -0.1), "opposite"),
        (DROP, (0.3, 0.2, 0.4), "seen"),
        (BASELINE, (0.4, 0.3, 0.5), ""),
        (UNSTATED, (0.9, 0.9, 0.9), ""),
    ],
)
def test_effect(claim: Claim, interval: tuple[float, float, float], word: str) -> None:
    assert effect(claim, found(*interval)) == word


def test_a_value_outside_its_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gain: 0.5 is not within its interval \[0.1, 0.2\]"):
        verdict(GAIN, found(0.5, 0.1, 0.2))


def test_every_claim_of_an_effect_has_the_papers_sign() -> None:
    for claim in CLAIMS:
        if claim.paper is not None and claim.none is not None:
            assert (claim.paper - claim.none) * claim.direction > 0, claim
        assert claim.paper is None or claim.data, claim


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.5, -0.1, 0.9), "0.50 [-0.10, 0.90]"),
        ((-0.001, -0.2, 0.2), "0.00 [-0.20, 0.20]"),
        ((0.998, 0.9942, 0.9991), "0.998 [0.994, 0.999]"),
        ((0.9989, 0.9986, 0.9991), "0.9989 [0.9986, 0.9991]"),
        ((0.88, -0.999999, 0.999999), "0.88 [<-0.99, >0.99]"),
        ((0.58, 0.08, 1.0), "0.58 [0.08, 1.00]"),
        ((0.4, 0.0, 129684.0), "0.40 [0.00, 1e+05]"),
    ],
)
def test_intervals_are_shown_in_few_digits(numbers: tuple[float, float, float], text: str) -> None:
    assert shown(Estimate(*numbers)) == text


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_record_is_read_with_what_it_was_measured_on(path: Path) -> None:
    record = read_record(path)
    for one in read_found(path):
        assert one.data == record["dataset"]
        assert one.seeds == len(record["seeds"])
        assert one.parameters is not None
        assert one.name.startswith(("r_", "cleansing", "nlp")) == bool(one.removals)


def test_parameters_are_counted_as_they_were_recorded(tmp_path: Path) -> None:
    counted = 0
    for path in RECORDS:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "architecture" in record["parameters"] and "sizes" in record["values"]:
            known = record["values"].pop("sizes")["p"]
            copy = tmp_path / path.name
            copy.write_text(json.dumps(record), encoding="utf-8")
            if name := record["values"].get("claims"):
                assert {one.parameters for one in read_found(copy)} == {known}, name
                counted += 1
    assert counted >= 5


def test_all_settings_that_were_tried_are_there() -> None:
    everything = in_order(one for path in RECORDS for one in read_found(path))
    case_1 = [one for one in everything if one.name == "r_fixed_top"]
    assert [one.label for one in case_1] == [
        "CIFAR-10", "CIFAR-10, 10,000 images", "MNIST", "MNIST, decay 0.04", "MNIST, decay 0.07",
    ]  # fmt: skip
    assert [compared(claim_of(one), one) for one in case_1] == [True, True, False, False, False]
    gain = next(one for one in everything if one.name == "cleansing_accuracy_gain_10")
    assert row(gain)["accuracy"] == "32 % (paper 58 %)"
    assert row(gain)["left out"] == "30 at once"


def test_the_benchmark_is_compared_with_nothing() -> None:
    people = read_two_stage(ROOT / "results" / "two_stage")
    assert {"two_stage_case_2", "two_stage_exact"} == {one.name for one in people}
    assert {verdict(claim_of(one), one) for one in people} == {"not comparable"}
    assert all(one.removals == "100 sets of 1 %" and one.accuracy for one in people)


def recorded(path: Path, seeds: list[int], curvature: float = 0.5) -> Path:
    claims = {"finetune_size_ratio": {"value": 0.5, "low": 0.4, "high": 0.6, "seeds": len(seeds)}}
    values = {"claims": claims, "learning_rate_times_largest_curvature": curvature, "grid": []}
    write_record(path, "4.4", "own:load", values, {"base_size": 1, "base_steps": 1}, seeds, 1.0)
    return path


def test_seeds_given_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the seed 3 twice"):
        read_found(recorded(tmp_path / "one.json", [3, 4, 3]))


def test_a_learning_rate_beyond_the_curvature_is_a_divergence(tmp_path: Path) -> None:
    (steady,) = read_found(recorded(tmp_path / "one.json", [3, 4]))
    (wild,) = read_found(recorded(tmp_path / "two.json", [3, 4], curvature=2.5))
    assert (steady.diverged, wild.diverged) == (False, True)
    assert (steady.parameters, steady.accuracy, steady.setting) == (None, None, "")


def test_few_seeds_leave_a_large_share_possible() -> None:
    record = read_record(ROOT / "results" / "4.1" / "cifar10.json")
    found = seed_row(record, "updated")
    assert found is not None and found["seeds"] == 5 and found["poor"] == 0
    # Of n seeds without one: 1 - 0.025^(1/n).
    assert found["at most"] == pytest.approx(1 - 0.025**0.2)
    assert seed_row({"values": {}}, "updated") is None


def test_what_is_not_there_costs_nothing(tmp_path: Path) -> None:
    assert costs(tmp_path) == []
    assert {row["machine"] for row in costs(ROOT / "results" / "benchmarks")}


def test_the_front_page_asks_for_what_notebooks_glue() -> None:
    """Sphinx would say so only when the book is rendered."""
    text = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"experiments/side_by_side\.ipynb::(\w+)", text))
    measured = [one for path in RECORDS for one in read_found(path)]
    texts = front(measured + read_two_stage(ROOT / "results" / "two_stage"))
    assert len(asked & texts.keys()) > 10
    for notebook, keys in (
        ("side_by_side", asked - texts.keys()),
        ("explorer", re.findall(r"\{glue:\} (\w+)\n:doc: experiments/explorer\.ipynb", text)),
    ):
        cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert keys
        for key in keys:
            assert f'glue("{key}"' in source, f"notebook {notebook} glues no {key}"
