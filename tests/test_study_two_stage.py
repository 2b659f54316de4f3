"""The benchmark's records are read as they were measured, and what was not is not made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msif_lib.evaluation import Estimate
from msif_lib.study.experiments.benchmark import (
    EXACT,
    OTHERS,
    Judged,
    methods_of,
    read_judged,
    spread,
)
from msif_lib.study.records import write_record


def row(method: str, share: float, value: float, **more: Any) -> dict[str, Any]:
    lds = {"value": value, "low": value - 0.1, "high": value + 0.1}
    plain = {"reading": "same seed", "slope": None, "trainings": 2.0, "group": "row"}
    return {"method": method, "share": share, "lds": lds, **plain, **more}


def put(folder: Path, name: str, *rows: dict[str, Any], **more: Any) -> None:
    values = {"rows": list(rows), "ceilings": [], **more}
    write_record(folder / f"{name}.json", "two_stage", name, values, {}, [0, 1], 1.0)


@pytest.fixture
def judged(tmp_path: Path) -> dict[str, Judged]:
    put(
        tmp_path,
        "cifar-adamw",
        row(EXACT[0], 0.05, 0.5),
        row(EXACT[0], 0.05, 0.4, reading=OTHERS),
        row("HYDRA", 0.05, 0.3, trainings=7.0),
        row("damped", 0.05, 0.2, group="budget"),
    )
    put(tmp_path, "digits-optimum", row(EXACT[1], 0.05, 0.9), row("TRAK", 0.05, 0.1))
    write_record(tmp_path / "smoothness.json", "two_stage", "digits", {"rows": []}, {}, [0], 1.0)
    return read_judged(tmp_path)


def test_settings_come_by_data_and_other_records_are_none(judged: dict[str, Judged]) -> None:
    assert list(judged) == ["digits-optimum", "cifar-adamw"]
    assert [one.as_usual for one in judged.values()] == [False, True]
    assert [one.exact for one in judged.values()] == [EXACT[1], EXACT[0]]


def test_a_measure_is_that_of_its_method_share_and_reading(judged: dict[str, Judged]) -> None:
    found = judged["cifar-adamw"]
    assert found.estimate(EXACT[0], 0.05) == Estimate(0.5, 0.4, 0.6)
    assert found.estimate(EXACT[0], 0.05, reading=OTHERS) == Estimate(0.4, 0.4 - 0.1, 0.5)
    assert found.cost("HYDRA") == 7.0
    assert found.estimate(EXACT[0], 0.2) is None  # a share that was not measured
    assert found.estimate("TRAK", 0.05) is None  # a method that was not
    assert found.estimate("HYDRA", 0.05, "slope") is None  # a method without a scale
    assert found.cost("TRAK") is None


def test_methods_come_in_the_order_of_the_records(judged: dict[str, Judged]) -> None:
    assert methods_of(judged.values()) == [EXACT[1], "TRAK", EXACT[0], "HYDRA"]
    assert methods_of(judged.values(), "budget") == ["damped"]


def test_a_spread_says_as_much_as_there_is() -> None:
    one, other = Estimate(0.9, 0.8, 1.0), Estimate(-0.25, -0.3, 0.1)
    assert spread([one, None, other]) == "-0.25 to 0.90"
    assert spread([one, Estimate(0.901, 0.8, 1.0)]) == "0.90"
    assert spread([Estimate(-0.001, -0.1, 0.1)]) == "0.00"
    assert spread([None]) == "not measured"
