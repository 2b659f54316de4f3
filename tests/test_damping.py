"""Damping that each system chooses for itself, against dense eigenvalues."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from chains import examples, mlp, randomised
from problems import F64, relative_error
from torch import Tensor

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.curvature import Hessian, proximal_hessian
from msif_lib.influence import StationarityWarning
from msif_lib.links import Frozen, Optimum, Proximal
from msif_lib.retraining import RetrainingSettings
from msif_lib.solvers import (
    ConjugateGradient,
    Dense,
    Identity,
    MinRes,
    SolverWarning,
    automatic_damping,
)
from msif_lib.spectrum import lanczos, lowest_eigenvalue
from msif_lib.training import SGD, AdamW, descend

pytestmark = pytest.mark.numeric
SOLVERS = [ConjugateGradient(tol=1e-10), MinRes(tol=1e-10), Dense(), Identity()]


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(size, size, dtype=F64, generator=generator))[0]
    matrix = (q * eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def like_a_hessian(lowest: float, size: int = 400) -> Tensor:
    """Few large eigenvalues, a bulk at zero, a tail down to the lowest."""
    large = torch.logspace(1, -1, 8, dtype=F64)
    tail = lowest * torch.logspace(0, -3, 12, dtype=F64)
    bulk = 1e-4 * torch.linspace(-abs(lowest), 1, size - 20, dtype=F64)
    return symmetric(torch.cat([large, bulk, tail]))


def right_hand_sides(size: int, count: int) -> Tensor:
    return torch.randn(size, count, dtype=F64, generator=torch.Generator().manual_seed(1))


def stopped_early(optimiser, tanh: bool, width: int = 6) -> Stage:
    """A network after few epochs, far from an optimum."""
    net = randomised(mlp(3, width), 1)
    net.embedding[1] = torch.nn.Tanh() if tanh else torch.nn.GELU()
    stage = Stage(net.embedding, net.head, cross_entropy, examples(40, 3, 0))
    descend(stage, optimiser, 4, 8, 0, progress=False)
    return stage


def rule(values: Tensor) -> float:
    """What dense eigenvalues make of it."""
    below, size = max(-float(values.min()), 0.0), float(values.abs().max())
    return max(2 * below, 0.3 * math.sqrt(below * size))


TRAINED = {
    "SGD": lambda: stopped_early(SGD(lr=0.1, momentum=0.9), True),
    "AdamW": lambda: stopped_early(AdamW(lr=1e-2), False, 12),
}


@pytest.mark.parametrize("stage", TRAINED.values(), ids=TRAINED.keys())
@pytest.mark.parametrize("alpha", [None, 1e-3])
def test_the_estimate_is_that_of_the_dense_hessian(stage, alpha):
    trained = stage()
    operator = Hessian(trained) if alpha is None else proximal_hessian(trained, alpha)
    values = torch.linalg.eigvalsh(operator.dense())
    assert values[0] < -1e-3  # not near an optimum
    found = automatic_damping(operator)
    assert 1 <= found.products <= 40
    # From above by 5 % at most, and then lowered by its error.
    assert 1.1 * values[0] <= found.lowest_eigenvalue <= 0.95 * values[0]
    assert 0.95 <= found.damping / rule(values) <= 1.1
    assert float(values[0]) + found.damping > 0.9 * float(-values[0])


@pytest.mark.parametrize("lowest", [-3.0, -0.1, -1e-3])
@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_it_knows_no_unit(lowest, unit, dtype):
    matrix = (unit * like_a_hessian(lowest)).to(dtype)
    found = automatic_damping(matrix)
    assert 1.1 * lowest <= found.lowest_eigenvalue / unit <= 0.95 * lowest
    assert 0.95 <= found.damping / unit / rule(torch.linalg.eigvalsh(matrix) / unit) <= 1.1
    assert found == automatic_damping(matrix, right_hand_sides(400, 1).to(dtype))  # no chance in it


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(0.5, 3, 60, dtype=F64),
        torch.cat([torch.zeros(5, dtype=F64), torch.linspace(0.01, 3, 60, dtype=F64)]),
        torch.logspace(-8, 2, 300, dtype=F64),
        torch.zeros(7, dtype=F64),
        torch.ones(1, dtype=F64),
    ],
    ids=["definite", "singular", "badly conditioned", "zero", "a number"],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_matrix_with_nothing_below_zero_is_left_alone(values, dtype):
    matrix = symmetric(values).to(dtype)
    found = automatic_damping(matrix)
    assert found.damping == 0
    rounding = 1e-5 if dtype == torch.float32 else 1e-11
    assert found.lowest_eigenvalue >= float(values.min() - rounding * values.max())
    b = matrix @ right_hand_sides(len(matrix), 2).to(dtype)
    if values.min() > 0.1:
        report = MinRes(damping="auto").solve(matrix, b).report
        assert (report.system, report.damping) == ("A x = b", 0)


@pytest.mark.parametrize("size", [1, 2, 3, 39, 40, 41])
def test_small_matrices_are_known_whole(size):
    values = torch.linspace(-1, 2, size, dtype=F64)
    found = lowest_eigenvalue(symmetric(values).matmul, right_hand_sides(size, 1)[:, 0], 100)
    assert found.products <= size
    assert abs(found.value + 1) <= max(found.error, 1e-12)
    assert 0.9 * float(values.abs().max()) <= found.size <= float(values.abs().max()) + 1e-12


def test_the_error_tells_how_near_an_eigenvalue_is():
    values = torch.sort(right_hand_sides(200, 1)[:, 0]).values
    matrix, start = symmetric(values), right_hand_sides(200, 1)[:, 0]
    errors = []
    for products in (3, 5, 8):
        found = lowest_eigenvalue(matrix.matmul, start, products)
        assert found.products == products
        assert found.value >= float(values[0]) - 1e-12  # from above
        assert float((values - found.value).abs().min()) <= found.error + 1e-12
        errors.append(found.value - float(values[0]))
    assert errors[0] > errors[1] > errors[2] > 0


def test_lanczos_makes_a_matrix_tridiagonal():
    matrix, b = symmetric(torch.linspace(-1, 2, 30, dtype=F64)), right_hand_sides(30, 2)
    for found in lanczos(matrix.matmul, b):
        if len(found.alphas) == 12:
            break
    values, vectors = found.eigenpairs()
    for column in range(2):
        v = torch.stack([one[:, column] for one in found.basis], 1)
        assert relative_error(v.T @ v, torch.eye(12, dtype=F64)) < 1e-12
        t = v.T @ matrix @ v
        assert float(torch.triu(t, 2).abs().max()) < 1e-12
        assert relative_error(torch.linalg.eigvalsh(t), values[column]) < 1e-12
        ritz = v @ vectors[column, :, 0]
        left = (matrix @ ritz - values[column, 0] * ritz).norm()
        assert abs(float(left - found.beta[column] * vectors[column, -1, 0].abs())) < 1e-12


# --- in the solvers ------------------------------------------------------------------------------


class Counted:
    """A matrix that counts the columns that it is multiplied with."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.columns = matrix, matrix.shape, 0

    def __matmul__(self, x: Tensor) -> Tensor:
        self.columns += x[0].numel()
        return self.matrix @ x

    def dense(self) -> Tensor:
        self.columns += len(self.matrix)
        return self.matrix


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda one: type(one).__name__)
def test_every_solver_solves_with_the_number_and_reports_it(solver):
    matrix, b = like_a_hessian(-0.3), right_hand_sides(400, 3)
    found = automatic_damping(matrix)
    counted = Counted(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        automatic = replace(solver, damping="auto").solve(counted, b)
        fixed = replace(solver, damping=found.damping).solve(Counted(matrix), b)
    assert torch.equal(automatic.x, fixed.x)
    report = automatic.report
    assert (report.damping, report.lowest_eigenvalue) == found[:2]
    assert report.system == f"(A + {found.damping:g} I) x = b" == fixed.report.system
    assert report.products == fixed.report.products + found.products
    assert report.products == counted.columns
    assert fixed.report.lowest_eigenvalue is None
    assert replace(report, products=0, lowest_eigenvalue=None) == replace(fixed.report, products=0)
    if type(solver) is not Identity:
        exact = torch.linalg.solve(matrix + found.damping * torch.eye(400, dtype=F64), b)
        assert relative_error(automatic.x, exact) < 1e-7


@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda one: type(one).__name__)
def test_a_fixed_damping_below_the_lowest_eigenvalue_is_named(solver):
    matrix, b = like_a_hessian(-0.3), right_hand_sides(400, 1)
    below = replace(solver, damping=0.2)
    said = r"The damping 0\.2 is too little for .*-0\.3[0-9]*: "
    with pytest.warns(SolverWarning, match=said) as met:
        report = below.solve(matrix, b).report
    assert f'damping="auto" takes {automatic_damping(matrix).damping:.2g}' in str(met[0].message)
    assert -0.33 <= report.lowest_eigenvalue <= -0.28 and report.damping == 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        above = replace(solver, damping=0.4).solve(matrix, b).report
    assert above.lowest_eigenvalue is None and "damping" not in above.message
    # Without any damping there is none to name; the squared system has no sign to lose.
    with pytest.warns(SolverWarning) as met:
        report = solver.solve(matrix, b).report
    assert report.lowest_eigenvalue is None and "The damping" not in str(met[0].message)


def test_the_squared_system_takes_a_number():
    with pytest.raises(ValueError, match='damping="auto" is for A'):
        ConjugateGradient(squared=True, damping="auto")
    matrix, b = symmetric(torch.linspace(-1, 2, 30, dtype=F64)), right_hand_sides(30, 1)
    report = ConjugateGradient(squared=True, damping=0.1).solve(matrix, b).report
    assert report.lowest_eigenvalue is None and report.converged


def test_what_is_no_damping_is_refused():
    for solver in (ConjugateGradient, MinRes, Dense, Identity):
        for wrong in ("Auto", "automatic", "0.1", "", None, True, [0.1]):
            with pytest.raises(TypeError, match=r'damping must be a number, not .*; or "auto"'):
                solver(damping=wrong)
        with pytest.raises(ValueError, match="damping must be zero or positive"):
            solver(damping=-0.1)
    with pytest.raises(TypeError, match="damping must be a number"):
        RetrainingSettings(damping="auto")
    with pytest.raises(ValueError, match='damping is "auto"'):
        MinRes(damping="auto").shift  # noqa: B018
    assert MinRes(damping=0.5).shift == 0.5
    solver = MinRes(damping=0.5)
    assert solver.decided(torch.eye(3)) == (solver, None)


def test_a_product_that_is_not_finite_ends_it():
    matrix = like_a_hessian(-0.3)
    matrix[3, 3] = math.nan
    for solver in SOLVERS[:2]:
        with pytest.raises(FloatingPointError, match="a product with the operator is not finite"):
            replace(solver, damping="auto").solve(matrix, right_hand_sides(400, 1))


# --- in a chain ----------------------------------------------------------------------------------


def chain(solver, case: int) -> Chain:
    first = TRAINED["SGD"]()
    last = Stage(copy.deepcopy(first.embedding), randomised(mlp(2, 6), 3).head, cross_entropy,
                 examples(30, 2, 2), l2=1e-3)  # fmt: skip
    descend(
        last.with_trained(last.own) if case == 1 else last, SGD(lr=0.1), 3, 8, 1, progress=False
    )
    link = Frozen(last, solver) if case == 1 else Proximal(last, 0.01, solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StationarityWarning)
        return Chain([Optimum(first, solver), link], progress=False)


@pytest.mark.parametrize("case", [1, 2])
def test_each_system_of_a_chain_has_its_own(case):
    test = examples(5, 2, 7)
    automatic = chain(MinRes(tol=1e-10, damping="auto"), case)
    scores = automatic.scores(test, per_test=True)
    reports = [one.solves[0] for one in scores]
    for report, link in zip(reports, automatic.links, strict=True):
        values = torch.linalg.eigvalsh(link.operator.dense())
        lowest = float(values[0])
        if lowest < -1e-10:
            assert 1.1 * lowest <= report.lowest_eigenvalue <= 0.95 * lowest
            assert 0.95 <= report.damping / rule(values) <= 1.1
        else:
            assert report.damping == 0
    assert reports[0].damping > 0 and reports[0].damping != reports[1].damping
    numbers = [
        replace(link, solver=Dense(damping=report.damping))
        for link, report in zip(automatic.links, reports, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StationarityWarning)
        exact = Chain(numbers, progress=False)
    for one, other in zip(scores, exact.scores(test, per_test=True), strict=True):
        assert relative_error(one.values, other.values) < 1e-7


def test_what_is_kept_tells_the_rule_from_a_number(tmp_path):
    test = examples(5, 2, 7)
    automatic = chain(MinRes(damping="auto"), 2)
    scores = automatic.scores(test, out=tmp_path / "kept")
    again = automatic.scores(test, out=tmp_path / "kept")
    for one, other in zip(scores, again, strict=True):
        assert one.solves == other.solves and torch.equal(one.values, other.values)
        assert other.solves[0].lowest_eigenvalue is not None
    same = scores[0].solves[0].damping
    with pytest.raises(ValueError, match="another problem"):
        chain(MinRes(damping=same), 2).scores(test, out=tmp_path / "kept")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)  # the other system would have had another
        chain(MinRes(damping=same), 2).scores(test, out=tmp_path / "numbers")
    with pytest.raises(ValueError, match="another problem"):
        automatic.scores(test, out=tmp_path / "numbers")


def test_a_cluster_above_zero_does_not_hide_what_is_below_it():
    diagonal = torch.ones(4000, dtype=torch.float64)
    diagonal[7] = -0.5
    found = automatic_damping(torch.diag(diagonal))
    assert found.lowest_eigenvalue == pytest.approx(-0.5, rel=0.1) and found.damping > 0.5
