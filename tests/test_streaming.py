"""Scores that go to disk as they come, and data that are read a part at a time."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import ALPHAS, F64, Problem, check
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from msif_lib import (
    FixedEmbeddingInfluence,
    SingleStageInfluence,
    Stage,
    UpdatedEmbeddingInfluence,
    cross_entropy,
)
from msif_lib.solvers import Dense, Identity, MinRes, Solver, SolverWarning
from msif_lib.support import storage
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.data import Examples

pytestmark = pytest.mark.numeric
# The file of the first stage's scores in a folder.
SCORES = "stage-0.npy"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch between two writings, so that small problems have many."""
    monkeypatch.setattr(storage, "_BATCHES_A_STEP", 1)


class Counted(Dataset):
    """A data set that knows what was read of it, and breaks down after so many readings."""

    def __init__(self, data: tuple[Tensor, Tensor]) -> None:
        self.data = data
        self.read: list[int] = []
        self.strength = 10**9

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if len(self.read) == self.strength:
            raise KeyboardInterrupt
        self.read.append(int(index))
        return self.data[0][index], self.data[1][index]


def run(
    problem: Problem,
    alpha: float | None = None,
    solver: Solver = Dense(),  # noqa: B008 (frozen dataclass)
    **settings,
) -> FixedEmbeddingInfluence:
    settings = {"batch_sizes": (4, 13)} | settings
    first, second = problem.stages(alpha, **settings)
    if alpha is None:
        return FixedEmbeddingInfluence(first, second, solver, progress=False)
    return UpdatedEmbeddingInfluence(first, second, alpha, solver, progress=False)


def finished_of(out: Path) -> int:
    """The number of examples of the first stage that are scored in a folder."""
    return Checkpoint(out).get(f"{SCORES}.progress")["finished"]


def forbid_work(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Solving and scoring become errors."""

    def forbidden(*args, **kwargs):
        raise AssertionError("work is done twice")

    for owner, name in ((Dense, "solve"), (Stage, "directional_derivatives")):
        if name in names:
            monkeypatch.setattr(owner, name, forbidden)


# --- parts of the data ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensors", "data set", "loader"])
@pytest.mark.parametrize("chosen", [range(3, 9), range(9, 9), [7, 0, 7, 2, 5], None])
def test_batches_of_some_examples_read_no_others(form, chosen):
    x, y = torch.randn(11, 3), torch.arange(11)
    examples = Counted((x, y))
    data = {"tensors": (x, y), "data set": examples, "loader": DataLoader(examples)}[form]
    batches = list(Examples(data).batches(2, chosen))
    indices = list(range(11) if chosen is None else chosen)
    assert [len(targets) for _, targets in batches[:-1]] == [2] * (len(batches) - 1)
    assert torch.equal(torch.cat([x[:0], *(inputs for inputs, _ in batches)]), x[indices])
    assert [int(i) for _, targets in batches for i in targets] == indices
    if form != "tensors":
        assert examples.read == indices


def test_a_section_keeps_the_size_of_the_data(mlp):
    stage = mlp.stages()[0]
    rows = torch.cat(list(stage.per_example_gradients()))
    part = stage.section([30, 2, 2])
    check(torch.cat(list(part.per_example_gradients())), rows[[30, 2, 2]], 1e-12)
    assert part.size == stage.size == 31
    assert list(stage.reader.share) == list(range(31))


def padded(batch: list) -> tuple[Tensor, Tensor]:
    inputs = pad_sequence([x[:n] for x, n in batch], batch_first=True)
    return inputs, torch.stack([n for _, n in batch]) % 2


def test_batches_that_are_padded_each_to_its_own_length():
    """They can be scored; what needs them as one tensor says what to do."""

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1)[:, None] * self.weight

    lengths = torch.arange(1, 1031)
    examples = TensorDataset(torch.rand(1030, 1030, dtype=F64), lengths)
    loader = DataLoader(examples, collate_fn=padded)
    stage = Stage(Sum(), torch.nn.Linear(2, 2, dtype=F64), loss, loader, l2=0.1, batch_size=300)
    assert torch.cat(list(stage.directional_derivatives(stage.vector()[:, None]))).shape == (
        1030,
        1,
    )
    with pytest.raises(
        ValueError, match=r"differ in shape.*\(1024,\).*\(1030,\).*pads every batch"
    ):
        stage.to(torch.float32)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


# --- scores on disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
@pytest.mark.parametrize("per_test", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_scores_on_disk_are_those_in_memory(mlp, tmp_path, alpha, per_test, dtype):
    test = mlp.test_data[0].to(dtype), mlp.test_data[1]
    new = mlp.new_data[0].to(dtype), mlp.new_data[1]
    for name, of in (("all", None), ("new", new)):
        out = tmp_path / name
        influence = run(mlp, alpha, dtype=dtype)
        exact = influence.scores(test, per_test, of)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = influence.scores(test, per_test, of, out=str(out))
        assert scores.values.dtype == dtype
        assert scores.values.shape == exact.values.shape
        check(scores.values, exact.values, 1e-12 if dtype == F64 else 1e-5)
        assert np.array_equal(np.load(out / SCORES), scores.values.numpy())
        assert scores.of_training_set is (of is None)
        assert [report.solver for report in scores.solves] == ["Dense", "Dense"]
        scores.values.zero_()
        assert np.load(out / SCORES).any(), "what is done to the values stays in memory"


def test_an_interrupted_sweep_goes_on_where_it_stopped(mlp, tmp_path, monkeypatch):
    out = tmp_path / "scores"
    examples = Counted(mlp.pretraining_data)
    exact = run(mlp).scores(mlp.test_data, per_test=True).values

    def start() -> FixedEmbeddingInfluence:
        first, second = mlp.stages(batch_sizes=(4, 13))
        first = Stage(first.embedding, first.head, first.loss, examples, first.l2, 4)
        return FixedEmbeddingInfluence(first, second, Dense(), progress=False)

    examples.strength = 10**9
    influence = start()
    solved = dict(influence._back(influence._call(mlp.test_data, True, None, None)))
    for number, link in enumerate(influence.links):
        monkeypatch.setattr(type(link), "pull_back", lambda *args, one=solved[number]: one)
    examples.read.clear()
    # Read once for the key and once to see that the stage is as it was; one more example to try
    # vmap with; then the sweep.
    known = 2 * 31
    examples.strength = known + 1 + 18
    with pytest.raises(KeyboardInterrupt):
        influence.scores(mlp.test_data, per_test=True, out=out)
    assert finished_of(out) == 16
    check(torch.from_numpy(np.load(out / SCORES))[:16], exact[:16], 1e-12)
    assert not np.load(out / SCORES)[16:].any()

    examples.strength = 10**9
    again = start()
    examples.read.clear()
    forbid_work(monkeypatch, "solve")
    scores = again.scores(mlp.test_data, per_test=True, out=out)
    assert examples.read[known + 1 :] == list(range(16, 31)), "what was scored is not read again"
    check(scores.values, exact, 1e-12)
    assert [report.system for report in scores.solves] == ["A x = b", "A x = b"]
    assert not list(out.glob("*.part"))

    finished = start()
    examples.read.clear()
    forbid_work(monkeypatch, "directional_derivatives")
    check(finished.scores(mlp.test_data, per_test=True, out=out).values, exact, 1e-12)
    assert len(examples.read) == known


def test_an_interruption_before_the_sweep_keeps_the_solution(mlp, tmp_path, monkeypatch):
    out = tmp_path / "scores"
    with monkeypatch.context() as patch:
        forbid_work(patch, "directional_derivatives")
        with pytest.raises(AssertionError, match="twice"):
            run(mlp).scores(mlp.test_data, of=mlp.new_data, out=out)
    forbid_work(monkeypatch, "solve")
    scores = run(mlp).scores(mlp.test_data, of=mlp.new_data, out=out)
    check(scores.values, mlp.exact(None, of_new=True).sum(1), 1e-9)


def test_batching_does_not_change_what_a_file_belongs_to(mlp, tmp_path, monkeypatch):
    out = tmp_path / "scores"
    run(mlp).scores(mlp.test_data, out=out)
    forbid_work(monkeypatch, "solve", "directional_derivatives")
    loader = DataLoader(TensorDataset(*mlp.test_data), batch_size=4)
    scores = run(mlp, batch_sizes=(9, 5)).scores(loader, out=out)
    check(scores.values, mlp.exact(None).sum(1), 1e-9)


def test_a_file_of_another_problem_is_refused(mlp, tmp_path):
    out = tmp_path / "scores"
    run(mlp).scores(mlp.test_data, out=out)
    before = np.load(out / SCORES)
    x, y = mlp.test_data
    with pytest.raises(ValueError, match=r"^out: .* belongs to another problem"):
        run(mlp).scores((x + 1e-12, y), out=out)
    with pytest.raises(ValueError, match="another problem"):
        run(mlp).scores(mlp.test_data, per_test=True, out=out)
    with pytest.raises(ValueError, match="another problem"):
        run(mlp).scores(mlp.test_data, of=mlp.new_data, out=out)
    with pytest.raises(ValueError, match="another problem"):
        run(mlp, solver=Dense(damping=1e-9)).scores(mlp.test_data, out=out)
    with pytest.raises(ValueError, match="another problem"):
        run(mlp, ALPHAS[0]).scores(mlp.test_data, out=out)
    changed = run(mlp)
    changed.links[0].stage.load_vector(changed.links[0].stage.vector() + 1e-12)
    with pytest.raises(ValueError, match="another problem"):
        changed.scores(mlp.test_data, out=out)
    assert np.array_equal(np.load(out / SCORES), before)
    (out / f"{SCORES}.solution.pt").unlink()
    with pytest.raises(ValueError, match="a file beside it is missing; give another path"):
        run(mlp).scores(mlp.test_data, out=out)


def test_no_file_is_taken_for_finished_that_is_not(mlp, tmp_path, monkeypatch):
    """The scores are removed, what stands beside them is not, and the next sweep ends at once."""
    out = tmp_path / "scores"
    exact = run(mlp).scores(mlp.test_data, out=out).values.clone()
    (out / SCORES).unlink()
    with monkeypatch.context() as patch:
        forbid_work(patch, "directional_derivatives")
        with pytest.raises(AssertionError, match="twice"):
            run(mlp).scores(mlp.test_data, out=out)
    assert not np.load(out / SCORES).any()
    assert torch.equal(run(mlp).scores(mlp.test_data, out=out).values, exact)
    (out / f"{SCORES}.progress.pt").unlink()
    with pytest.raises(ValueError, match="a file beside it is missing"):
        run(mlp).scores(mlp.test_data, out=out)


def test_half_precision_is_kept_in_single(mlp, tmp_path):
    stage = mlp.stages(batch_sizes=(4, 13))[0].to(torch.bfloat16)
    v = torch.ones_like(stage.vector())
    file = storage.ScoresFile(Checkpoint(tmp_path), tmp_path / "scores.npy", "scores", "key")
    kept = storage.sweep(stage, v, file, progress=False)
    assert np.load(tmp_path / "scores.npy").dtype == np.float32
    assert torch.equal(kept, storage.sweep(stage, v, None, progress=False).float())


def test_paths_that_cannot_be_written_are_refused_before_any_work(mlp, tmp_path, monkeypatch):
    influence = run(mlp)
    forbid_work(monkeypatch, "solve")
    (tmp_path / "scores.csv").touch()
    with pytest.raises(ValueError, match=r"out must be a folder .*, not the file .*scores\.csv"):
        influence.scores(mlp.test_data, out=tmp_path / "scores.csv")
    with pytest.raises(ValueError, match=r"out: the folder .*nowhere does not exist"):
        influence.scores(mlp.test_data, out=tmp_path / "nowhere" / "scores")


def test_a_file_of_its_own_for_the_scores_of_the_first_stage(mlp, tmp_path, monkeypatch):
    out = tmp_path / "scores.npy"
    scores = run(mlp).scores(mlp.test_data, out=out)
    assert np.array_equal(np.load(out), scores.values.numpy())
    assert all(file.name.startswith("scores") for file in tmp_path.iterdir())
    forbid_work(monkeypatch, "solve", "directional_derivatives")
    assert torch.equal(run(mlp).scores(mlp.test_data, out=out).values, scores.values)


def test_a_score_that_is_not_finite_is_not_written(tmp_path):
    def root(outputs: Tensor, targets: Tensor) -> Tensor:
        """Its gradient is not finite where output and target are the same."""
        return (outputs - targets).abs().sum(1).sqrt()

    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(12, 2, dtype=F64, generator=g), torch.ones(12, 2, dtype=F64)
    x[9] = 0.0  # without a bias its output is 0 to the last bit, in whatever batch
    identity, head = torch.nn.Identity(), torch.nn.Linear(2, 2, bias=False, dtype=F64)
    stage = Stage(identity, head, root, (x, t), l2=0.1, batch_size=4)
    influence = SingleStageInfluence(stage, Dense(damping=5.0), 100, progress=False)
    t = t.clone()
    t[9] = 0.0
    out = tmp_path / "scores"
    with pytest.raises(FloatingPointError, match="the score of example 9 is not finite"):
        influence.scores((x[:2], t[:2]), of=(x, t), out=out)
    assert finished_of(out) == 8
    assert np.isfinite(np.load(out / SCORES)).all()


def test_a_solution_found_again_warns_again_and_at_the_caller(mlp, tmp_path):
    for _ in range(2):
        influence = run(mlp, solver=MinRes(max_iterations=2, precondition=False))
        with pytest.warns(SolverWarning, match="MinRes: stopped at the limit of 2") as caught:
            scores = influence.scores(mlp.test_data, out=tmp_path / "scores")
        assert [report.converged for report in scores.solves] == [False, False]
        assert len(caught) == 2
        assert {entry.filename for entry in caught} == {__file__}


def test_the_identity_is_no_failed_solve(mlp, tmp_path):
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(mlp, solver=Identity()).scores(mlp.test_data, out=tmp_path / "scores")


def test_few_batches_are_held_at_a_time(mlp, tmp_path):
    """Of data that are read from a source the sweep holds a batch or two, whatever their size."""
    alive = most = 0

    def ended() -> None:
        nonlocal alive
        alive -= 1

    def collate(batch: list) -> tuple[Tensor, Tensor]:
        nonlocal alive, most
        inputs, targets = (torch.stack(part) for part in zip(*batch, strict=True))
        weakref.finalize(inputs, ended)
        alive += 1
        most = max(most, alive)
        return inputs, targets

    x, y = mlp.pretraining_data
    many = TensorDataset(x.repeat(20, 1), y.repeat(20))
    loader = DataLoader(many, collate_fn=collate)
    influence = run(mlp)
    scores = influence.scores(mlp.test_data, of=loader, out=tmp_path / "scores")
    check(scores.values, influence.scores(mlp.test_data).values.repeat(20), 1e-9)
    assert most <= 4


# --- self-influence ------------------------------------------------------------------------------


def test_self_influence_of_chosen_examples_reads_no_others(mlp):
    """But once, to see that the stage is what its Hessian was made of."""
    stage = mlp.stages(batch_sizes=(4, 13))[0]
    examples = Counted(mlp.pretraining_data)
    stage = Stage(stage.embedding, stage.head, stage.loss, examples, stage.l2, 4)
    influence = SingleStageInfluence(stage, Dense(), progress=False)
    every = influence.self_influence().values
    examples.read.clear()
    assert torch.equal(influence.self_influence([]).values, every[:0])
    assert influence.self_influence([]).solves == ()
    assert examples.read == 2 * [*range(31)]
    examples.read.clear()
    check(influence.self_influence([30, 2, -3, 2], at_once=3).values, every[[30, 2, 28, 2]], 1e-12)
    assert examples.read == [*range(31), 30, 2, 28, 2]
    mask = torch.arange(31) % 7 == 3
    check(influence.self_influence(mask).values, every[mask], 1e-12)
    with pytest.raises(ValueError, match="31"):
        influence.self_influence([31])


def test_bars_count_examples(mlp, capsys, monkeypatch):
    import msif_lib.influence

    real = storage.tqdm

    def at_once(*args, **settings):
        return real(*args, **(settings | {"delay": 0, "leave": True}))

    for module in (storage, msif_lib.influence):
        monkeypatch.setattr(module, "tqdm", at_once)
    influence = SingleStageInfluence(mlp.stages(batch_sizes=(4, 13))[0], Dense(), progress=True)
    influence.scores(mlp.pretraining_data)
    assert "| 31/31 [" in capsys.readouterr().err
    influence.self_influence(at_once=10)
    assert "self-influence: 100%" in capsys.readouterr().err


def problem_with(loss, targets=None) -> SingleStageInfluence:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 3, dtype=F64, generator=g), torch.randint(2, (50,), generator=g)
    torch.manual_seed(0)
    data = x, y if targets is None else targets(y)
    stage = Stage(torch.nn.Identity(), torch.nn.Linear(3, 2).to(F64), loss, data, l2=0.3)
    return SingleStageInfluence(stage, Dense(), stationarity_tol=1e9, progress=False)


class Focal:
    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, outputs, targets):
        loss = cross_entropy(outputs, targets)
        return (1 - (-loss).exp()) ** self.power * loss


def test_another_loss_or_another_label_is_another_problem(tmp_path):
    """Losses that look alike in words, and a label mended in the midst of the data."""

    def mended(y):
        y = y.clone()
        y[23] = 1 - y[23]
        return y

    test = torch.ones(1, 3, dtype=F64), torch.tensor([1])
    for number, (first, second) in enumerate(
        [
            (problem_with(Focal(1.0)), problem_with(Focal(3.0))),
            (
                problem_with(lambda o, t: cross_entropy(o, t)),
                problem_with(lambda o, t: 2 * cross_entropy(o, t)),
            ),
            (problem_with(cross_entropy), problem_with(cross_entropy, mended)),
        ]
    ):
        out = tmp_path / str(number)
        first.scores(test, out=out)
        with pytest.raises(ValueError, match="belongs to another problem"):
            second.scores(test, out=out)
