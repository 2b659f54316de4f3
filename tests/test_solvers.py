"""Solvers on hard systems, against SciPy's and NumPy's, and their reports against the facts."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import F64, Problem
from torch import Tensor

from msif_lib.curvature import Hessian, LinearOperator
from msif_lib.preconditioner import GaussNewtonPreconditioner
from msif_lib.solvers import (
    ConjugateGradient,
    Dense,
    FailedSolve,
    Identity,
    MinRes,
    Solver,
    SolveReport,
    SolverWarning,
)

pytestmark = pytest.mark.numeric
SOLVED = "solved to the tolerance"


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    g = torch.Generator().manual_seed(seed)
    p = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(p, p, dtype=F64, generator=g))[0]
    matrix = (q * eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def right_hand_sides(p: int, k: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(p, k, dtype=F64, generator=g)


def spectrum(p: int, condition: float, negative: int = 0) -> Tensor:
    values = torch.logspace(0, -np.log10(condition), p, dtype=F64)
    values[1 : 2 * negative : 2] *= -1
    return values


def quietly(solver: Solver, a, b: Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        return solver.solve(a, b)


def residuals(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    scale = b.norm(dim=0)
    return (b - a @ x).norm(dim=0) / torch.where(scale > 0, scale, 1.0)


class Counting:
    """An operator that counts the columns it is applied to."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.columns = matrix, 0

    @property
    def shape(self):
        return self.matrix.shape

    def __matmul__(self, x: Tensor) -> Tensor:
        self.columns += x.shape[1]
        return self.matrix @ x


# --- well-posed systems ------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6])
@pytest.mark.parametrize("solver", [ConjugateGradient(tol=1e-10), MinRes(tol=1e-10), Dense()])
def test_definite_systems(solver, condition):
    a, b = symmetric(spectrum(60, condition)), right_hand_sides(60, 3)
    solution = solver.solve(a, b)
    report = solution.report
    exact = np.linalg.solve(a.numpy(), b.numpy())
    assert report.converged
    assert report.message == SOLVED
    assert not report.negative_curvature
    assert report.residual <= 1e-10
    error = np.linalg.norm(solution.x.numpy() - exact) / np.linalg.norm(exact)
    assert error <= 10 * condition * 1e-10


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("solver", [MinRes(tol=1e-9), Dense()])
def test_indefinite_systems(solver, condition):
    a, b = symmetric(spectrum(50, condition, negative=10)), right_hand_sides(50, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = solver.solve(a, b)
    assert solution.report.converged
    assert solution.report.negative_curvature
    assert "not positive definite" in solution.report.message
    assert [entry.category for entry in caught] == [SolverWarning]
    exact = np.linalg.solve(a.numpy(), b.numpy())
    error = np.linalg.norm(solution.x.numpy() - exact) / np.linalg.norm(exact)
    assert error <= 10 * condition * 1e-9


def test_conjugate_gradient_stops_at_negative_curvature():
    a = symmetric(spectrum(50, 1e3, negative=10))
    b = right_hand_sides(50, 2)
    b = b + a @ b  # mostly of positive eigenvalues, so that the first step is one
    with pytest.warns(SolverWarning, match=r"ConjugateGradient: met negative curvature.*MinRes"):
        report = ConjugateGradient().solve(a, b).report
    assert report.negative_curvature
    assert not report.converged
    assert "raise the damping" in report.message


def test_conjugate_gradient_takes_the_iterations_of_scipy():
    a, b = symmetric(spectrum(80, 1e3)), right_hand_sides(80, 1)[:, 0]
    for ours, theirs in (
        (ConjugateGradient(tol=1e-6), scipy.sparse.linalg.cg),
        (MinRes(tol=1e-6), scipy.sparse.linalg.minres),
    ):
        count = []
        x, info = theirs(a.numpy(), b.numpy(), rtol=1e-6, callback=lambda v, c=count: c.append(1))
        assert info == 0
        solution = ours.solve(a, b)
        # SciPy's MINRES measures against ||A|| ||x|| and may stop sooner; sums in another order
        # make a few iterations of difference after a hundred.
        if theirs is scipy.sparse.linalg.cg:
            assert abs(solution.report.iterations - len(count)) <= 5
        assert np.linalg.norm(solution.x.numpy() - x) <= 1e-2 * np.linalg.norm(x)


def test_minres_gives_scipys_iterates():
    """The same Krylov space and the same minimiser, an iteration at a time."""
    a, b = symmetric(spectrum(30, 1e2, negative=5)), right_hand_sides(30, 1)[:, 0]
    for iterations in (1, 2, 5, 9):
        x, _ = scipy.sparse.linalg.minres(a.numpy(), b.numpy(), rtol=1e-15, maxiter=iterations)
        ours = quietly(MinRes(tol=1e-12, max_iterations=iterations), a, b)
        np.testing.assert_allclose(ours.x.numpy(), x, rtol=1e-8, atol=1e-10)
        assert ours.report.iterations == iterations


def test_several_right_hand_sides_are_solved_as_each_alone():
    """One zero, one that is an eigenvector (done at once), one nearly in a small eigenspace."""
    a = symmetric(spectrum(40, 1e4))
    values, vectors = torch.linalg.eigh(a)
    b = right_hand_sides(40, 5)
    b[:, 1] = 0
    b[:, 2] = vectors[:, 7]
    b[:, 3] = vectors[:, 0] + 1e-7 * b[:, 3]
    b[:, 4] *= 1e-12
    for solver in (ConjugateGradient(tol=1e-9), MinRes(tol=1e-9), Dense()):
        solution = solver.solve(a, b)
        assert solution.report.converged
        assert torch.equal(solution.x[:, 1], torch.zeros(40, dtype=F64))
        assert solution.report.residuals[1] == 0
        assert torch.allclose(solution.x[:, 2], vectors[:, 7] / values[7], rtol=1e-5, atol=1e-8)
        assert residuals(a, b, solution.x).max() <= 1e-9
        for number in range(5):
            alone = solver.solve(a, b[:, number]).x
            scale = 1e-4 * solution.x[:, number].norm()
            assert (alone - solution.x[:, number]).norm() <= scale


def test_only_zero_right_hand_sides():
    a = symmetric(spectrum(7, 10))
    for solver in (ConjugateGradient(), MinRes(), Dense(), ConjugateGradient(squared=True)):
        solution = solver.solve(a, torch.zeros(7, 2, dtype=F64))
        assert torch.equal(solution.x, torch.zeros(7, 2, dtype=F64))
        assert solution.report.converged
        assert solution.report.residuals == (0, 0)


@pytest.mark.parametrize("solver", [ConjugateGradient, MinRes])
def test_a_solve_can_begin_near_its_end(solver):
    """A right-hand side whose first iterate already satisfies the tolerance."""
    a = torch.eye(9, dtype=F64) * 3
    report = solver(tol=1e-3).solve(a, torch.ones(9, dtype=F64)).report
    assert report.iterations == 1
    assert report.converged


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3])
@pytest.mark.parametrize("solver", [ConjugateGradient(), MinRes(), Dense()])
def test_float32(solver, condition):
    a, b = symmetric(spectrum(50, condition)), right_hand_sides(50, 2)
    solution = solver.solve(a.float(), b.float())
    assert solution.x.dtype == torch.float32
    assert solution.report.converged
    assert residuals(a, b, solution.x.to(F64)).max() <= 1.2e-4


def test_float32_says_where_it_can_go_no_further():
    a, b = symmetric(spectrum(60, 1e6)).float(), right_hand_sides(60, 1).float()
    with pytest.warns(SolverWarning, match=r"relative residual .* where 1.0e-07 was asked for"):
        report = MinRes(tol=1e-7).solve(a, b).report
    assert not report.converged
    assert 1e-7 < report.residual < 1


# --- damping, the paper's squared system, the identity --------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-3, 2.0])
@pytest.mark.parametrize(
    "solver", [ConjugateGradient(tol=1e-10), MinRes(tol=1e-10), Dense()], ids=lambda s: type(s)
)
def test_damping_is_added_to_the_diagonal_once(solver, damping):
    a, b = symmetric(spectrum(30, 1e3)), right_hand_sides(30, 2)
    solution = replace(solver, damping=damping).solve(a, b)
    shifted = a + damping * torch.eye(30, dtype=F64)
    assert torch.allclose(solution.x, torch.linalg.solve(shifted, b), rtol=1e-6, atol=1e-6)
    assert solution.report.damping == damping
    assert solution.report.system == (f"(A + {damping:g} I) x = b" if damping else "A x = b")


@pytest.mark.parametrize("negative", [0, 8])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_the_squared_system_is_eq_16(negative, damping):
    """(A² + λI) x = A b: h/(h² + λ) on each eigenvalue, the sign kept where h < 0."""
    a, b = symmetric(spectrum(30, 1e2, negative)), right_hand_sides(30, 2)
    solver = ConjugateGradient(squared=True, damping=damping, tol=1e-11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver.solve(a, b)
    h, vectors = torch.linalg.eigh(a)
    exact = vectors @ ((h / (h**2 + damping))[:, None] * (vectors.T @ b))
    assert (solution.x - exact).norm() <= 1e-6 * exact.norm()
    system = a @ a + damping * torch.eye(30, dtype=F64)
    assert residuals(system, a @ b, solution.x).max() <= 1e-11
    assert solution.report.system == ("(A² + 0.01 I) x = A b" if damping else "A² x = A b")


@pytest.mark.parametrize("negative", [0, 8])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float32, (-100, -83, -40, -14, 14, 40, 83)), (F64, (-960, -300, -100, 100, 900))],
    ids=str,
)
def test_units_of_a_matrix_change_no_bit_of_the_squared_system(negative, dtype, exponents):
    """A² is squared again by the iteration: fourth powers of A must stay within the range."""
    exact, right = symmetric(spectrum(30, 10, negative)), right_hand_sides(30, 3)
    a, b = exact.to(dtype), right.to(dtype)
    one = ConjugateGradient(squared=True).solve(a, b)
    expected = torch.linalg.solve(exact, right)
    assert (one.x.double() - expected).norm() <= 1e-3 * expected.norm()
    for exponent in exponents:
        unit = 2.0**exponent
        found = ConjugateGradient(squared=True).solve(a * unit, b)
        assert torch.equal(found.x.double() * unit, one.x.double())
        assert found.report == one.report
    # Damped by λ = 2^(2 e), which single precision need not hold.
    one = ConjugateGradient(squared=True, damping=1.0).solve(a, b)
    for exponent in (e for e in exponents if abs(e) < 500):
        found = ConjugateGradient(squared=True, damping=4.0**exponent).solve(a * 2.0**exponent, b)
        assert torch.equal(found.x.double() * 2.0**exponent, one.x.double())


def test_the_squared_system_of_a_singular_matrix():
    """Flat directions are left out: the least-norm solution."""
    a = symmetric(torch.tensor([3.0, 2.0, 1.0, -1.0, 0.0, 0.0], dtype=F64))
    b = right_hand_sides(6, 1)
    x = ConjugateGradient(squared=True, tol=1e-12).solve(a, b).x
    assert torch.allclose(x, torch.linalg.pinv(a, rtol=1e-10) @ b, rtol=1e-8, atol=1e-10)


def test_identity_is_a_baseline_and_says_so():
    a, b = symmetric(spectrum(10, 10)), right_hand_sides(10, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = Identity().solve(a, b)
    assert torch.equal(solution.x, b)
    assert solution.x.data_ptr() != b.data_ptr()
    assert not solution.report.converged
    assert "baseline" in solution.report.message
    np.testing.assert_allclose(solution.report.residuals, residuals(a, b, b).numpy())


# --- singular systems --------------------------------------------------------------------------


def singular(p: int, rank: int) -> Tensor:
    values = torch.cat([torch.logspace(0, -1, rank, dtype=F64), torch.zeros(p - rank, dtype=F64)])
    return symmetric(values, seed=p)


@pytest.mark.parametrize(("p", "rank"), [(10, 7), (30, 25), (60, 40)])
def test_singular_systems_that_have_a_solution(p, rank):
    a = singular(p, rank)
    b = a @ right_hand_sides(p, 2)
    exact = torch.linalg.pinv(a, rtol=1e-10) @ b
    for solver in (MinRes(tol=1e-9), ConjugateGradient(tol=1e-9), Dense()):
        solution = quietly(solver, a, b)
        assert residuals(a, b, solution.x).max() <= 1e-9
        assert (solution.x - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("p", "rank"), [(2, 1), (10, 7), (30, 25), (60, 40)])
def test_singular_systems_without_a_solution_are_not_blown_up(p, rank, dtype):
    """MINRES ends at the least residual, not at the rounding of a division by zero."""
    a, b = singular(p, rank).to(dtype), right_hand_sides(p, 2).to(dtype)
    exact = torch.linalg.pinv(a.double(), rtol=1e-6) @ b.double()
    least = residuals(a.double(), b.double(), exact).max()
    with pytest.warns(SolverWarning, match="MinRes: stagnated: the system is singular, or float"):
        solution = MinRes().solve(a, b)
    assert not solution.report.converged
    assert solution.report.residual <= 1.05 * least
    with pytest.warns(SolverWarning, match=r"Dense: A x = b is singular \(\d+ eigen.*damping"):
        solution = Dense().solve(a, b)
    assert not solution.report.converged
    assert (solution.x - exact).norm() <= 1e-3 * exact.norm()


def test_a_pivot_that_is_rounding_does_not_pass_for_a_solution():
    a = torch.diag(torch.tensor([1.0, 1e-17, 1.0], dtype=F64))
    solution = quietly(Dense(), a, torch.ones(3, dtype=F64))
    assert "singular" in solution.report.message
    assert torch.equal(solution.x, torch.tensor([1.0, 0.0, 1.0], dtype=F64))


# --- reports -------------------------------------------------------------------------------------


@given(
    p=st.integers(2, 25),
    k=st.integers(1, 3),
    condition=st.floats(0, 5),
    negative=st.integers(0, 5),
    zeros=st.integers(0, 2),
    damping=st.sampled_from([0.0, 1e-3]),
    kind=st.sampled_from(["cg", "squared", "minres", "dense"]),
    tol=st.sampled_from([1e-3, 1e-6, 1e-9]),
    dtype=st.sampled_from([torch.float32, F64]),
    seed=st.integers(0, 2**16),
)
def test_no_report_says_what_is_not_so(
    p, k, condition, negative, zeros, damping, kind, tol, dtype, seed
):
    """The residual reported is the true one, and converged means within the tolerance."""
    values = spectrum(p, 10**condition, min(negative, p // 2))
    values[p - min(zeros, p - 1) :] = 0
    a = symmetric(values, seed).to(dtype)
    b = right_hand_sides(p, k, seed).to(dtype)
    solver = {
        "cg": ConjugateGradient(tol=tol, damping=damping),
        "squared": ConjugateGradient(tol=tol, damping=damping, squared=True),
        "minres": MinRes(tol=tol, damping=damping),
        "dense": Dense(damping=damping),
    }[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            solution = solver.solve(a, b)
        except FailedSolve as failure:  # no solution, or bent down in a column's first direction
            assert kind in ("cg", "squared") and (zeros or failure.report.negative_curvature)
            return
    report = solution.report
    eye = torch.eye(p, dtype=dtype)
    system, rhs = (a @ a + damping * eye, a @ b) if kind == "squared" else (a + damping * eye, b)
    true = residuals(system.double(), rhs.double(), solution.x.double())
    # What computing b - A x in this precision can err by.
    eps = torch.finfo(dtype).eps
    size = float(system.norm()) * float(solution.x.norm())
    floor = 10 * p * eps * (1 + size / float(rhs.norm(dim=0).min()))
    assert np.allclose(report.residuals, true.numpy(), rtol=0.01, atol=floor)
    if report.converged and kind != "dense":
        assert max(report.residuals) <= tol
    assert report.converged == (report.residual <= tol) or kind == "dense"
    assert bool(caught) == (report.message != SOLVED)
    assert report.converged or caught
    assert solution.x.isfinite().all()


def test_histories():
    """One entry an iteration; MINRES's never grow within a run."""
    a, b = symmetric(spectrum(50, 1e4, negative=10)), right_hand_sides(50, 3)
    report = quietly(MinRes(tol=1e-8), a, b).report
    history = np.array(report.history)
    assert len(history) == report.iterations
    assert (np.diff(history) <= 1e-12).all()
    assert history[-1] <= 1e-8
    definite = symmetric(spectrum(50, 1e4))
    report = ConjugateGradient(tol=1e-8).solve(definite, b).report
    assert len(report.history) == report.iterations
    assert report.history[-1] <= 1e-8
    assert report.residual == max(report.residuals)


@pytest.mark.parametrize(
    "solver",
    [MinRes(), ConjugateGradient(), ConjugateGradient(squared=True), Dense(), Identity()],
    ids=["minres", "cg", "squared", "dense", "identity"],
)
def test_products_are_counted_in_columns(solver):
    matrix, b = symmetric(spectrum(20, 100)), right_hand_sides(20, 3)
    if isinstance(solver, Dense):

        class Operator(LinearOperator):
            shape, dtype, device = (20, 20), F64, torch.device("cpu")

            def _product(self, columns: Tensor) -> Tensor:
                return matrix @ columns

        assert solver.solve(Operator(), b).report.products == 20
        assert solver.solve(matrix, b).report.products == 0
        return
    counting = Counting(matrix)
    assert solver.solve(counting, b).report.products == counting.columns


def test_a_converged_column_costs_nothing_more():
    a = symmetric(spectrum(40, 1e4))
    b = right_hand_sides(40, 2)
    b[:, 1] = torch.linalg.eigh(a)[1][:, 3]
    for solver in (MinRes(), ConjugateGradient()):
        together = solver.solve(a, b).report
        alone = solver.solve(a, b[:, 0]).report
        assert together.products <= alone.products + 5


def test_limits_of_iterations():
    a, b = symmetric(spectrum(60, 1e5)), right_hand_sides(60, 1)
    for solver in (ConjugateGradient(max_iterations=5), MinRes(max_iterations=5)):
        with pytest.warns(SolverWarning, match=r"stopped at the limit of 5 iterations.*Allow more"):
            report = solver.solve(a, b).report
        assert report.iterations == 5
        assert not report.converged


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-11])
def test_the_tolerance_is_honoured_and_not_by_far_exceeded(tol):
    # Large enough that none of them runs out of dimensions, where MINRES would end exactly.
    a, b = symmetric(spectrum(200, 1e3)), right_hand_sides(200, 1)
    for solver in (ConjugateGradient(tol=tol), MinRes(tol=tol)):
        report = solver.solve(a, b).report
        assert tol / 100 <= report.residual <= tol


def test_the_scale_of_the_system_changes_nothing():
    """Tolerances are relative to b, and to nothing else."""
    a, b = symmetric(spectrum(30, 1e3, negative=5)), right_hand_sides(30, 2)
    base = quietly(MinRes(), a, b)
    for scale_a, scale_b in ((1e-9, 1.0), (1e9, 1.0), (1.0, 1e-9), (1.0, 1e9)):
        scaled = quietly(MinRes(), scale_a * a, scale_b * b)
        assert scaled.report.iterations == pytest.approx(base.report.iterations, abs=2)
        expected = base.x * scale_b / scale_a
        assert (scaled.x - expected).norm() <= 1e-4 * expected.norm()


def test_calling_a_solver_is_solving():
    a, b = symmetric(spectrum(5, 10)), right_hand_sides(5, 1)[:, 0]
    for solver in (MinRes(), ConjugateGradient(), Dense(), Identity()):
        assert torch.equal(solver(a, b).x, solver.solve(a, b).x)
        assert solver(a, b).x.shape == (5,)
        assert isinstance(solver(a, b, progress=False).report, SolveReport)


# --- errors --------------------------------------------------------------------------------------


def test_arguments_of_solvers():
    for kind in (ConjugateGradient, MinRes, Dense, Identity):
        with pytest.raises(ValueError, match="damping must be zero or positive, not -1"):
            kind(damping=-1)
        with pytest.raises(ValueError, match="damping must be zero or positive, not nan"):
            kind(damping=float("nan"))
    for kind in (ConjugateGradient, MinRes):
        for tol in (0.0, 1.0, -1e-3, float("nan")):
            with pytest.raises(ValueError, match="tol must lie between 0 and 1"):
                kind(tol=tol)
        with pytest.raises(ValueError, match="max_iterations must be at least 1, not 0"):
            kind(max_iterations=0)


ALL = [MinRes(), ConjugateGradient(), ConjugateGradient(squared=True), Dense(), Identity()]


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_right_hand_sides_that_do_not_fit(solver):
    a = torch.eye(4, dtype=F64)
    for shape in ((3,), (3, 2), (4, 2, 2)):
        with pytest.raises(ValueError, match=r"right-hand side of shape .* does not fit.*\(4, 4\)"):
            solver.solve(a, torch.ones(*shape, dtype=F64))
    with pytest.raises(ValueError, match="does not fit"):
        solver.solve(torch.ones(4, 3, dtype=F64), torch.ones(4, dtype=F64))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the right-hand side is not finite"):
            solver.solve(a, torch.tensor([1.0, bad, 0.0, 0.0], dtype=F64))


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_products_that_are_not_finite(solver):
    a = torch.eye(4, dtype=F64)
    a[2, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="product with the operator is not finite"):
        solver.solve(a, torch.ones(4, dtype=F64))


def test_methods_that_a_base_class_does_not_have():
    with pytest.raises(TypeError, match="abstract class Solver"):
        Solver()
    with pytest.raises(TypeError, match="abstract class LinearOperator"):
        LinearOperator()


# --- failed solves -------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, F64]
SOLVING = [solver for solver in ALL if not isinstance(solver, Identity)]


class Product:
    """An operator given by a function of columns."""

    def __init__(self, function, p: int) -> None:
        self.function, self.shape = function, (p, p)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.function(x).to(x.dtype)

    def dense(self) -> Tensor:
        return self @ torch.eye(self.shape[0], dtype=F64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVING, ids=str)
def test_a_zero_solution_of_what_is_not_zero_is_a_failed_solve(solver, dtype):
    """A column is enough; columns that are zero are solved."""
    b = right_hand_sides(6, 4).to(dtype)
    b[:, [0, 2]] = 0
    name = type(solver).__name__
    words = (
        rf"{name}: the solve of .* = A? ?b failed: the solution is zero where the right-hand side "
        r"is not, in 2 of 4 columns \(the first: 1\).*float32 or float64.*damping"
    )
    with pytest.raises(FailedSolve, match=words) as caught:
        quietly(solver, torch.zeros(6, 6, dtype=dtype), b)
    assert caught.value.report.solver == name
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.report) == (str(caught.value), caught.value.report)
    solution = quietly(solver, torch.zeros(6, 6, dtype=dtype), b[:, [0, 2]])
    assert torch.equal(solution.x, torch.zeros(6, 2, dtype=dtype))
    assert solution.report.residuals == (0, 0)


def test_a_failed_solve_is_a_floating_point_error_with_what_the_solver_met():
    down = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    with pytest.raises(FloatingPointError, match=r"met negative curvature.*use MinRes") as caught:
        ConjugateGradient().solve(down, torch.tensor([0.0, 1.0], dtype=F64))
    assert caught.value.report.negative_curvature
    # The first direction of MINRES says nothing here: one iteration is not enough, two are.
    b = torch.ones(2, dtype=F64)
    with pytest.raises(FailedSolve, match="limit of 1 iterations"):
        MinRes(max_iterations=1).solve(down, b)
    assert torch.allclose(quietly(MinRes(), down, b).x, torch.tensor([1.0, -1.0], dtype=F64))


def test_a_right_hand_side_in_the_null_space_has_no_solution():
    a = torch.diag(torch.tensor([2.0, 0.0, 1.0], dtype=F64))
    b = torch.tensor([0.0, 3.0, 0.0], dtype=F64)
    for solver in SOLVING:
        with pytest.raises(FailedSolve):
            quietly(solver, a, b)
        # Damped there is one; on A² as in eq. (16) the answer is zero all the same.
        damped = replace(solver, damping=0.5)
        if getattr(solver, "squared", False):
            with pytest.raises(FailedSolve):
                quietly(damped, a, b)
        else:
            assert torch.allclose(damped.solve(a, b).x, 2 * b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVING, ids=str)
def test_products_that_are_noise_are_never_solved_by_zero(solver, dtype):
    """As of a nearly singular Hessian in half precision: no iterate is better than none."""
    if isinstance(solver, Dense):
        pytest.skip("Dense asks for every product once, so that noise is a matrix")
    g = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        return x + 100 * torch.randn(x.shape, generator=g)

    with pytest.raises(FailedSolve, match="the solution is zero"):
        quietly(replace(solver, max_iterations=20), Product(noise, 40), torch.ones(40, dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 10.0**e) for e in (-42, -38, -25, -12, 12, 25, 37)]
    + [(F64, 10.0**e) for e in (-310, -200, -100, 100, 200, 300)],
)
@pytest.mark.parametrize("solver", SOLVING, ids=str)
def test_the_squares_of_a_right_hand_side_may_leave_the_range(solver, dtype, scale):
    """A gradient of 1e-25 has a norm of zero in float32, and a solution all the same."""
    a, b = symmetric(spectrum(30, 10)).to(dtype), right_hand_sides(30, 3).to(dtype)
    whole = torch.linalg.solve(a.double(), b.double())
    b[:, 1] *= scale
    solution = solver.solve(a, b)
    assert solution.report.converged
    x = solution.x.double()
    x[:, 1] /= scale
    error = (x - whole).norm(dim=0) / whole.norm(dim=0)
    # Numbers next to zero have fewer digits.
    assert error.max() <= (5e-2 if scale < torch.finfo(dtype).tiny else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", SOLVING, ids=str)
def test_half_precision_is_that_of_the_products(solver, dtype):
    a, b = symmetric(torch.linspace(1, 2, 20, dtype=F64)).to(dtype), right_hand_sides(20, 2)
    solution = quietly(solver, a, b.to(dtype))
    assert solution.x.dtype == dtype
    exact = torch.linalg.solve(a.double(), b)
    assert (solution.x.double() - exact).norm() <= 3e-2 * exact.norm()
    if getattr(solver, "squared", False):
        return  # the square of what follows overflows
    with pytest.raises(FailedSolve, match=r"zero.*in 1 of 2 columns \(the first: 1\)"):
        # What a type cannot hold is no solution: 1e-9 is zero in float16, 1e-45 in bfloat16.
        small = {torch.float16: (1e4, 1e-5), torch.bfloat16: (1e30, 1e-15)}[dtype]
        b = torch.tensor([[1.0, small[1]], [1.0, small[1]]], dtype=dtype)
        quietly(solver, small[0] * torch.eye(2, dtype=dtype), b)


OPERATORS = {
    "zero": lambda a: lambda x: torch.zeros_like(x),
    "definite": lambda a: lambda x: (a @ a).to(x) @ x,
    "indefinite": lambda a: lambda x: a.to(x) @ x,
    "rank one": lambda a: lambda x: a[:, :1].to(x) @ (a[:1].to(x) @ x),
    "noise": lambda a: lambda x: x + 30 * torch.sin(1e3 * (a.to(x) @ x)),
    "rounded": lambda a: lambda x: (a @ a).to(x).mul(8).round().div(8) @ x,
}


@given(
    p=st.integers(1, 9),
    k=st.integers(1, 4),
    zeros=st.integers(0, 3),
    operator=st.sampled_from(sorted(OPERATORS)),
    size=st.sampled_from([1e-45, 1e-38, 1e-25, 1e-6, 1.0, 1e6, 1e25, 1e38]),
    scale=st.sampled_from([1e-45, 1e-38, 1e-25, 1e-6, 1.0, 1e6, 1e25, 1e38]),
    solver=st.sampled_from(ALL),
    damping=st.sampled_from([0.0, 1e-3]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
@example(
    p=3, k=1, zeros=1, operator="noise", size=1.0, scale=1.0, solver=MinRes(), damping=0.0,
    dtype=torch.bfloat16, seed=0,
)  # fmt: skip
def test_a_solve_ends_in_numbers_or_in_an_error(
    p, k, zeros, operator, size, scale, solver, damping, dtype, seed
):
    """Whatever the operator: zero for zero and only for it, and no report holds NaN."""
    a = symmetric(torch.linspace(-1, 1, p, dtype=F64), seed)
    apply = OPERATORS[operator](a)
    b = torch.cat([scale * right_hand_sides(p, k, seed), torch.zeros(p, zeros, dtype=F64)], 1)
    b = b.to(dtype)
    if not b.isfinite().all():
        return
    solver = replace(solver, damping=damping)
    try:
        solution = quietly(solver, Product(lambda x: size * apply(x), p), b)
    except FloatingPointError as error:
        words = (
            "not finite|loses digits|failed: (the solution (is zero|overflowed)|a factorisation)"
        )
        assert re.search(words, str(error))
        return
    report = solution.report
    assert torch.equal((solution.x != 0).any(0), (b != 0).any(0))
    assert solution.x.isfinite().all()
    assert not np.isnan([*report.residuals, *report.history]).any()
    assert report.residuals[k:] == (0,) * zeros


def test_no_report_holds_what_is_not_a_number():
    report = MinRes().solve(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64)).report
    for wrong in (
        {"residuals": (0.5, float("nan"))},
        {"history": (1.0, float("nan"))},
        {"damping": float("nan")},
    ):
        with pytest.raises(ValueError, match=r"MinRes: a report states no .* not a number"):
            replace(report, **wrong)


@pytest.mark.parametrize("iterations", [1, 3, 5, 12])
def test_conjugate_gradients_cut_short_are_scipys(iterations):
    """Their residual may be above that of zero; their error, in the norm of A, is not."""
    a, b = symmetric(spectrum(60, 1e5)), right_hand_sides(60, 1)[:, 0]
    solution = quietly(ConjugateGradient(max_iterations=iterations), a, b)
    x, _ = scipy.sparse.linalg.cg(a.numpy(), b.numpy(), rtol=1e-15, maxiter=iterations)
    np.testing.assert_allclose(solution.x.numpy(), x, rtol=1e-8, atol=1e-10)
    exact = torch.linalg.solve(a, b)
    error = solution.x - exact
    assert error @ a @ error < exact @ a @ exact
    if iterations == 5:
        assert solution.report.residual > 1


# --- blocks of right-hand sides ------------------------------------------------------------------


@pytest.mark.parametrize("negative", [0, 12])
def test_a_block_needs_no_more_iterations_than_its_slowest_column(negative):
    """The Krylov space that the columns share holds the space of each."""
    a, b = symmetric(spectrum(80, 1e3, negative)), right_hand_sides(80, 5)
    solver = MinRes(tol=1e-8)
    together = quietly(solver, a, b).report
    alone = [quietly(solver, a, column).report for column in b.unbind(1)]
    assert together.converged
    assert together.iterations <= max(report.iterations for report in alone)
    assert together.iterations <= -(-80 // 5) + 1
    assert together.products < sum(report.products for report in alone)


@given(
    p=st.integers(1, 12),
    k=st.integers(1, 14),
    repeats=st.integers(0, 3),
    zeros=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_block_is_solved(p, k, repeats, zeros, seed):
    """More columns than dimensions, repeated, parallel and zero ones."""
    values = torch.linspace(0.2, 1, p, dtype=F64)
    values[::3] *= -1
    a = symmetric(values, seed)
    b = right_hand_sides(p, k, seed)
    b = torch.cat([b, -2 * b[:, :repeats], torch.zeros(p, zeros, dtype=F64)], 1)
    solution = quietly(MinRes(tol=1e-9), a, b)
    assert solution.report.converged
    exact = torch.linalg.solve(a, b)
    assert (solution.x - exact).norm() <= 1e-6 * exact.norm()


def test_columns_of_very_different_size():
    a = symmetric(spectrum(50, 1e2, negative=7))
    b = right_hand_sides(50, 3) * torch.tensor([1e-12, 1.0, 1e12], dtype=F64)
    solution = quietly(MinRes(tol=1e-9), a, b)
    assert residuals(a, b, solution.x).max() <= 1e-9


@pytest.mark.parametrize("memory", [0, 8 * 100 * 30])
def test_without_room_for_the_basis_the_recurrences_do(memory):
    """Memory buys orthogonality and with it iterations, never the solution."""
    a, b = symmetric(spectrum(100, 1e3, negative=10)), right_hand_sides(100, 2)
    full = quietly(MinRes(tol=1e-9), a, b)
    short = quietly(MinRes(tol=1e-9, memory=memory), a, b)
    assert full.report.converged and short.report.converged
    assert full.report.iterations <= short.report.iterations
    assert (full.x - short.x).norm() <= 1e-5 * full.x.norm()


def test_one_column_needs_no_more_iterations_than_scipys_minres():
    a, b = symmetric(spectrum(60, 1e2, negative=5)), right_hand_sides(60, 1)[:, 0]
    counts = []
    scipy.sparse.linalg.minres(a.numpy(), b.numpy(), rtol=1e-9, callback=counts.append)
    report = quietly(MinRes(tol=1e-8), a, b).report
    assert report.converged
    assert report.iterations <= len(counts)


def test_a_column_without_a_solution_does_not_keep_the_others_from_theirs():
    """A singular matrix: one right-hand side in its range, one not."""
    a = symmetric(torch.cat([torch.linspace(0.1, 1, 20, dtype=F64), torch.zeros(1, dtype=F64)]))
    null = torch.linalg.eigh(a).eigenvectors[:, torch.linalg.eigvalsh(a).abs().argmin()]
    inside = a @ right_hand_sides(21, 2)
    b = torch.stack([inside[:, 0], inside[:, 1] + null], 1)
    solution = quietly(MinRes(tol=1e-8), a, b)
    assert not solution.report.converged
    assert solution.report.residuals[0] <= 1e-8
    assert solution.report.residuals[1] == pytest.approx(float(1 / b[:, 1].norm()), rel=1e-6)
    assert solution.x.norm() <= 100 * inside.norm()


def test_negative_curvature_is_found_in_a_block():
    values = torch.linspace(0.1, 1, 30, dtype=F64)
    definite, indefinite = symmetric(values), symmetric(torch.cat([values[1:], -values[:1]]))
    b = right_hand_sides(30, 4)
    assert not quietly(MinRes(), definite, b).report.negative_curvature
    assert quietly(MinRes(), indefinite, b).report.negative_curvature


@pytest.mark.parametrize("columns", [3, 20, 60, 130])
def test_one_column_without_a_solution_costs_the_others_nothing(columns):
    """Rank 54 of 60: all right-hand sides but the first lie in the range."""
    values = torch.cat([torch.logspace(0, -2, 54, dtype=F64), torch.zeros(6, dtype=F64)])
    a = symmetric(values)
    b = a @ right_hand_sides(60, columns)
    b[:, 0] += torch.linalg.eigh(a).eigenvectors[:, 0]
    report = quietly(MinRes(tol=1e-7), a, b).report
    assert not report.converged
    assert max(report.residuals[1:]) <= 1e-7
    assert report.iterations <= 500


# --- stagnation ----------------------------------------------------------------------------------


class Misled(Product):
    """A well-conditioned matrix whose preconditioner is made of rows that it does not have."""

    def __init__(self, p: int, dtype: torch.dtype) -> None:
        a = symmetric(torch.logspace(0, 1, p, dtype=F64)).to(dtype)
        super().__init__(lambda x: a @ x, p)
        drawn = torch.Generator().manual_seed(0)
        rows = 100 * torch.randn(40, p, generator=drawn, dtype=F64)
        diagonal = torch.logspace(0, -4, p, dtype=F64)
        self._preconditioner = GaussNewtonPreconditioner.from_rows(
            rows.to(dtype), diagonal.to(dtype)
        )

    def preconditioner(self, damping: float = 0.0) -> GaussNewtonPreconditioner:
        return self._preconditioner


@pytest.mark.numeric
@pytest.mark.parametrize("k", [1, 3])
def test_a_preconditioner_that_stagnates_is_dropped_and_the_solve_goes_on(k, monkeypatch):
    misled, b = Misled(300, torch.float32), right_hand_sides(300, k).float()
    solver = MinRes(memory=0)  # large systems cannot keep their basis
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = solver.solve(misled, b).report
    assert report.converged
    assert report.residual <= 1e-4
    assert re.search(r"Gauss-Newton, rank 40, dropped after \d+ iterations", report.preconditioner)
    without = replace(solver, precondition=False).solve(misled, b).report
    assert without.preconditioner == "none"
    dropped_after = int(re.search(r"after (\d+)", report.preconditioner)[1])
    assert report.iterations <= dropped_after + without.iterations
    # What it did before: all iterations allowed, for nothing.
    monkeypatch.setattr("msif_lib.solvers._PATIENCE", 10**9)
    with pytest.warns(SolverWarning):
        stuck = solver.solve(misled, b).report
    assert not stuck.converged
    assert stuck.residual > 1e-3


@pytest.mark.numeric
def test_a_preconditioner_that_helps_is_kept(mlp: Problem):
    stage = mlp.stages()[0]
    hessian, b = Hessian(stage), right_hand_sides(stage.parameters.size, 2)
    report = MinRes(damping=0.1).solve(hessian, b).report
    assert report.converged
    assert report.preconditioner.startswith("Gauss-Newton, rank ")
    assert "dropped" not in report.preconditioner


@pytest.mark.numeric
@pytest.mark.parametrize("solver", [MinRes(tol=1e-9), ConjugateGradient(tol=1e-9)], ids=str)
def test_where_the_digits_are_short_no_one_is_told_to_allow_more_iterations(solver):
    a = symmetric(torch.logspace(-3, 0, 40, dtype=F64))
    b = right_hand_sides(40, 2)
    with pytest.warns(SolverWarning, match="float32 allows no more.*more would not help") as caught:
        solver.solve(a.float(), b.float())
    assert "solve in float64 (Stage.to(torch.float64))" in str(caught[0].message)
    assert "llow more iterations" not in str(caught[0].message)
    assert solver.solve(a, b).report.converged
