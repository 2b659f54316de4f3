"""The benchmarks measure what they say, with this library alone; no time is asserted."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from benchmarks import measure
from benchmarks.__main__ import TARGET, Runner
from benchmarks.libraries import METHODS
from benchmarks.libraries.base import Exact
from benchmarks.problems import SPECS, Problem, build, load
from benchmarks.reference import example_derivatives
from benchmarks.tables import OURS, markdown, number, report
from msif_lib.study.records import read_record

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.xdist_group("benchmarks")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny problem, trained."""
    return build(SPECS["tiny"], tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def tiny(path: Path) -> Problem:
    return load(path)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The whole command on the tiny problems, as a user gives it."""
    out = tmp_path_factory.mktemp("records")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", OURS]
    command += ["--repeats", "1", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"| {OURS}" in done.stdout
    return {path.stem: read_record(path) for path in out.iterdir()}


def flat_losses(problem: Problem) -> Any:
    model = problem.model
    named = dict(model.named_parameters())

    def losses(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        values = {k: part.view(named[k].shape) for k, part in zip(named, parts, strict=True)}
        outputs = functional_call(model, values, (problem.inputs,))
        return outputs.logsumexp(1) - outputs.gather(1, problem.targets[:, None])[:, 0]

    return losses, torch.cat([p.detach().flatten() for p in named.values()])


def test_the_independent_product_is_that_of_the_dense_matrix(tiny: Problem) -> None:
    losses, theta = flat_losses(tiny)
    matrix = (
        hessian(lambda v: losses(v).mean(), theta) + tiny.shift * torch.eye(len(theta)).double()
    )
    assert torch.allclose(tiny.product().dense(), matrix, rtol=1e-10, atol=1e-12)
    gradients = jacobian(losses, theta)
    derivatives = example_derivatives(tiny.model, tiny.inputs, tiny.targets, tiny.x)
    assert torch.allclose(derivatives, gradients @ tiny.x, rtol=1e-9, atol=1e-12)
    assert torch.allclose(tiny.scores, -gradients @ torch.linalg.solve(matrix, tiny.b))
    assert torch.allclose(tiny.b.norm(dim=0), torch.ones(tiny.b.shape[1]).double())


def test_a_problem_is_trained_once_and_is_what_its_name_says(path: Path, tiny: Problem) -> None:
    before = path.stat().st_mtime_ns
    assert build(SPECS["tiny"], path.parent) == path
    assert path.stat().st_mtime_ns == before
    assert tiny.facts["gradient_norm"] < 1e-5 and tiny.facts["lowest_eigenvalue"] > 0
    other = load(build(SPECS["tiny indefinite"], path.parent))
    assert other.facts["lowest_eigenvalue"] < 0
    eigenvalues = torch.linalg.eigvalsh(other.product().dense())
    assert float(eigenvalues[0]) == pytest.approx(other.facts["lowest_eigenvalue"], rel=1e-6)


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_damaged_problems_are_built_again_and_none_is_executed(path: Path, tmp_path: Path) -> None:
    good, mark = path.read_bytes(), tmp_path / "executed"
    planted = io.BytesIO()
    torch.save({"facts": Planted(mark)}, planted)
    half = bytearray(good)
    half[len(half) // 2] ^= 1
    for content in (b"", good[:-1], bytes(len(good)), bytes(half), planted.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="missing or damaged"):
            load(path)
    assert build(SPECS["tiny"], path.parent) == path
    assert torch.equal(load(path).x, load(build(SPECS["tiny"], tmp_path)).x)
    # A whole file of somebody else's.
    content = planted.getvalue()
    path.write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(pickle.UnpicklingError):
        load(path)
    path.write_bytes(good)
    assert not mark.exists()


def test_a_problem_that_is_not_what_it_should_be_is_refused(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPECS["tiny indefinite"], damping=1e-6)
    with pytest.raises(RuntimeError, match="lowest eigenvalue of A is -"):
        build(spec, tmp_path)


def test_a_record_has_every_row_with_its_provenance(records: dict[str, dict[str, Any]]) -> None:
    assert set(records) == {"tiny", "tiny-indefinite"}
    for record in records.values():
        assert record["section"] == "benchmarks" and record["seeds"] == [0]
        assert record["parameters"]["target"] == TARGET
        assert record["provenance"]["threads"] == 1 == record["parameters"]["threads"]
        assert {"commit", "date", "device", "packages"} <= set(record["provenance"])
        assert {"torch"} <= set(record["values"]["packages"])
        assert record["values"]["machine"]["cores"] >= 1
        for row in record["values"]["rows"]:
            assert row["status"] == "ok" and row["method"] == OURS
            assert row["ratio"] == 1 and row["median_seconds"] > 0
            assert row["peak"] >= row["baseline"] > 0
        assert report(record).startswith(f"## {record['dataset']}")
    tasks = [(row["task"], row["columns"]) for row in records["tiny"]["values"]["rows"]]
    assert tasks == [("solve", 1), ("solve", 16), ("score", 1), ("score", 16)]
    units = records["tiny"]["values"]["units"]
    assert units["forward_passes"]["forward"] == 1 and units["seconds_forward"] > 0
    text = str(records)
    assert str(ROOT) not in text and os.path.expanduser("~") + "/" not in text


def test_the_residuals_of_a_record_are_reached(records: dict[str, dict[str, Any]]) -> None:
    for record in records.values():
        for row in record["values"]["rows"]:
            assert row["pearson_lowest"] > 0.999
            if row["task"] == "solve":
                assert row["residual"] <= TARGET
                assert row["attempts"][-1]["residual"] <= TARGET
    said = records["tiny-indefinite"]["values"]["rows"][0]["words"]
    assert "negative curvature" in said[0]


def request(path: Path, method: str, task: str = "solve") -> dict[str, Any]:
    return {
        "problem": str(path), "method": method, "task": task, "columns": 2, "setting": 1e-3,
        "limit": 100, "threads": 1,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Twice(Exact):
    """A library that is off by a factor and claims nothing of the sort."""

    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        return 2 * torch.linalg.solve(problem.product().dense(), b)


@dataclasses.dataclass(frozen=True)
class Raises(Exact):
    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        raise ArithmeticError(f"no file {Path(__file__).resolve()}")


def test_a_wrong_answer_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "twice", Twice("twice", "torch", ()))
    result = measure.measure(request(path, "twice"))
    assert result["residual"] == pytest.approx(1.0)
    assert result["pearson_lowest"] == pytest.approx(1.0)  # which alone would hide it


def test_a_failure_is_recorded_with_its_reason(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "raises", Raises("raises", "torch", ()))
    result = measure.measure(request(path, "raises"))
    assert (result["status"], result["error"]) == (
        "failed",
        "ArithmeticError: no file test_benchmarks.py",
    )
    monkeypatch.setitem(METHODS, "absent", Raises("absent", "absent", ("no_such_library",)))
    result = measure.measure(request(path, "absent"))
    assert result["status"] == "not installed" and "no_such_library" in result["error"]


def test_what_takes_too_long_is_ended_and_recorded(path: Path) -> None:
    run = Runner(threads=1, timeout=0.05)
    result = run(**request(path, OURS))
    assert result == {"status": "timeout", "error": "more than 0 s"}


def test_tables_read_in_a_terminal() -> None:
    lines = markdown([{"a": "1", "b": "22"}, {"a": "333"}]).splitlines()
    assert lines == ["| a   | b  |", "|-----|----|", "| 1   | 22 |", "| 333 |    |"]
    assert [number(value) for value in (None, 0, 0.5, 12345.0, 2e-7)] == [
        "", "0", "0.5", "12,000", "2.0e-07",
    ]  # fmt: skip
