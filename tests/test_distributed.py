"""Two processes give the numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import Problem, relative_error
from sharded import half_a_sweep, results
from torch import Tensor

from msif_lib import FixedEmbeddingInfluence
from msif_lib.scale.sharding import initialise, shard
from msif_lib.solvers import MinRes
from msif_lib.support.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
# Sums over two shares are rounded in another order; solves magnify that by the condition number.
ROUNDING = 1e-10
# The file of the first stage's scores in a folder, and how far it has come.
SCORES, PROGRESS = "stage-0.npy", "stage-0.npy.progress"

pytestmark = pytest.mark.xdist_group("two processes")

Answers = tuple[dict[str, Tensor], dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, started once for all tests."""
    folder = tmp_path_factory.mktemp("sharded")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "tests" / "sharded.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[Answers]:
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


def test_every_result_is_that_of_one_process(both, mlp: Problem, tmp_path):
    expected = results(lambda stage: stage, mlp, tmp_path)
    for found, _ in both:
        assert list(found) == list(expected)
        errors = {
            name: relative_error(found[name].reshape(-1), exact.reshape(-1))
            for name, exact in expected.items()
        }
        assert {name: e for name, e in errors.items() if not e <= ROUNDING} == {}
        assert {name: values.shape for name, values in found.items()} == {
            name: values.shape for name, values in expected.items()
        }


def test_both_processes_hold_the_same_numbers_to_the_last_bit(both):
    (first, _), (second, _) = both
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_scores_of_two_processes_are_one_file(both, folder):
    for name in ("case 1", "case 2"):
        assert np.array_equal(np.load(folder / name / SCORES), both[0][0][f"{name}, on disk"])
    # Two steps, an interruption, two more.
    assert Checkpoint(folder / "whole").get(PROGRESS)["finished"] == 31
    exact = both[0][0]["case 1"]
    assert relative_error(torch.from_numpy(np.load(folder / "whole" / SCORES)), exact) <= ROUNDING


def test_one_process_goes_on_where_two_were_interrupted(both, folder, mlp, monkeypatch):
    out = folder / "half"
    assert Checkpoint(folder / "half").get(PROGRESS)["finished"] == 16
    stages = mlp.stages()
    influence = FixedEmbeddingInfluence(*stages, MinRes(tol=1e-13), progress=False)
    monkeypatch.setattr(MinRes, "solve", None)
    scores = influence.scores(mlp.test_data, out=out)
    assert relative_error(scores.values, both[0][0]["case 1"]) <= ROUNDING


def test_half_a_sweep_is_half_a_sweep(mlp, tmp_path):
    half_a_sweep(lambda stage: stage, mlp, tmp_path / "scores")
    assert Checkpoint(tmp_path / "scores").get(PROGRESS)["finished"] == 16


def test_the_processes_share_the_examples_out(both):
    (_, first), (_, second) = both
    shares = [json.loads(answers["share of examples"]) for answers in (first, second)]
    assert shares == [list(range(15)), list(range(15, 31))]
    assert [answers["to"] for answers in (first, second)] == ["range(0, 15)", "range(15, 31)"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("share", "ValueError: the target of example 28 is 3, outside the head's 3 classes 0..2"),
        ("test", "ValueError: test data: the target of example 28 is 3, outside"),
        ("derivative", "DerivativeError: the losses depend on "),
        ("gradient", "ValueError: the gradient of the loss of example 25 is not finite"),
        ("data", "ValueError: the processes hold different stages: parameters, number of examp"),
        ("fewer", "ValueError: the processes hold different stages"),
        ("parameters", "ValueError: the processes hold different stages"),
        (
            "damping",
            "ValueError: the processes were not given the same solver.damping of tr",
        ),
        ("solver", "ValueError: the processes were not given the same solver of training, solver."),
        ("curvature", "ValueError: the processes were not given the same curvature of training:"),
        (
            "link",
            "ValueError: the processes were not given the same decay of training, link of",
        ),
        ("time", "ValueError: the processes were not given the same time of training:"),
        ("other test", "ValueError: the processes were not given the same test:"),
        ("per_test", "ValueError: the processes were not given the same per_test:"),
        ("of", "ValueError: the processes were not given the same of:"),
        ("cotangent", "ValueError: the processes were not given the same cotangent:"),
        ("at_once", "ValueError: the processes were not given the same at_once:"),
        ("indices", "ValueError: the processes were not given the same indices:"),
        ("train", "ValueError: train takes a whole stage, not one whose examples are shared out"),
        ("a full disk, the first", "OSError: [Errno 28] no room"),
        ("a full disk, the second", "OSError: [Errno 28] no room"),
        ("a solve, the first", "FailedSolve: nothing was found"),
        ("a solve, the second", "FailedSolve: nothing was found"),
        ("derivatives, the first", "DerivativeError: one is missing"),
        ("derivatives, the second", "DerivativeError: one is missing"),
        ("found", "[0, tensor([1., 1.])]"),
        ("a file", "ValueError: out must be a folder for the scores of all stages, not the file"),
        ("elsewhere", "FileNotFoundError: [Errno 2] out: scores/stage-0.npy was written by the fi"),
        (
            "elsewhere again",
            "FileNotFoundError: [Errno 2] out: scores/stage-0.npy.solution.pt was written by the",
        ),
    ],
)
def test_what_one_process_sees_both_refuse(both, question, answer):
    for _, answers in both:
        assert answers[question].startswith(answer)


def test_an_error_that_cannot_be_told_as_it_is_is_a_value_error_elsewhere(both):
    for which in (0, 1):
        name = f"an odd error, the {('first', 'second')[which]}"
        assert both[which][1][name] == "Odd: one, other"
        assert both[1 - which][1][name] == "ValueError: one, other"


def test_a_process_outside_the_group_is_told_so(both):
    (_, first), (_, second) = both
    assert first["group"] == "nothing"
    assert second["group"] == "RuntimeError: this process is not in the process group given"


def test_without_processes_there_is_a_clear_error(mlp, monkeypatch):
    with pytest.raises(RuntimeError, match=r"no process group.*initialise\(\) first"):
        shard(mlp.stages()[0])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RuntimeError, match="start the script with torchrun --nproc-per-node 2"):
        initialise()
