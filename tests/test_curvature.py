"""Every operator against the dense matrix that autodiff gives for the reference model."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from problems import ALPHAS, F64, Problem
from torch.autograd.functional import hessian, jacobian

from msif_lib import Stage
from msif_lib.curvature import AddDiagonal, CrossHessian, GaussNewton, Hessian
from msif_lib.solvers import MinRes

pytestmark = pytest.mark.numeric
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def exact_blocks(problem: Problem) -> dict[str, torch.Tensor]:
    """Blocks of F's Hessian at the tuned model, by autodiff of the reference."""
    pieces = problem.pieces(ALPHAS[0])
    joint = torch.cat(
        [
            torch.cat([pieces.f_ww, pieces.f_wt], 1),
            torch.cat([pieces.f_wt.T, pieces.f_tt], 1),
        ]
    )
    return {"joint": joint, "embedding": pieces.f_ww, "head": pieces.f_tt, "cross": pieces.f_wt}


def holds(operator, exact: torch.Tensor) -> None:
    """The operator is the matrix: shape, both kinds of product, dense, transpose, SciPy."""
    g = torch.Generator().manual_seed(1)
    rows, columns = exact.shape
    assert operator.shape == (rows, columns)
    assert operator.dtype == exact.dtype
    assert operator.device == exact.device
    for width in (None, 1, 3):
        shape = (columns,) if width is None else (columns, width)
        x = torch.randn(*shape, dtype=F64, generator=g)
        product = operator @ x
        assert product.shape == (exact @ x).shape
        assert torch.allclose(product, exact @ x, **CLOSE)
        assert not product.requires_grad
        y = torch.randn(rows, *shape[1:], dtype=F64, generator=g)
        assert torch.allclose(operator.T @ y, exact.T @ y, **CLOSE)
    assert torch.allclose(operator.dense(), exact, **CLOSE)
    assert operator.T.shape == (columns, rows)
    assert torch.allclose(operator.T.T @ x, exact @ x, **CLOSE)

    wrapped = operator.to_scipy()
    assert isinstance(wrapped, scipy.sparse.linalg.LinearOperator)
    assert wrapped.shape == (rows, columns)
    assert wrapped.dtype == np.float64
    v, w = np.linspace(-1, 1, columns), np.linspace(2, -1, rows)
    matrix = exact.numpy()
    np.testing.assert_allclose(wrapped.matvec(v), matrix @ v, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(wrapped.rmatvec(w), matrix.T @ w, rtol=1e-9, atol=1e-12)
    vs, ws = np.stack([v, v**2], 1), np.stack([w, w**2], 1)
    np.testing.assert_allclose(wrapped.matmat(vs), matrix @ vs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(wrapped.rmatmat(ws), matrix.T @ ws, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(wrapped.T @ w, matrix.T @ w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", ["joint", "embedding", "head"])
def test_hessian_blocks(problem, block):
    stage = problem.stages(ALPHAS[0])[1]
    holds(Hessian(stage, block=block), exact_blocks(problem)[block])


def test_hessian_of_pretraining(problem):
    holds(Hessian(problem.stages()[0]), problem.pretrained.hessian)


def test_cross_hessian_and_its_transpose(problem):
    operator = CrossHessian(problem.stages(ALPHAS[0])[1])
    exact = exact_blocks(problem)["cross"]
    holds(operator, exact)
    holds(operator.T, exact.T)


def test_add_diagonal(mlp):
    stage = mlp.stages(ALPHAS[0])[1]
    diagonal = torch.linspace(0.1, 2, mlp.p_w + mlp.p_t, dtype=F64)
    operator = AddDiagonal(Hessian(stage), diagonal)
    holds(operator, exact_blocks(mlp)["joint"] + torch.diag(diagonal))


def gauss_newton(problem: Problem) -> torch.Tensor:
    """(1/n) sum J' L J + R'' of finetuning, an example at a time."""
    w, t = problem.second(ALPHAS[0])
    theta = torch.cat([w, t])
    x, y = problem.finetuning_data

    def outputs(v, i):
        return problem.head_t(v[problem.p_w :], problem.embed(v[: problem.p_w], x[i : i + 1]))[0]

    total = hessian(lambda v: problem._penalty(*problem.split(v), 1), theta)
    for i in range(len(x)):
        j = jacobian(lambda v, i=i: outputs(v, i), theta)
        curved = hessian(lambda o, i=i: problem.loss(o[None], y[i : i + 1])[0], outputs(theta, i))
        total = total + j.T @ curved @ j / len(x)
    return total


@pytest.mark.parametrize("block", ["joint", "embedding", "head"])
def test_gauss_newton_is_the_sum_of_its_definition(problem, block):
    exact = gauss_newton(problem)
    p = problem.p_w
    part = {"joint": slice(None), "embedding": slice(p), "head": slice(p, None)}[block]
    holds(GaussNewton(problem.stages(ALPHAS[0])[1], block=block), exact[part, part])


def test_gauss_newton_is_the_hessian_where_outputs_are_linear(convex):
    stage = convex.stages()[0]
    assert torch.allclose(GaussNewton(stage).dense(), Hessian(stage).dense(), **CLOSE)


def test_gauss_newton_is_not_the_hessian_of_a_network_but_stays_positive(mlp):
    first, second = mlp.stages()
    moved = first.vector() + torch.sin(torch.arange(len(first.vector())).to(F64))
    stage = Stage(first.embedding, first.head, first.loss, first.data, l2=0.0)
    stage.load_vector(moved)
    gauss, full = GaussNewton(stage).dense(), Hessian(stage).dense()
    assert torch.linalg.eigvalsh(full)[0] < -1e-3
    assert torch.linalg.eigvalsh(gauss)[0] > -1e-12
    assert (gauss - full).abs().max() > 1e-3
    assert second.size == mlp.spec.n


def test_a_hessian_stays_where_it_was_taken(mlp):
    """Later changes of the parameters do not move it, nor its transpose, kept graph or not."""
    first, second = mlp.stages(ALPHAS[0])
    operators = [Hessian(first), Hessian(first, memory_budget=0), CrossHessian(second)]
    x = [torch.ones(operator.shape[1], dtype=F64) for operator in operators]
    y = torch.ones(operators[2].shape[0], dtype=F64)
    before = [operator @ v for operator, v in zip(operators, x)]
    transposed = operators[2].T @ y
    first.load_vector(first.vector() + 1)
    second.load_vector(second.vector() + 1)
    for operator, v, product in zip(operators, x, before):
        assert torch.allclose(operator @ v, product)
        assert torch.allclose(operator.dense() @ v, product)
    assert torch.allclose(operators[2].T @ y, transposed)


def test_frozen_parameters_take_part_and_nothing_is_left_behind(mlp):
    first, _ = mlp.stages()
    for parameter in first.embedding.parameters():
        parameter.requires_grad_(False)
    holds(Hessian(first), mlp.pretrained.hessian)
    assert all(p.grad is None for p in [*first.embedding.parameters(), *first.head.parameters()])
    assert not any(p.requires_grad for p in first.embedding.parameters())


def test_an_embedding_without_parameters():
    """Plain logistic regression: the joint Hessian is the head's."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, dtype=F64, generator=g), torch.randn(9, 1, dtype=F64, generator=g)
    head = torch.nn.Linear(3, 1, bias=False, dtype=F64)
    stage = Stage(torch.nn.Identity(), head, lambda o, t: ((o - t) ** 2).sum(1) / 2, (x, y), l2=0.2)
    exact = x.T @ x / 9 + 0.2 * torch.eye(3, dtype=F64)
    holds(Hessian(stage), exact)
    holds(Hessian(stage, block="head"), exact)
    holds(GaussNewton(stage), exact)


def test_products_in_float32_keep_their_type(mlp):
    stage = mlp.stages(dtype=torch.float32)[0]
    operator = Hessian(stage)
    product = operator @ torch.ones(operator.shape[1])
    assert product.dtype == torch.float32
    exact = mlp.pretrained.hessian.sum(1)
    assert (product - exact).norm() / exact.norm() < 1e-5
    assert operator.to_scipy().dtype == np.float32


def test_scipy_solves_with_an_operator(mlp):
    operator = Hessian(mlp.stages()[0])
    b = np.linspace(-1, 1, operator.shape[0])
    x, info = scipy.sparse.linalg.minres(operator.to_scipy(), b, rtol=1e-12)
    assert info == 0
    ours = MinRes(tol=1e-10).solve(operator, torch.tensor(b)).x
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-6)


# --- errors --------------------------------------------------------------------------------------


def test_errors_of_operators(mlp):
    first, second = mlp.stages()
    operator = Hessian(first)
    p = operator.shape[0]
    with pytest.raises(ValueError, match=r"shape \(27, 27\) cannot be applied to \(26,\)"):
        operator @ torch.ones(p - 1, dtype=F64)
    with pytest.raises(ValueError, match=r"cannot be applied to \(27, 2, 2\)"):
        operator @ torch.ones(p, 2, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"operator is torch.float64 on cpu, the vector torch.f"):
        operator @ torch.ones(p)
    with pytest.raises(ValueError, match=r"the vector torch.float64 on meta"):
        operator @ torch.ones(p, dtype=F64, device="meta")
    for kind in (Hessian, GaussNewton):
        with pytest.raises(ValueError, match='block must be "joint", "embedding" or "head", not'):
            kind(first, block="all")
    with pytest.raises(ValueError, match=r"diagonal of shape \(3,\) does not fit"):
        AddDiagonal(operator, torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="does not fit"):
        AddDiagonal(CrossHessian(second), torch.ones(second.embedding_size, dtype=F64))


def test_a_hessian_that_is_dropped_frees_its_graph(mlp):
    stage = mlp.stages()[0]
    freed = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_backward(y)  # an output: a hook that returns it closes a cycle
            weakref.finalize(ctx, freed.append, True)
            return y

        @staticmethod
        def backward(ctx, upstream):
            return upstream * ctx.saved_tensors[0]

    watched = Stage(
        stage.embedding, stage.head, lambda o, t: Watched.apply(o).sum(1), stage.data, check=False
    )
    operator = Hessian(watched)
    del operator
    gc.collect()
    assert freed


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_by_the_caller_change_nothing(mlp: Problem, off, budget):
    stage = mlp.stages()[0]
    exact = Hessian(stage).dense()
    v = torch.ones(len(exact), 2, dtype=F64)
    before = Hessian(stage, memory_budget=budget)
    with off():
        within = Hessian(stage, memory_budget=budget)
        assert torch.allclose(before @ v, exact @ v, **CLOSE)
        assert torch.allclose(within @ v, exact @ v, **CLOSE)
        assert torch.allclose(GaussNewton(stage) @ v, GaussNewton(stage).dense() @ v, **CLOSE)
    assert torch.allclose(within @ v, exact @ v, **CLOSE)


def test_a_model_that_differentiates_within():
    """torch.func in a model allows no counting of what is kept: then nothing is."""

    class Slope(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=F64))

        def forward(self, x):
            return torch.func.vmap(torch.func.grad(lambda r: torch.tanh(r @ self.weight)))(x)

    x = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    stage = Stage(
        torch.nn.Identity(), Slope(), lambda o, t: (o - t[:, None]).square().sum(1), (x, x[:, 0])
    )
    exact = hessian(lambda v: stage.losses(v[:0], v, *stage.data).mean(), stage.vector())
    assert torch.allclose(Hessian(stage).dense(), exact, **CLOSE)
