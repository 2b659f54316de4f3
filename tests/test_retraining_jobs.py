"""Retraining in several processes, on a Dask cluster, and from where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from distributed.scheduler import KilledWorker
from problems import ALPHAS, F64, Problem
from torch import Tensor, nn

from msif_lib import Chain, Stage, cross_entropy, repetition
from msif_lib import retraining as module
from msif_lib.curvature import Hessian
from msif_lib.links import Frozen, Optimum, Proximal
from msif_lib.retraining import Retraining, RetrainingSettings, retrain_without
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.identity import ProblemIdentity
from msif_lib.support.jobs import _Shared, as_finished

REMOVALS = [[0], [4], [30], [3, 9, 11], list(range(5, 13)), [7], [8]]
TENSORS = ("losses", "losses_before", "converged", "gradient_norms", "evaluations")


def assert_same_bits(a: Retraining, b: Retraining) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.converged_before == b.converged_before


def retrain(problem: Problem, alpha: float | None = None, **settings) -> Retraining:
    settings = {"models_at_once": 2, "progress": False, "removals": REMOVALS} | settings
    first, second = settings.pop("stages", None) or problem.stages(alpha)
    link = Frozen(second) if alpha is None else Proximal(second, alpha)
    chain = Chain([Optimum(first), link], stationarity_tol=float("inf"), progress=False)
    names = {field.name for field in dataclasses.fields(RetrainingSettings)}
    how = RetrainingSettings(**{name: settings.pop(name) for name in names & set(settings)})
    test = settings.pop("test", problem.test_data)
    return retrain_without(chain, test=test, settings=how, **settings)


class Counter:
    """Wraps a function and counts its calls."""

    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the jobs that are trained in this process."""
    counter = Counter(module._Trainings.__call__)
    monkeypatch.setattr(module._Trainings, "__call__", lambda *args: counter(*args))
    return counter


@pytest.fixture
def factorised(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the Hessians that are factorised."""
    counter = Counter(repetition.AbsoluteInverse.__init__)
    monkeypatch.setattr(repetition.AbsoluteInverse, "__init__", lambda *args: counter(*args))
    return counter


# --- processes and threads -----------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
def test_two_processes_find_the_same_bits_as_one(convex, alpha):
    base = retrain(convex, alpha, jobs=1)
    assert base.converged.all()
    assert_same_bits(base, retrain(convex, alpha))
    assert_same_bits(base, retrain(convex, alpha, jobs=2))


def test_the_configuration_of_joblib_is_obeyed(convex):
    base = retrain(convex)
    for backend in ("threading", "multiprocessing", "loky"):
        with joblib.parallel_config(backend=backend, n_jobs=2):
            assert_same_bits(base, retrain(convex))
    with joblib.parallel_config(n_jobs=2):
        pids = {pid for _, pid in as_finished(lambda _: os.getpid(), range(6))}
        assert os.getpid() not in pids
        alone = {pid for _, pid in as_finished(lambda _: os.getpid(), range(6), jobs=1)}
        assert alone == {os.getpid()}


def test_models_and_losses_of_the_caller_s_own_reach_the_processes():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * self.inner(inputs)

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=F64, generator=generator)
    y = (x[:, 0] > 0).long()
    embedding = Doubled().double()
    stages = [
        Stage(
            embedding,
            nn.Linear(2, 2).double(),
            lambda outputs, targets: 3 * cross_entropy(outputs, targets),
            (x[part], y[part]),
            l2=0.3,
            regularizer=lambda named: 0.01 * sum((value**4).sum() for value in named.values()),
        )
        for part in (slice(0, 20), slice(20, 34))
    ]
    links = [Optimum(stages[0]), Frozen(stages[1])]
    chain = Chain(links, stationarity_tol=float("inf"), progress=False)
    found = [
        retrain_without(
            chain, [[0], [5], [7]], (x[34:], y[34:]),
            settings=RetrainingSettings(models_at_once=1, jobs=jobs), progress=False,
        )
        for jobs in (1, 2)
    ]  # fmt: skip
    assert_same_bits(*found)
    assert found[0].converged.all()


def test_threads_of_a_job_are_the_same_everywhere_and_put_back():
    def threads(_: int) -> int:
        return torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        for jobs in (1, 2):
            assert {count for _, count in as_finished(threads, range(4), jobs)} == {1}
            assert {count for _, count in as_finished(threads, range(4), jobs, threads=3)} == {3}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_what_jobs_share_is_pickled_once_and_without_what_a_view_leaves_out():
    whole = torch.randn(10_000, 3)
    shared = _Shared(lambda: whole[:5])
    kept = _Shared({"few": whole[:5], "parameter": nn.Parameter(torch.ones(2))})
    content = pickle.dumps(kept)
    assert len(content) < 10_000
    assert kept.__getstate__()[0] is kept.__getstate__()[0]
    again = pickle.loads(pickle.dumps(pickle.loads(content))).get()
    assert torch.equal(again["few"], whole[:5])
    assert isinstance(again["parameter"], nn.Parameter)
    assert shared.get()().shape == (5, 3)
    assert not len(shared._pickled), "what stays in the process is not pickled"


def test_an_error_in_a_job_is_the_caller_s():
    def work(number: int) -> int:
        if number == 2:
            raise FloatingPointError("job 2 has left the numbers")
        return number

    for jobs in (1, 2):
        with pytest.raises(FloatingPointError, match="job 2 has left"):
            list(as_finished(work, range(4), jobs))


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_retraining_goes_on_where_it_stopped(
    convex, tmp_path, trained, factorised, monkeypatch, error
):
    base = retrain(convex)
    assert (trained.calls, factorised.calls) == (5, 2)  # the reference, and 7 removals in twos
    original = module._Trainings.__call__

    def interrupted(self, removals):
        if removals == [[5, 6, 7, 8, 9, 10, 11, 12], [7]]:
            raise error
        return original(self, removals)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(module._Trainings, "__call__", interrupted)
        retrain(convex, checkpoint=tmp_path / "new" / "folder")
    trained.calls = factorised.calls = 0
    resumed = retrain(convex, checkpoint=tmp_path / "new" / "folder")
    assert (trained.calls, factorised.calls) == (2, 0)
    assert_same_bits(base, resumed)
    assert_same_bits(base, retrain(convex, checkpoint=tmp_path / "new" / "folder"))
    assert (trained.calls, factorised.calls) == (2, 0)


def test_other_removals_share_the_reference_and_the_factors(convex, tmp_path, trained, factorised):
    retrain(convex, checkpoint=tmp_path)
    trained.calls = factorised.calls = 0
    masks = torch.zeros(2, convex.spec.m, dtype=torch.bool)
    masks[0, 4] = masks[1, 0] = True
    found = retrain(convex, checkpoint=tmp_path, removals=[[2], [6], *masks])
    assert (trained.calls, factorised.calls) == (2, 0)
    assert_same_bits(found, retrain(convex, removals=[[2], [6], [4], [0]]))
    trained.calls = 0
    retrain(convex, checkpoint=tmp_path, removals=[[11, 9, 3], [5]])
    retrain(convex, checkpoint=tmp_path, removals=[[9, 11, 3], [5]])
    assert trained.calls == 1, "the order within a set is no difference"


def test_a_given_hessian_is_factorised_once_and_known_again(convex, tmp_path, trained, factorised):
    hessian = Hessian(convex.stages(ALPHAS[0])[0]).dense()
    settings = {"alpha": ALPHAS[0], "removals": [[0], [4]], "checkpoint": tmp_path}
    base = retrain(convex, **settings, first_hessian=hessian)
    assert (trained.calls, factorised.calls) == (2, 2)
    again = retrain(convex, **settings, first_hessian=hessian)
    assert_same_bits(base, again)
    retrain(convex, **{**settings, "removals": [[1]]}, first_hessian=hessian, damping=1e-3)
    assert factorised.calls == 2, "damping is added to what is there"
    retrain(convex, **settings, first_hessian=2 * hessian)
    assert factorised.calls == 3
    assert trained.calls == 2 + 2 + 2


def changed(problem: Problem, what: str) -> dict:
    """Settings that differ in one thing from those of `retrain`."""
    stages = list(problem.stages(ALPHAS[0]))
    if what.endswith("stage's parameters"):
        stage = stages[what.startswith("second")]
        stage.load_vector(stage.vector() + 1e-12)
    elif what.endswith("stage's data"):
        number = int(what.startswith("second"))
        inputs, targets = stages[number].data
        inputs = inputs.clone()
        inputs[3, 0] += 1e-12
        stages[number] = stages[number].with_data((inputs, targets))
    elif what == "loss":
        stages[0].loss = lambda outputs, targets: cross_entropy(1.001 * outputs, targets)
    elif what == "weight decay":
        stages[1].l2 *= 1.001
    elif what == "regularizer":  # neither its value nor its gradient differ at the parameters
        w = stages[0].embedding_vector()
        stages[0].regularizer = lambda named: (
            (torch.cat([v.flatten() for k, v in named.items() if k.startswith("emb")]) - w) ** 2
        ).sum()
    elif what == "test data":
        inputs, targets = problem.test_data
        return {"test": (inputs, targets.flip(0))}
    else:
        return {
            "renormalise": {"renormalise": True},
            "fraction": {"fraction": 0.5},
            "tol": {"tol": 2e-9},
            "max_evaluations": {"max_evaluations": 4999},
            "cold start": {"cold_start": problem.stages(ALPHAS[0])},
            "damping": {"damping": 1e-3},
            "threads": {"threads": 2},
        }[what]
    return {"stages": tuple(stages)}


@pytest.mark.parametrize(
    "what",
    [
        "first stage's parameters", "second stage's parameters", "first stage's data",
        "second stage's data", "loss", "weight decay", "regularizer", "test data", "renormalise",
        "fraction", "tol", "max_evaluations", "cold start", "damping", "threads",
    ],
)  # fmt: skip
def test_what_is_changed_is_trained_anew(convex, tmp_path, trained, what):
    settings = {"removals": [[0], [4]], "checkpoint": tmp_path}
    retrain(convex, ALPHAS[0], **settings)
    trained.calls = 0
    retrain(convex, ALPHAS[0], **settings)
    assert trained.calls == 0
    retrain(convex, ALPHAS[0], **settings, **changed(convex, what))
    assert trained.calls == 2
    retrain(convex, ALPHAS[1], **settings)
    assert trained.calls == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("msif_lib.support.fingerprint.RESULTS_VERSION", 0), ("torch.__version__", "0.1")],
)
def test_another_version_of_the_results_or_of_torch_trains_anew(
    convex, tmp_path, trained, monkeypatch, name, value
):
    retrain(convex, removals=[[0]], checkpoint=tmp_path)
    assert trained.calls == 2
    retrain(convex, removals=[[0]], checkpoint=tmp_path)
    assert trained.calls == 2
    monkeypatch.setattr(name, value)
    retrain(convex, removals=[[0]], checkpoint=tmp_path)
    assert trained.calls == 4


def test_every_key_holds_the_versions(mlp, monkeypatch):
    stage = mlp.stages()[0]

    def keys() -> list[str]:
        return [fingerprint(), fingerprint(torch.ones(2)), fingerprint(stage.identity())]

    before = keys()
    assert keys() == before
    for name, value in (
        ("msif_lib.support.fingerprint.RESULTS_VERSION", 0),
        ("torch.__version__", "0.1"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(name, value)
            assert not set(keys()) & set(before), name
    assert keys() == before


@pytest.mark.parametrize("damage", ["halved", "emptied", "one bit", "other bytes"])
def test_damaged_files_are_made_again(convex, tmp_path, trained, factorised, damage):
    base = retrain(convex, checkpoint=tmp_path)
    trained.calls = factorised.calls = 0
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 5 + 2 + 3, "jobs, factors, and what two stages and the test are known by"
    for file in files:
        content = bytearray(file.read_bytes())
        if damage == "one bit":
            content[len(content) // 2] ^= 1
        else:
            content = {"halved": content[: len(content) // 2], "emptied": b""}.get(
                damage, b"?" * 99
            )
        file.write_bytes(content)
    assert_same_bits(base, retrain(convex, checkpoint=tmp_path))
    assert (trained.calls, factorised.calls) == (5, 2)
    assert_same_bits(base, retrain(convex, checkpoint=tmp_path))
    assert (trained.calls, factorised.calls) == (5, 2)
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".lock", *files], "and leave nothing else"


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path)
    kept.put("name", {"x": torch.arange(3)})
    assert torch.equal(kept.get("name")["x"], torch.arange(3))
    assert torch.equal(torch.load(tmp_path / "name.pt")["x"], torch.arange(3))

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        kept.put("name", {"x": torch.zeros(3)})
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "name.pt"]
    assert kept.get("other") is None
    nowhere = Checkpoint(None)
    nowhere.put("name", {})
    assert nowhere.get("name") is None


def test_two_processes_write_one_checkpoint(convex, tmp_path, trained):
    base = retrain(convex, jobs=2, checkpoint=tmp_path)
    assert trained.calls == 0, "trained elsewhere, kept here"
    assert_same_bits(base, retrain(convex, checkpoint=tmp_path))
    assert trained.calls == 0


def test_digests_tell_structures_apart(mlp):
    x = torch.zeros(2, 3)
    different = [
        (), (x,), (x, x), ([x, x],), (x.T,), (x.int(),), ({"a": x},), ({"b": x},), (1,), (1.0,),
        ("1",), ([1], 2), ([1, 2],), (None,), (True,),
    ]  # fmt: skip
    assert len({fingerprint(*parts) for parts in different}) == len(different)
    assert fingerprint(x[:, :2]) == fingerprint(torch.zeros(2, 2))
    first, second = mlp.stages()
    assert first.identity().same(mlp.stages()[0].identity())
    assert not first.identity().same(second.identity())
    inputs, targets = first.data
    unaligned = torch.empty(inputs.numel() + 1, dtype=F64)[1:].view(inputs.shape).copy_(inputs)
    assert first.identity().same(first.with_data((unaligned, targets)).identity())


@pytest.mark.parametrize(
    ("dtype", "noise", "change"), [(F64, 1e-13, 1e-8), (torch.float32, 1e-6, 1e-4)]
)
def test_values_of_code_are_compared_within_rounding_each_on_its_own_scale(dtype, noise, change):
    values = torch.tensor([[3.0, 0.0, 1e-3, 1e6], [2.0, 0.5, 2e-3, 1.0]], dtype=dtype)
    kept = ProblemIdentity("one", [values])
    assert kept.same(ProblemIdentity("one", [values * (1 + noise)]))
    assert not kept.same(ProblemIdentity("two", [values]))
    assert not kept.same(ProblemIdentity("one", [values, values]))
    assert not kept.same(ProblemIdentity("one", [values[:, :3]]))
    assert not kept.same(ProblemIdentity("one", [values.to(torch.bfloat16)]))
    for place in ((0, 0), (0, 2), (1, 2)):  # beside a loss of a million
        changed = values.clone()
        changed[place] += change
        assert not kept.same(ProblemIdentity("one", [changed])), place
    lost = values / 0
    assert ProblemIdentity("one", [lost]).same(ProblemIdentity("one", [lost]))
    assert not ProblemIdentity("one", [lost]).same(ProblemIdentity("one", [-lost]))
    assert not ProblemIdentity("one", [lost]).same(kept)


# --- the sketch for larger models ----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
def test_larger_models_are_preconditioned_by_a_sketch(convex, alpha, monkeypatch, tmp_path):
    exact = retrain(convex, alpha, tol=1e-11)
    monkeypatch.setattr(repetition, "_DENSE_PARAMETERS", 0)
    monkeypatch.setattr("msif_lib.curvature.FEWEST_ROWS", 1)
    sketched = retrain(convex, alpha, tol=1e-11, checkpoint=tmp_path)
    assert sketched.converged.all()
    assert torch.allclose(exact.losses, sketched.losses, atol=1e-9)
    assert_same_bits(sketched, retrain(convex, alpha, tol=1e-11, jobs=2))
    monkeypatch.setattr(repetition, "_preconditioner", lambda *_: None)
    plain = retrain(convex, alpha, tol=1e-11)
    assert torch.allclose(exact.losses, plain.losses, atol=1e-9)
    assert sketched.evaluations.sum() < plain.evaluations.sum()


# --- a Dask cluster ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two workers, each a process, on ports of this machine that are free."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            local_directory=tmp_path_factory.mktemp("dask"),
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster),
    ):
        yield cluster


def deadly(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that is slow elsewhere, and kills its process where it finds a file that says so."""
    home = os.getpid()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if os.getpid() != home:
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder / "kill", folder / "killed")
                os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(outputs, targets)

    return loss


@pytest.mark.xdist_group("dask")
def test_a_dask_cluster_loses_a_worker_and_no_result(convex, cluster, tmp_path, monkeypatch):
    stages = convex.stages()
    for stage in stages:
        stage.loss = deadly(tmp_path)
    settings = {"stages": stages, "removals": [[i] for i in range(8)], "models_at_once": 1}
    base = retrain(convex, **settings)
    finished = []
    put = Checkpoint.put

    def put_and_kill(self, name, tensors):
        put(self, name, tensors)
        if name.startswith("problem-"):
            return
        finished.append(name)
        if len(finished) == 2 + 2:  # two factorised Hessians and two jobs
            assert not (tmp_path / "killed").exists()
            (tmp_path / "kill").touch()

    monkeypatch.setattr(Checkpoint, "put", put_and_kill)
    with joblib.parallel_config(backend="dask"):
        found = retrain(convex, checkpoint=tmp_path / "kept", **settings)
    assert (tmp_path / "killed").exists(), "a worker died, with jobs under way"
    assert len(set(finished)) == len(finished) == 2 + 9
    assert_same_bits(base, found)


@pytest.mark.xdist_group("dask")
def test_what_jobs_share_travels_once_on_dask(cluster):
    """The cluster is sent one task that holds it, and each worker unpickles it once."""

    class Loaded:
        times = 0

        def __init__(self) -> None:
            self.payload = np.random.default_rng(0).standard_normal(300_000)

        def __setstate__(self, state: dict) -> None:
            self.__dict__.update(state)
            type(self).times += 1

        def __call__(self, number: int) -> tuple[int, int]:
            time.sleep(0.05)
            return os.getpid(), type(self).times

    with warnings.catch_warnings(), joblib.parallel_config(backend="dask"):
        warnings.simplefilter("error")
        found = [result for _, result in as_finished(Loaded(), range(12))]
    assert {times for _, times in found} == {1}
    assert os.getpid() not in {pid for pid, _ in found}


@pytest.mark.xdist_group("dask")
def test_a_job_that_dask_gives_up_is_an_error_and_does_not_hang(cluster, monkeypatch):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)

    def work(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with joblib.parallel_config(backend="dask"), pytest.raises(KilledWorker, match="workers died"):
        list(as_finished(work, range(4)))
