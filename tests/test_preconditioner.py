"""The Gauss-Newton preconditioner: what it is, what it leaves unchanged, where there is none."""

from __future__ import annotations

import pytest
import torch
from problems import F64, Problem
from torch import nn

from msif_lib import Stage, cross_entropy
from msif_lib import preconditioner as module
from msif_lib.curvature import AddDiagonal, GaussNewton, Hessian, proximal_hessian
from msif_lib.preconditioner import GaussNewtonPreconditioner, gauss_newton_rows
from msif_lib.solvers import ConjugateGradient, Dense, MinRes

pytestmark = pytest.mark.numeric
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs - targets).pow(2).sum(1)


def untrained(examples: int = 40, loss=cross_entropy, l2: float = 0.01, **settings) -> Stage:
    """A tanh network far from any minimum, whose Hessian is indefinite."""
    g = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        embedding = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).to(F64)
        head = nn.Linear(6, 3).to(F64)
    with torch.no_grad():
        for parameter in [*embedding.parameters(), *head.parameters()]:
            parameter.mul_(3)
    x = torch.randn(examples, 4, dtype=F64, generator=g)
    y = torch.randint(3, (examples,), generator=g)
    if loss is squared_error:
        y = nn.functional.one_hot(y, 3).to(F64)
    return Stage(embedding, head, loss, (x, y), l2=l2, **settings)


@pytest.mark.parametrize("loss", [cross_entropy, squared_error])
def test_all_rows_together_are_the_gauss_newton_matrix(loss):
    stage = untrained(loss=loss, l2=0.0, batch_size=7)
    rows = gauss_newton_rows(stage, stage.vector(), 10_000, stage.parameters.all)
    assert len(rows) == 40 * 3
    assert torch.allclose(rows.T @ rows, GaussNewton(stage).dense(), **CLOSE)


def test_on_every_problem_all_rows_are_the_gauss_newton_matrix(problem: Problem):
    for stage in problem.stages():
        rows = gauss_newton_rows(stage, stage.vector(), 10_000, stage.parameters.all)
        exact = GaussNewton(stage).dense()
        own = GaussNewton(stage) @ torch.eye(len(exact), dtype=F64)
        assert torch.allclose(own, exact)
        if problem.spec.penalty or problem.spec.tilted:
            continue  # the penalty's own curvature is in GaussNewton and not in the rows
        difference = exact - stage.l2 * torch.eye(len(exact), dtype=F64)
        assert torch.allclose(rows.T @ rows, difference, **CLOSE)


def test_few_rows_have_the_trace_of_all():
    stage = untrained(loss=squared_error, l2=0.0)
    rows = gauss_newton_rows(stage, stage.vector(), 60, stage.parameters.all)
    exact = GaussNewton(stage).dense()
    # Half of the modes, chosen by chance since they are all alike: the trace is about right.
    assert float(rows.pow(2).sum()) == pytest.approx(float(exact.trace()), rel=0.2)


def test_ties_are_broken_by_chance_and_not_by_order():
    """A squared error has modes of one size; the first rows of sorted data would not do."""
    stage = untrained(examples=60, loss=squared_error, l2=0.0)
    inputs = stage.data[0].clone()
    inputs[:30] *= 1e-3  # these examples hardly touch the first layer
    stage = stage.with_data((inputs, stage.data[1]))
    rows = gauss_newton_rows(stage, stage.vector(), 60, stage.parameters.all)
    exact = GaussNewton(stage).dense()
    assert float(rows[:, :24].pow(2).sum()) > 0.3 * float(exact[:24, :24].trace())


@pytest.mark.parametrize("rows", [10, 200])
def test_the_root_is_a_root_of_the_inverse(rows):
    """S Sᵀ (D + RᵀR) = I, for fewer rows than parameters and for more."""
    g = torch.Generator().manual_seed(0)
    r = torch.randn(rows, 30, dtype=F64, generator=g)
    d = torch.rand(30, dtype=F64, generator=g) + 0.5
    p = torch.diag(d) + r.T @ r
    preconditioner = GaussNewtonPreconditioner.from_rows(r.clone(), d)
    eye = torch.eye(30, dtype=F64)
    root = preconditioner.root(eye)
    assert torch.allclose(preconditioner.root_transposed(eye), root.T, **CLOSE)
    assert torch.allclose(root @ root.T @ p, eye, rtol=1e-8, atol=1e-9)


def test_without_weight_decay_it_is_still_positive_definite():
    g = torch.Generator().manual_seed(0)
    preconditioner = GaussNewtonPreconditioner.from_rows(
        torch.randn(3, 20, dtype=F64, generator=g), torch.zeros(20, dtype=F64)
    )
    root = preconditioner.root(torch.eye(20, dtype=F64))
    assert root.isfinite().all()
    assert torch.linalg.eigvalsh(root @ root.T)[0] > 0


@pytest.mark.parametrize(
    ("block", "damping"), [("joint", 0.0), ("joint", 0.3), ("embedding", 0.3), ("head", 0.0)]
)
def test_it_changes_the_iterations_and_not_the_solution(problem: Problem, block, damping):
    if block != "joint" and problem.spec.family == "convex":
        pytest.skip("the blocks of the tanh networks are enough")
    stage = problem.stages()[0]
    hessian = Hessian(stage, block=block)
    g = torch.Generator().manual_seed(5)
    b = torch.randn(hessian.shape[0], 3, dtype=F64, generator=g)
    exact = Dense(damping=damping).solve(hessian, b).x
    solution = MinRes(tol=1e-10, damping=damping).solve(hessian, b)
    assert solution.report.converged
    assert solution.report.preconditioner.startswith("Gauss-Newton, rank ")
    assert (solution.x - exact).norm() <= 1e-6 * exact.norm()
    plain = MinRes(tol=1e-10, damping=damping, precondition=False).solve(hessian, b)
    assert plain.report.preconditioner == "none"
    assert (plain.x - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.filterwarnings("ignore::msif_lib.solvers.SolverWarning")  # some are indefinite
@pytest.mark.parametrize("alpha", [1e-3, 1.0])
def test_the_proximal_hessian_has_its_pull_in_the_preconditioner(problem: Problem, alpha):
    stage = problem.stages(alpha=0.07)[1]
    k = proximal_hessian(stage, alpha)
    b = torch.ones(k.shape[0], dtype=F64)
    exact = Dense().solve(k, b).x
    solution = MinRes(tol=1e-10).solve(k, b)
    assert solution.report.converged
    assert solution.report.preconditioner.startswith("Gauss-Newton")
    assert (solution.x - exact).norm() <= 1e-6 * exact.norm()


def test_where_outputs_are_linear_in_the_parameters_it_is_the_hessian():
    """A linear model: Gauss-Newton is the Hessian, and one or two iterations do."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(80, 5, dtype=F64, generator=g)
    y = torch.randint(3, (80,), generator=g)
    stage = Stage(nn.Identity(), nn.Linear(5, 3).to(F64), cross_entropy, (x, y), l2=0.01)
    b = torch.randn(18, 1, dtype=F64, generator=g)
    assert MinRes(tol=1e-10).solve(Hessian(stage), b).report.iterations <= 2
    assert MinRes(tol=1e-10, precondition=False).solve(Hessian(stage), b).report.iterations > 5


def test_an_indefinite_hessian_is_solved_and_said_to_be_indefinite():
    stage = untrained()
    hessian = Hessian(stage)
    values = torch.linalg.eigvalsh(hessian.dense())
    assert values[0] < -0.02, "the problem must be indefinite for this test to say anything"
    root = hessian.preconditioner().root(torch.eye(len(values), dtype=F64))
    assert torch.linalg.eigvalsh(root @ root.T)[0] > 0
    b = torch.ones(len(values), 2, dtype=F64)
    b[:5, 1] = -1
    with pytest.warns(UserWarning, match="met negative curvature.*solved to the tolerance"):
        solution = MinRes(tol=1e-9).solve(hessian, b)
    with pytest.warns(UserWarning, match="not positive definite"):
        exact = Dense().solve(hessian, b)
    assert solution.report.converged
    assert solution.report.negative_curvature
    assert (solution.x - exact.x).norm() <= 1e-6 * exact.x.norm()


def test_float32():
    stage = untrained(l2=0.1).to(torch.float32)
    hessian = Hessian(stage)
    b = torch.ones(hessian.shape[0])
    solution = MinRes(tol=1e-4, damping=1.0).solve(hessian, b)
    exact = Dense(damping=1.0).solve(Hessian(stage.to(F64)), b.double())
    assert solution.report.converged
    assert (solution.x - exact.x).norm() <= 1e-3 * exact.x.norm()


class Two(nn.Module):
    """A head with two outputs of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x), x.sum(1)


def test_there_is_none_where_it_would_not_pay(monkeypatch):
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(2, (6,))
    wide = Stage(nn.Identity(), nn.Linear(4, 200).to(F64), cross_entropy, (x, y), l2=0.1)
    several = Stage(
        nn.Identity(), Two().to(F64), lambda o, t: cross_entropy(o[0], t), (x, y), l2=0.1
    )
    flat = Stage(
        nn.Identity(), nn.Linear(4, 2).to(F64), lambda o, t: o[:, 0] * (t + 1), (x, y), l2=0.1
    )
    for stage in (wide, several, flat):
        hessian = Hessian(stage)
        assert hessian.preconditioner() is None
        b = torch.ones(hessian.shape[0], dtype=F64)
        solution = MinRes(tol=1e-10).solve(hessian, b)
        assert solution.report.preconditioner == "none"
        assert (hessian @ solution.x - b).norm() <= 1e-9 * b.norm()
    stage = untrained()
    assert Hessian(stage).preconditioner() is not None
    monkeypatch.setattr("msif_lib.curvature._PRECONDITIONER_MEMORY", 8 * 51 * 15)
    assert Hessian(stage).preconditioner() is None  # room for fifteen rows of 51 numbers
    assert AddDiagonal(GaussNewton(stage), torch.ones(51, dtype=F64)).preconditioner() is None


def test_a_model_that_cannot_be_vectorised_goes_without():
    class Loops(nn.Module):
        def forward(self, x):
            return torch.stack([row * float(row.detach().sum() > -1e9) for row in x])

    x, y = torch.randn(30, 4, dtype=F64), torch.randint(3, (30,))
    stage = Stage(Loops(), nn.Linear(4, 3).to(F64), cross_entropy, (x, y), l2=0.1)
    hessian = Hessian(stage)
    assert hessian.preconditioner() is None
    assert MinRes().solve(hessian, torch.ones(15, dtype=F64)).report.converged


def test_it_is_made_once_for_each_damping(mlp: Problem):
    hessian = Hessian(mlp.stages()[0])
    assert hessian.preconditioner(0.1) is hessian.preconditioner(0.1)
    assert hessian.preconditioner(0.1) is not hessian.preconditioner(0.2)


def test_the_papers_solver_goes_without(mlp: Problem):
    hessian = Hessian(mlp.stages()[0])
    b = torch.ones(hessian.shape[0], dtype=F64)
    assert ConjugateGradient().solve(hessian, b).report.preconditioner == "none"


def test_the_rows_do_not_depend_on_the_batches():
    several, one = untrained(batch_size=3), untrained(batch_size=1000)
    for rows in (20, 1000):
        a, b = (
            gauss_newton_rows(stage, one.vector(), rows, one.parameters.all)
            for stage in (several, one)
        )
        assert torch.allclose(a.T @ a, b.T @ b, **CLOSE)


def test_the_output_limit_is_where_it_says(monkeypatch):
    stage = untrained()
    monkeypatch.setattr(module, "_LARGEST_OUTPUT", 3)
    assert gauss_newton_rows(stage, stage.vector(), 5, stage.parameters.all) is not None
    monkeypatch.setattr(module, "_LARGEST_OUTPUT", 2)
    assert gauss_newton_rows(stage, stage.vector(), 5, stage.parameters.all) is None


def test_of_many_examples_some_are_looked_at(monkeypatch):
    """Every other example: the mean over those in place of the mean over all."""
    stage = untrained(examples=39, l2=0.0)
    monkeypatch.setattr(module, "_EXAMPLES", 20)
    rows = gauss_newton_rows(stage, stage.vector(), 10_000, stage.parameters.all)
    inputs, targets = stage.data
    half = stage.with_data((inputs[::2], targets[::2]))
    assert torch.allclose(rows.T @ rows, GaussNewton(half).dense(), **CLOSE)


@pytest.mark.parametrize("name", ["shared", "own"])
def test_the_rows_of_a_block_are_those_of_the_whole(name):
    stage = untrained(l2=0.0)
    block = getattr(stage, name)
    whole = gauss_newton_rows(stage, stage.vector(), 20, stage.parameters.all)
    part = gauss_newton_rows(stage, stage.vector(), 20, block)
    assert torch.allclose(part, stage.parameters.take(whole.T, block).T, **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_the_scale_of_the_problem_changes_nothing(scale):
    """In float32 too: what is a null vector does not depend on units."""
    stage = untrained(l2=0.1 * scale, loss=lambda o, t: scale * cross_entropy(o, t))
    for dtype, tol in ((F64, 1e-9), (torch.float32, 1e-4)):
        hessian = Hessian(stage.to(dtype))
        b = torch.ones(hessian.shape[0], dtype=dtype)
        report = MinRes(tol=tol, damping=2 * scale).solve(hessian, b).report
        assert report.converged
        assert report.iterations <= 20


class Flattened(nn.Module):
    """Three tokens an example, whose outputs stand below each other."""

    def forward(self, x):
        return x.reshape(-1, 2)


def per_sentence(outputs, targets):
    return cross_entropy(outputs, targets.flatten()).reshape(-1, 3).mean(1)


def test_outputs_of_every_shape_are_solved():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, dtype=F64, generator=g)
    y = torch.randint(2, (24,), generator=g)
    tokens = torch.randint(2, (24, 3), generator=g)
    linear = nn.Linear(4, 6).to(F64)
    problems = {
        "a number": (nn.Sequential(nn.Linear(4, 1).to(F64), nn.Flatten(0)),
                     lambda o, t: (o - t).square(), y),
        "tokens below each other": (nn.Sequential(linear, Flattened()), per_sentence, tokens),
        "tokens first": (nn.Sequential(linear, nn.Unflatten(1, (3, 2)), Transposed()),
                         lambda o, t: cross_entropy(o.flatten(0, 1), t.T.flatten())
                         .reshape(3, -1).mean(0), tokens),
    }  # fmt: skip
    for head, loss, targets in problems.values():
        stage = Stage(nn.Identity(), head, loss, (x, targets), l2=0.1)
        hessian = Hessian(stage)
        b = torch.ones(hessian.shape[0], dtype=F64)
        solution = MinRes(tol=1e-10).solve(hessian, b)
        assert solution.report.converged
        assert (hessian.dense() @ solution.x - b).norm() <= 1e-9 * b.norm()


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


def test_a_rough_residual_is_asked_for_without_one():
    hessian = Hessian(untrained())
    b = torch.ones(hessian.shape[0], dtype=F64)
    with pytest.warns(UserWarning, match="negative curvature"):
        assert MinRes(tol=0.1).solve(hessian, b).report.preconditioner == "none"


def test_half_precision_products_with_single_recurrences():
    stage = untrained(l2=0.1).to(torch.bfloat16)
    hessian = Hessian(stage)
    b = torch.ones(hessian.shape[0], dtype=torch.bfloat16)
    solution = MinRes(damping=2.0).solve(hessian, b)
    assert solution.x.dtype == torch.bfloat16
    exact = Dense(damping=2.0).solve(Hessian(stage.to(F64)), b.double()).x
    assert (solution.x.double() - exact).norm() <= 0.05 * exact.norm()
