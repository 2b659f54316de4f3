"""Laws that hold whatever the data: limits, sums, orders, scales."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import problem_named
from hypothesis import given
from hypothesis import strategies as st
from problems import ALPHAS, F64, Pieces, check, relative_error

from msif_lib import (
    FixedEmbeddingInfluence,
    SingleStageInfluence,
    Stage,
    UpdatedEmbeddingInfluence,
)
from msif_lib.curvature import CrossHessian, GaussNewton, Hessian
from msif_lib.solvers import ConjugateGradient, Dense, MinRes

pytestmark = pytest.mark.numeric


def scores_of(problem, alpha, test=None, solver=None, per_test=False, stages=None):
    first, second = stages or problem.stages(alpha)
    solver = solver or Dense()
    if alpha is None:
        run = FixedEmbeddingInfluence(first, second, solver, progress=False)
    else:
        run = UpdatedEmbeddingInfluence(first, second, alpha, solver, progress=False)
    return run.scores(test or problem.test_data, per_test=per_test)


def reordered(stage: Stage, order: torch.Tensor, batch_size: int) -> Stage:
    x, y = stage.data
    return Stage(
        stage.embedding, stage.head, stage.loss, (x[order], y[order]), stage.l2, batch_size,
        stage.regularizer,
    )  # fmt: skip


# --- alpha -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convex", "mlp", "cnn average"])
def test_case_1_is_case_2_at_large_alpha_with_an_error_of_order_one_over_alpha(name):
    problem = problem_named(name)
    case1 = problem.exact(None).sum(1)
    errors = []
    for alpha in (1e2, 1e3, 1e4):
        values = scores_of(problem, alpha).values
        check(values, problem.exact(alpha).sum(1), 1e-8)
        errors.append(relative_error(values, case1))
    assert errors[2] < 1e-2
    for larger, smaller in itertools.pairwise(errors):
        assert 9 < larger / smaller < 11


@pytest.mark.parametrize("alpha", ALPHAS)
def test_case_2_is_its_schur_form(problem, alpha):
    check(scores_of(problem, alpha, per_test=True).values, problem.pieces(alpha).schur(alpha), 1e-9)


@given(
    p=st.integers(1, 6),
    t=st.integers(1, 6),
    alpha=st.floats(1e-3, 1e3).filter(lambda a: abs(a - 0.5) > 1e-3),
    seed=st.integers(0, 2**16),
)
def test_the_schur_form_is_an_identity_of_algebra(p, t, alpha, seed):
    g = torch.Generator().manual_seed(seed)

    def definite(size):
        root = torch.randn(size, size, dtype=F64, generator=g)
        return root @ root.T / size + torch.eye(size, dtype=F64)

    joint = definite(p + t)
    pieces = Pieces(
        g=torch.randn(5, p + 3, dtype=F64, generator=g),
        h_g=definite(p + 3),
        f_w=torch.randn(p, 2, dtype=F64, generator=g),
        f_t=torch.randn(t, 2, dtype=F64, generator=g),
        f_ww=joint[:p, :p],
        f_wt=joint[:p, p:],
        f_tt=joint[p:, p:],
    )
    scale = pieces.case1().abs().max()
    assert (pieces.schur(alpha) - pieces.case2(alpha)).abs().max() <= 1e-9 * scale


def test_small_alpha_only_scales(convex):
    """With S nonsingular the scores fall linearly in alpha, to a fixed direction."""
    pieces = convex.pieces(ALPHAS[0])
    small, smaller = (pieces.case2(alpha) / alpha for alpha in (1e-6, 1e-7))
    assert relative_error(small, smaller) < 1e-3


# --- sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, *ALPHAS])
def test_scores_of_the_test_examples_sum_to_the_summed_score(problem, alpha):
    per_test = scores_of(problem, alpha, per_test=True)
    summed = scores_of(problem, alpha)
    check(per_test.values.sum(1), summed.values, 1e-11)
    for number in (0, 5):
        x, y = problem.test_data
        alone = scores_of(problem, alpha, (x[[number]], y[[number]]))
        check(per_test.values[:, number], alone.values, 1e-11)


@given(data=st.data())
def test_a_group_is_the_sum_of_its_pairs(data):
    problem = problem_named("mlp")
    scores = _mlp_scores()
    indices = data.draw(
        st.lists(st.integers(0, problem.spec.m - 1), min_size=1, max_size=20, unique=True)
    )
    total = scores.values[indices].sum(0)
    assert torch.allclose(scores.group(indices), total, rtol=1e-12)
    assert torch.allclose(scores.group(torch.tensor(indices)), total, rtol=1e-12)
    mask = torch.zeros(problem.spec.m, dtype=torch.bool)
    mask[indices] = True
    assert torch.allclose(scores.group(mask), total, rtol=1e-10)
    m, s = problem.spec.m, len(indices)
    assert torch.allclose(scores.group_effect(indices), -total / m, rtol=1e-12)
    centred = -(total - s * scores.values.mean(0)) / (m - s)
    assert torch.allclose(scores.group_effect(indices, renormalise=True), centred, atol=1e-12)
    assert torch.allclose(scores.group_effect(mask, renormalise=True), centred, atol=1e-12)


def _mlp_scores(cache=[]):  # noqa: B006 (computed once)
    if not cache:
        cache.append(scores_of(problem_named("mlp"), ALPHAS[0], per_test=True))
    return cache[0]


def test_an_empty_group_has_no_influence(mlp):
    scores = _mlp_scores()
    assert torch.equal(scores.group([]), torch.zeros(6, dtype=F64))
    assert torch.equal(scores.group_effect([]).abs(), torch.zeros(6, dtype=F64))


def test_the_two_conventions_of_removal_agree_without_a_regularizer():
    """The scores then sum to zero, for the mean gradient is zero at the optimum."""
    problem = problem_named("convex quartic")
    scores = scores_of(problem, None)
    assert scores.values.mean().abs() < 1e-12 * scores.values.abs().max()
    m = problem.spec.m
    check(scores.removal_effect * m / (m - 1), scores.removal_effect_renormalised, 1e-11)


def test_the_two_conventions_of_removal_differ_with_one(convex):
    scores = scores_of(convex, None)
    assert relative_error(scores.removal_effect, scores.removal_effect_renormalised) > 0.01


# --- order, batches, memory --------------------------------------------------------------------


@given(
    order_seed=st.integers(0, 2**16),
    batch_sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    case=st.sampled_from([None, ALPHAS[0]]),
)
def test_order_and_batch_size_never_change_a_score(order_seed, batch_sizes, case):
    problem = problem_named("mlp")
    g = torch.Generator().manual_seed(order_seed)
    first, second = problem.stages(case)
    order = torch.randperm(problem.spec.m, generator=g)
    stages = (
        reordered(first, order, batch_sizes[0]),
        reordered(second, torch.randperm(problem.spec.n, generator=g), batch_sizes[1]),
    )
    x, y = problem.test_data
    shuffled = torch.randperm(len(x), generator=g)
    values = scores_of(problem, case, (x[shuffled], y[shuffled]), stages=stages).values
    check(values, problem.exact(case).sum(1)[order], 1e-10)
    per_test = scores_of(problem, case, (x[shuffled], y[shuffled]), None, True, stages).values
    check(per_test, problem.exact(case)[order][:, shuffled], 1e-10)


@pytest.mark.parametrize("batch_size", [1, 4, 17, 1024])
def test_memory_and_batches_never_change_a_product(cnn, batch_size):
    g = torch.Generator().manual_seed(0)
    first, second = cnn.stages(ALPHAS[0], batch_sizes=(batch_size, batch_size))
    for kind in (Hessian, CrossHessian):
        stage = first if kind is Hessian else second
        kept, recorded = kind(stage), kind(stage, memory_budget=0)
        some = kind(stage, memory_budget=200_000)
        x = torch.randn(kept.shape[1], 3, dtype=F64, generator=g)
        assert torch.allclose(kept @ x, recorded @ x, rtol=1e-12, atol=1e-14)
        assert torch.allclose(kept @ x, some @ x, rtol=1e-12, atol=1e-14)
        assert torch.allclose(recorded @ x, recorded @ x)


def test_a_dataset_in_two_copies_halves_no_score(convex):
    """A mean: doubling the data leaves H, and so every score, as it was; removal halves."""
    first, second = convex.stages()
    x, y = first.data
    doubled = Stage(
        first.embedding, first.head, first.loss, (torch.cat([x, x]), torch.cat([y, y])), first.l2
    )
    once = scores_of(convex, None)
    twice = scores_of(convex, None, stages=(doubled, second))
    check(twice.values, torch.cat([once.values, once.values]), 1e-10)
    check(twice.removal_effect[:31], once.removal_effect / 2, 1e-10)


def test_scaling_a_loss_scales_as_it_should(mlp):
    """c g and c R_G leave the optimum; H and grad g scale alike, so no score moves in pretraining.

    Scaling the finetuning loss with its l2 scales the test loss, and so every score of case 1.
    """
    first, second = mlp.stages()
    loss = first.loss
    scaled = Stage(
        first.embedding, first.head, lambda o, t: 3 * loss(o, t), first.data, l2=3 * first.l2
    )
    base = scores_of(mlp, None).values
    check(scores_of(mlp, None, stages=(scaled, second)).values, base, 1e-10)
    scaled = Stage(
        second.embedding, second.head, lambda o, t: 3 * loss(o, t), second.data, l2=3 * second.l2
    )
    check(scores_of(mlp, None, stages=(first, scaled)).values, 3 * base, 1e-10)


def test_single_stage_influence_is_symmetric(mlp):
    """I_ij = I_ji: -grad g_i' H^-1 grad g_j."""
    run = SingleStageInfluence(mlp.stages()[0], Dense(), progress=False)
    values = run.scores(mlp.pretraining_data, per_test=True).values
    check(values, values.T.contiguous(), 1e-10)
    check(run.self_influence().values, values.diagonal(), 1e-10)


def test_damping_to_infinity_is_the_gradient_dot_product(mlp):
    """(H + λI)^-1 -> I/λ."""
    first, second = mlp.stages()
    damping = 1e8
    run = FixedEmbeddingInfluence(first, second, MinRes(damping=damping), Dense())
    pieces = mlp.pieces(None)
    b = pieces.f_w - pieces.f_wt @ torch.linalg.solve(pieces.f_tt, pieces.f_t)
    dot = -(pieces.g[:, : mlp.p_w] @ b).sum(1)
    check(damping * run.scores(mlp.test_data).values, dot)


def test_the_squared_system_without_damping_is_the_inverse(mlp):
    check(
        scores_of(mlp, None, solver=ConjugateGradient(squared=True, tol=1e-11)).values,
        problem_named("mlp").exact(None).sum(1),
    )


def test_a_gauss_newton_matrix_stays_when_the_data_are_reordered(mlp):
    stage = mlp.stages()[0]
    order = torch.randperm(mlp.spec.m, generator=torch.Generator().manual_seed(3))
    other = reordered(stage, order, 5)
    assert torch.allclose(GaussNewton(stage).dense(), GaussNewton(other).dense(), rtol=1e-10)
