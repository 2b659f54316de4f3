"""Growth, precision and the whole pretraining set: the records, and what memory depends on.

No time is asserted: the quick modes run, and their records hold what the book's page reads.
"""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks import growth, precision, pretraining_set
from msif_lib import SingleStageInfluence, Stage, StationarityWarning, cross_entropy
from msif_lib.solvers import MinRes, Solver, SolveReport, SolverWarning
from msif_lib.study.records import read_record

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "chapters" / "scale.ipynb"
pytestmark = [pytest.mark.xdist_group("scale"), pytest.mark.numeric]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of the quick modes."""
    out = tmp_path_factory.mktemp("records")
    quick = ["--quick", "--threads", "1", "--out", str(out)]
    growth.main(quick)
    precision.main(quick)
    pretraining_set.main([*quick, "--cache", str(out / "cache")])
    return out


def values_of(folder: Path, name: str) -> dict[str, Any]:
    record = read_record(folder / f"{name}.json")
    assert record["section"] == "benchmarks" and record["seeds"] == [0]
    assert {"commit", "date", "device", "packages"} <= set(record["provenance"])
    assert record["values"]["machine"]["cores"] >= 1
    assert record["parameters"]["threads"] == 1
    assert str(ROOT) not in str(record) and str(folder) not in str(record)
    return record["values"]


def test_the_record_of_growth_holds_every_sweep(folder: Path) -> None:
    values = values_of(folder, "growth")
    assert list(values["time"]) == ["m", "n", "p", "T"]
    for sweep in values["time"].values():
        for task in sweep["tasks"].values():
            assert len(task["seconds"]) == len(sweep["sizes"]) >= 3
            assert len(task["steps"]) == len(sweep["sizes"]) - 1
            assert all(
                0 < low <= middle <= high
                for low, middle, high in zip(task["lowest"], task["seconds"], task["highest"])
            )
            assert task["low"] <= task["exponent"] <= task["high"]
    assert values["time"]["p"]["sizes"] == sorted(values["time"]["p"]["sizes"])
    points = values["memory"]["points"]
    assert [point["examples"] for point in points] == [20, 40]
    assert all(point["peak_megabytes"] >= point["before_megabytes"] > 0 for point in points)
    assert values["memory"]["data_megabytes_an_example"] == 8 * 8 * 4 / 2**20


def test_an_exponent_is_that_of_the_power_law() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    exact = growth.fit(sizes, [3 * size**1.5 for size in sizes])
    assert exact["exponent"] == pytest.approx(1.5) == exact["upper"]
    assert exact["standard_error"] == pytest.approx(0, abs=1e-6)
    # A fixed cost of a call lowers the exponent, of the smaller sizes most.
    fixed = growth.fit(sizes, [2 + size for size in sizes])
    assert fixed["steps"] == sorted(fixed["steps"])
    assert fixed["exponent"] < fixed["upper"] < 1
    assert fixed["low"] < fixed["exponent"] < fixed["high"]


def test_images_come_from_the_file_as_they_were_written(tmp_path: Path) -> None:
    growth.write_images(tmp_path / "images", 1003, (1, 2, 3), seed=0)
    data = growth.ImageFile(tmp_path / "images", (1, 2, 3))
    assert len(data) == 1003
    written = np.fromfile(tmp_path / "images", np.float32).reshape(-1, 1, 2, 3)
    for index in (0, 7, 1002):
        image, target = data[index]
        assert np.array_equal(image, written[index]) and int(target) == index % growth.CLASSES


class Counted(Dataset):
    """Examples of which it is noted how many are asked for at once."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        self.read: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        self.read.append(list(indices))
        return [self[index] for index in indices]


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("size", [64, 256])
def test_no_more_examples_are_read_at_once_than_the_budget_allows(
    columns: int, size: int, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    targets = (inputs[:, 0] > 0).long()
    torch.manual_seed(0)
    embedding = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh()).double()
    modules = embedding, torch.nn.Linear(4, 2).double()
    data, budget = Counted(inputs, targets), 2**13
    stage = Stage(*modules, cross_entropy, data, l2=0.5, memory_budget=budget)
    chunk = stage.chunk_size
    assert 8 <= chunk < 64, "the budget must bind, whatever the size of the data"
    test = inputs[:columns], targets[:columns]
    with warnings.catch_warnings():
        # Not trained: what is read does not depend on it.
        warnings.simplefilter("ignore", StationarityWarning)
        warnings.simplefilter("ignore", SolverWarning)
        solver = MinRes()
        streamed = SingleStageInfluence(stage, solver, progress=False)
        scores = streamed.scores(test, per_test=True, out=tmp_path / "scores")
        most = max(len(indices) for indices in data.read)
        assert most <= chunk
        assert {index for indices in data.read for index in indices} == set(range(size))
        whole = Stage(*modules, cross_entropy, (inputs, targets), l2=0.5)
        wanted = SingleStageInfluence(whole, solver, progress=False).scores(test, per_test=True)
    assert torch.allclose(scores.values, wanted.values, rtol=1e-6, atol=1e-8)


def test_a_correlation_of_ranks_with_constant_scores_is_zero() -> None:
    wanted = torch.tensor([0.3, -1.0, 2.0, 2.0])
    assert precision.spearman(torch.zeros(4), wanted) == 0
    values = torch.tensor([1.0, 0.5, -2.0, 7.0])
    assert precision.spearman(values, wanted) == pytest.approx(spearmanr(values, wanted).statistic)


def test_the_record_of_precision_holds_every_setting(folder: Path) -> None:
    values = values_of(folder, "precision")
    assert set(values["regimes"]) == set(precision.REGIMES)
    names = [setting.name for setting in precision.SETTINGS]
    for regime in values["regimes"].values():
        assert all(one["condition"] >= 1 for one in regime["spectra"].values())
        for settings in regime["cases"].values():
            assert list(settings) == names
            # Float64 is right to its tolerance; what stops short of its own says so.
            assert settings["float64"]["error_of_the_scores"] < 1e-5
            assert settings["float64"]["converged"]
            for found in settings.values():
                if found["status"] == "ok":
                    assert len(found["residuals"]) == 2 == len(found["residuals_reported"])
                    assert found["converged"] or found["words"], "short of its tolerance, no word"
    good = values["regimes"]["well conditioned"]["cases"]
    for settings in good.values():
        assert settings["float32"]["error_of_the_scores"] < 1e-2
        assert max(settings["float32"]["residuals"]) < 2e-4


class Lost(Solver):
    """A solver of which nothing comes back."""

    def _solve(self, operator: Any, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        report = SolveReport("Lost", "A x = b", 0.0, 3, 3, (1.0,), (1.0,), False, message="is lost")
        return torch.zeros_like(b), report


def test_a_failed_solve_is_recorded_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(
        examples=60, tests=20, widths=[2, 2], tol=1e-3, seed=0, device="cpu"
    )
    problem = precision.build(precision.REGIMES["well conditioned"], options)
    monkeypatch.setattr(precision, "MinRes", lambda tol: Lost())
    for case in precision.CASES:
        found = precision.measure(case, precision.SETTINGS[0], problem, torch.ones(60), [])
        assert set(found) == {"status", "error"}
        assert found["status"] == "failed solve"
        assert "the solution is zero where the right-hand side is not" in found["error"]
        assert "float64" in found["error"]


def test_the_residual_of_a_right_hand_side_that_is_zero_is_a_number() -> None:
    zero = torch.zeros(3)
    assert precision.residual(torch.eye(3), zero, zero) == 0
    assert precision.residual(2 * torch.eye(3), torch.ones(3), torch.ones(3)) == pytest.approx(1)


def test_the_record_of_the_whole_set_holds_residuals_of_both_solvers(folder: Path) -> None:
    values = values_of(folder, "pretraining_set")
    assert (values["examples"], values["recipe_examples"]) == (60, 30)
    for case, systems in pretraining_set.CASES.items():
        one = values["cases"][case]
        assert list(one["recipe"]) == ["5", "20"]
        for run in (*one["recipe"].values(), one["ours"], one["tight"]):
            assert [solve["system"] for solve in run["solves"]] == list(systems)
            parts = run["seconds"]
            assert parts["total"] >= parts["solves"] > 0
        for target, solve in zip(one["targets"], one["ours"]["solves"]):
            assert solve["residual"] <= 1.1 * target
        for solve in one["tight"]["solves"]:
            assert solve["residual"] == pytest.approx(solve["residual_reported"], rel=0.2, abs=1e-5)
            assert solve["residual"] <= 1.2e-3
        # Of the recipe's 20 iterations each takes two products; it ends where ours is asked to.
        recipe = one["recipe"]["20"]["solves"]
        assert all(solve["iterations"] == 20 <= solve["products"] / 2 for solve in recipe)
        assert one["targets"] == pytest.approx([solve["residual"] for solve in recipe])


def test_trained_networks_are_kept(folder: Path) -> None:
    (kept,) = (folder / "cache").glob("pretraining-set-digits-*.pt")
    before = kept.stat().st_mtime_ns
    quick = ["--quick", "--threads", "1", "--out", str(folder / "again")]
    pretraining_set.main([*quick, "--cache", str(folder / "cache")])
    assert kept.stat().st_mtime_ns == before


def run_page(records: Path) -> dict[str, str]:
    """The code of the book's page on the records of a folder; what its text is given."""
    matplotlib.use("Agg")
    page = nbformat.read(PAGE, as_version=4)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-interactive")
        for cell in page.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, cell.id, "exec"), names)
                if "parameters" in cell.metadata.get("tags", []):
                    names["folder"] = str(records)
    plt.close("all")
    return names["kept"]


def test_the_page_says_what_was_not_measured(tmp_path: Path) -> None:
    kept = run_page(tmp_path)
    assert set(kept.values()) == {"not measured"}
    assert asked() == set(kept)


def test_the_page_is_made_from_the_records(folder: Path) -> None:
    kept = run_page(folder)
    missing = {name for name, text in kept.items() if text == "not measured"}
    assert missing == {name for name in kept if name.startswith(("cores", "two_", "threads_"))}
    assert kept["images"] == "60" and kept["recipe_images"] == "30"
    assert asked() == set(kept)


def asked() -> set[str]:
    """The numbers that the page's text shows."""
    page = nbformat.read(PAGE, as_version=4)
    text = "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    return set(re.findall(r"`scale:(\w+):s`", text))
