"""The ground truth against trainings of its own, one dense Newton at a time."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import problem_named
from problems import ALPHAS, F64, Problem, newton, relative_error, retrain
from torch import Tensor, nn

from msif_lib import Chain, FixedEmbeddingInfluence, Stage, UpdatedEmbeddingInfluence, cross_entropy
from msif_lib.curvature import Hessian
from msif_lib.links import Frozen, Optimum, Proximal, Unrolled
from msif_lib.retraining import AbsoluteInverse, RetrainingSettings, minimise, retrain_without
from msif_lib.solvers import Dense
from msif_lib.training import SGD, descend, train

QUIET = {"progress": False}


# --- minimise ------------------------------------------------------------------------------------


def rosenbrock(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Of dimension p, scaled differently in every row."""
    x = x.detach().requires_grad_()
    scale = (10.0 ** (which % 3)).to(x)
    value = (scale[:, None] * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def logistic(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Strictly convex: log cosh of random projections with a shift a row, plus a square."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(12, x.shape[1], dtype=F64, generator=g)
    x = x.detach().requires_grad_()
    z = x @ a.T - (1 + which[:, None]) * 0.3
    value = (torch.logaddexp(z, -z)).mean(1) + 0.05 * (x * x).sum(1)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def test_many_pairs_take_fewer_evaluations_where_they_fit(monkeypatch):
    curvature = torch.logspace(0, 4, 120, dtype=F64)

    def quadratic(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return (curvature * x * x).sum(1) / 2, curvature * x

    start = torch.ones(2, 120, dtype=F64)
    many, few = (minimise(quadratic, start, 1e-8, None, 2000, memory) for memory in (None, 20))
    assert many.converged.all() and few.converged.all()
    assert many.evaluations.max() < 0.7 * few.evaluations.min()
    monkeypatch.setattr("msif_lib.support.minimise._MEMORY_BYTES", 1)
    again = minimise(quadratic, start, 1e-8, None, 2000)
    assert torch.equal(again.evaluations, few.evaluations)


@pytest.mark.parametrize(("objective", "p"), [(rosenbrock, 4), (rosenbrock, 2), (logistic, 6)])
def test_minimise_against_scipy(objective, p):
    start = torch.linspace(-1.2, 0.8, 5 * p, dtype=F64).view(5, p)
    found = minimise(objective, start, 1e-9, max_evaluations=5000)
    assert found.converged.all()
    for row in range(5):
        which = torch.tensor([row])

        def function(x, which=which):
            value, gradient = objective(torch.tensor(x)[None], which)
            return value.item(), gradient[0].numpy()

        theirs = scipy.optimize.minimize(
            function, start[row].numpy(), jac=True, method="BFGS", options={"gtol": 1e-9}
        )
        if objective is logistic:  # Rosenbrock's function has other minima in four dimensions
            np.testing.assert_allclose(found.x[row].numpy(), theirs.x, atol=1e-7)
        true = np.linalg.norm(function(found.x[row].numpy())[1])
        assert float(found.gradient_norms[row]) == pytest.approx(true, rel=1e-6)
        assert true <= 1e-9


def test_minimise_rows_do_not_touch_each_other():
    start = torch.linspace(-1, 1, 24, dtype=F64).view(4, 6)
    together = minimise(logistic, start, 1e-10)
    for row in range(4):
        alone = minimise(
            lambda x, which, row=row: logistic(x, which + row), start[row : row + 1], 1e-10
        )
        assert torch.allclose(alone.x[0], together.x[row], atol=1e-9)


def test_minimise_counts_every_evaluation_and_is_quick_with_the_hessian():
    calls = torch.zeros(3, dtype=torch.long)

    def counted(x: Tensor, which: Tensor):
        calls[which] += 1
        return logistic(x, which)

    start = torch.zeros(3, 6, dtype=F64)
    found = minimise(counted, start, 1e-10)
    assert torch.equal(found.evaluations, calls)
    single = torch.autograd.functional.hessian(
        lambda x: _value(x), minimise(logistic, start[:1], 1e-12).x[0]
    )
    near = minimise(logistic, found.x + 1e-2, 1e-10, AbsoluteInverse(single))
    assert near.evaluations.max() < minimise(logistic, found.x + 1e-2, 1e-10).evaluations.max()
    assert near.converged.all()


def _value(x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(12, len(x), dtype=F64, generator=g) @ x - 0.3
    return torch.logaddexp(z, -z).mean() + 0.05 * x @ x


def test_minimise_is_honest_when_it_stops_short():
    start = torch.full((2, 4), -1.2, dtype=F64)
    found = minimise(rosenbrock, start, 1e-9, max_evaluations=7)
    assert (found.evaluations <= 7).all()
    assert not found.converged.any()
    assert (found.gradient_norms > 1e-9).all()
    impossible = minimise(logistic, torch.zeros(1, 6, dtype=F64), 1e-30)
    assert not impossible.converged.any()
    assert impossible.gradient_norms[0] < 1e-7


def test_minimise_does_nothing_at_a_minimum():
    there = minimise(logistic, torch.zeros(2, 6, dtype=F64), 1e-10).x
    again = minimise(logistic, there, 1e-9)
    assert torch.equal(again.x, there)
    assert again.evaluations.tolist() == [1, 1]


def test_minimise_backs_off_from_where_the_function_is_not_finite():
    def log_barrier(x: Tensor, which: Tensor):
        return (x - torch.log(x)).sum(1), 1 - 1 / x

    found = minimise(log_barrier, torch.full((1, 2), 0.01, dtype=F64), 1e-9)
    assert found.converged.all()
    assert torch.allclose(found.x, torch.ones(1, 2, dtype=F64), atol=1e-7)
    with pytest.raises(FloatingPointError, match="not finite at the start"):
        minimise(log_barrier, torch.full((1, 2), -1.0, dtype=F64), 1e-9)


def test_the_preconditioner_is_the_inverse_of_the_absolute_value():
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=g))[0]
    values = torch.tensor([3.0, -2.0, 0.5, 0.0], dtype=F64)
    rows = torch.randn(3, 4, dtype=F64, generator=g)
    inverse = (q / values.abs().clamp_min(3e-2)) @ q.T
    assert torch.allclose(AbsoluteInverse((q * values) @ q.T, floor=1e-2)(rows), rows @ inverse)


# --- retrain_without -----------------------------------------------------------------------------


def two(first: Stage, second: Stage, alpha: float | None = None, **settings) -> Chain:
    """Case 1, or with an alpha case 2."""
    link = Frozen(second) if alpha is None else Proximal(second, alpha)
    return Chain([Optimum(first), link], **QUIET, **settings)


def by_newton(
    problem: Problem, removal: list[int], alpha: float | None, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """Test losses (T,) before and after a removal, each training a dense Newton's method."""
    m = problem.spec.m
    weights = torch.full((m,), 1 / (m - len(removal)) if renormalise else 1 / m, dtype=F64)
    weights[removal] = 0
    theta = newton(lambda v: problem.pretraining(v, weights), problem.pretrained.x).x
    w = problem.split(theta)[0]
    if alpha is None:
        after = w, newton(lambda v: problem.finetuning(w, v), problem.finetuned.x).x
    else:
        tuned = newton(lambda v: problem.proximal(v, w, alpha), problem.tuned(alpha).x).x
        after = problem.split(tuned)
    return problem.test_losses(*problem.second(alpha)), problem.test_losses(*after)


REMOVALS = [[0], [4], [30], [3, 9, 11], list(range(5, 13))]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("alpha", [None, *ALPHAS])
def test_retraining_is_what_newton_s_method_finds(convex, alpha, renormalise):
    chain = two(*convex.stages(alpha), alpha)
    settings = RetrainingSettings(tol=1e-11)
    found = retrain_without(
        chain, REMOVALS, convex.test_data, renormalise=renormalise, settings=settings, **QUIET
    )
    assert found.converged.all()
    assert found.converged_before
    assert found.gradient_norms.max() <= 1e-11
    assert found.convention == ("renormalised" if renormalise else "fixed weight")
    assert found.start == "warm"
    for number, removal in enumerate(REMOVALS):
        before, after = by_newton(convex, removal, alpha, renormalise)
        assert relative_error(found.losses[number], after) < 1e-9
        assert relative_error(found.losses_before, before) < 1e-9
        assert relative_error(found.per_test_change[number], after - before) < 1e-7
    assert torch.allclose(found.change, found.per_test_change.sum(1))
    assert found.losses.shape == (5, 6)


@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
def test_a_cold_start_ends_where_a_warm_one_does(convex, alpha):
    chain = two(*convex.stages(alpha), alpha)
    cold = convex.stages(alpha)
    for stage in cold:
        stage.load_vector(torch.zeros_like(stage.vector()))
    warm = retrain_without(chain, REMOVALS, convex.test_data, **QUIET)
    settings = RetrainingSettings(cold_start=cold, tol=1e-10)
    found = retrain_without(chain, REMOVALS, convex.test_data, settings=settings, **QUIET)
    assert found.start == "cold"
    assert found.converged.all()
    assert torch.allclose(found.losses, warm.losses, atol=1e-7)
    assert found.evaluations.sum() > warm.evaluations.sum()


def test_a_hessian_that_is_there_is_not_computed_again(mlp, monkeypatch):
    first, second = mlp.stages()
    what = two(first, second), [[1], [4]], mlp.test_data
    settings = RetrainingSettings(damping=1e-3)
    own = retrain_without(*what, fraction=0.1, settings=settings, **QUIET)
    given = Hessian(first).dense()

    def dense(operator):
        assert operator.shape[0] == second.head_size, "of the head alone"
        return undisturbed(operator)

    undisturbed = Hessian.dense
    monkeypatch.setattr(Hessian, "dense", dense)
    settings = dataclasses.replace(settings, first_hessian=given)
    found = retrain_without(*what, fraction=0.1, settings=settings, **QUIET)
    assert torch.equal(found.losses, own.losses)


@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
def test_damping_retrains_a_model_with_a_symmetry(alpha):
    """Two linear layers: turning the middle changes neither losses nor weight decay."""
    g = torch.Generator().manual_seed(3)
    z, x = torch.randn(40, 5, dtype=F64, generator=g), torch.randn(30, 5, dtype=F64, generator=g)
    rule = torch.randn(5, 3, dtype=F64, generator=g)
    noise = torch.randn(40, 3, dtype=F64, generator=g)
    torch.manual_seed(0)
    embedding = nn.Linear(5, 2, bias=False, dtype=F64)
    first = Stage(
        embedding, nn.Linear(2, 3, dtype=F64), cross_entropy,
        (z, (z @ rule + noise).argmax(1)), l2=0.01,
    )  # fmt: skip
    train(first, 1e-11)
    second = Stage(
        copy.deepcopy(embedding), nn.Linear(2, 3, dtype=F64), cross_entropy,
        (x[:20], (x[:20] @ rule).argmax(1)), l2=0.01,
    )  # fmt: skip
    more = {} if alpha is None else {"towards": first.embedding_vector(), "alpha": alpha}
    train(second, 1e-11, head_only=alpha is None, **more)
    eigenvalues = torch.linalg.eigvalsh(Hessian(first).dense())
    assert eigenvalues[0].abs() < 1e-9 < 1e-3 < eigenvalues[1]

    test = x[20:], (x[20:] @ rule).argmax(1)
    groups = [[0, 5, 9], [2, 3, 11], [7, 20, 31]]
    ends = [
        retrain_without(
            two(first, second, alpha), groups, test,
            settings=RetrainingSettings(tol=1e-10, **how), **QUIET,
        )
        # The third is as good as none, so that it is given up halfway.
        for how in ({"damping": 1e-2}, {}, {"damping": 1e-12}, {"cold_start": (first, second)})
    ]  # fmt: skip
    assert all(end.converged.all() for end in ends)
    damped, *others = ends
    assert (damped.change.abs() > 1e-2).all(), "something is to be found out"
    for other in others:
        assert relative_error(damped.per_test_change, other.per_test_change) < 1e-7
        assert (damped.evaluations[:, 0] < other.evaluations[:, 0]).all()


@pytest.mark.parametrize("name", ["mlp", "cnn average", "mlp with a penalty"])
def test_networks_retrain_to_minima(name):
    problem = problem_named(name)
    for alpha in (None, ALPHAS[0]):
        chain = two(*problem.stages(alpha), alpha)
        found = retrain_without(chain, [[1], [6]], problem.test_data, fraction=0.05, **QUIET)
        assert found.converged.all()
        for number, i in enumerate((1, 6)):
            weights = torch.full((problem.spec.m,), 1 / problem.spec.m, dtype=F64)
            weights[i] *= 0.95
            theta = retrain(lambda v, c=weights: problem.pretraining(v, c), problem.pretrained)
            w = problem.split(theta)[0]
            if alpha is None:
                losses = problem.test_losses(
                    w, retrain(lambda v, w=w: problem.finetuning(w, v), problem.finetuned)
                )
            else:
                near = problem.tuned(alpha)
                tuned = retrain(lambda v, w=w, a=alpha: problem.proximal(v, w, a), near)
                losses = problem.test_losses(*problem.split(tuned))
            assert relative_error(found.losses[number], losses) < 1e-7


def test_plain_finetuning_is_sgd_from_the_end_of_case_1(mlp):
    first, headed = mlp.stages()
    removal, steps = [1, 4], SGD(lr=0.1, momentum=0.7)
    tuned = Stage.of(
        copy.deepcopy(headed.model), headed.loss, headed.data, l2=headed.l2,
        regularizer=headed.regularizer,
    )  # fmt: skip
    path = descend(tuned, steps, epochs=6, batch_size=tuned.size, seed=0, **QUIET)
    chain = Chain([Optimum(first), Frozen(headed), Unrolled(tuned, path)], **QUIET)
    found = retrain_without(chain, [removal], mlp.test_data, fraction=0.1, **QUIET)
    for share, losses in ((1.0, found.losses_before), (0.9, found.losses[0])):
        weights = torch.full((mlp.spec.m,), 1 / mlp.spec.m, dtype=F64)
        weights[removal] *= share
        theta = retrain(lambda v, c=weights: mlp.pretraining(v, c), mlp.pretrained)
        w = mlp.split(theta)[0]
        head = retrain(lambda v, w=w: mlp.finetuning(w, v), mlp.finetuned)
        x = torch.cat([w, head]).requires_grad_()
        optimizer = torch.optim.SGD([x], steps.lr, steps.momentum)
        for _ in range(6):
            optimizer.zero_grad()
            mlp.finetuning(*mlp.split(x)).backward()
            optimizer.step()
        assert not torch.allclose(x[: len(w)], w, atol=1e-3)
        assert relative_error(losses, mlp.test_losses(*mlp.split(x.detach()))) < 1e-7
    assert found.gradient_norms[0, 2] > 1e-9  # it ends where the steps end
    assert found.evaluations[0, 2] == 6


def test_how_many_models_run_together_changes_nothing(mlp):
    first, second = mlp.stages()
    removals = [[i] for i in range(7)]
    chain = two(first, second)
    base = retrain_without(chain, removals, mlp.test_data, fraction=0.1, **QUIET)
    for models_at_once in (1, 3):
        settings = RetrainingSettings(models_at_once=models_at_once)
        other = retrain_without(
            chain, removals, mlp.test_data, fraction=0.1, settings=settings, **QUIET
        )
        assert torch.allclose(base.losses, other.losses, atol=1e-8)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
def test_influence_is_the_first_order_of_retraining(convex, alpha, renormalise):
    """The error falls in proportion to the weight that is removed."""
    first, second = convex.stages(alpha)
    if alpha is None:
        run = FixedEmbeddingInfluence(first, second, Dense(), progress=False)
    else:
        run = UpdatedEmbeddingInfluence(first, second, alpha, Dense(), progress=False)
    scores = run.scores(convex.test_data)
    groups = [[2], [7], [1, 3, 8]]
    errors = []
    for fraction in (0.1, 0.01, 0.001):
        found = retrain_without(
            run, groups, convex.test_data, renormalise=renormalise, fraction=fraction,
            settings=RetrainingSettings(tol=1e-12), **QUIET,
        )  # fmt: skip
        m = convex.spec.m
        predicted = torch.stack([scores.group_effect(group, renormalise) for group in groups])
        if renormalise:  # the mean is over m - fraction s examples, not over m - s
            sizes = torch.tensor([len(group) for group in groups], dtype=F64)
            predicted = predicted * (m - sizes) / m
        errors.append(relative_error(found.change / fraction, predicted))
    assert errors[0] < 0.1
    assert 8 < errors[0] / errors[1] < 12
    assert 8 < errors[1] / errors[2] < 12


def test_flags_say_when_a_training_stopped_short(mlp):
    settings = RetrainingSettings(max_evaluations=2, tol=1e-10)
    found = retrain_without(
        two(*mlp.stages()), [[0], [1]], mlp.test_data, settings=settings, **QUIET
    )
    assert not found.converged.any()
    assert found.converged_before, "nothing removed: the start is the optimum"
    assert found.gradient_norms.max() > 1e-10
    assert (found.evaluations <= 2).all()


def test_float32_stages_are_retrained_in_float64(convex):
    first, second = convex.stages(dtype=torch.float32)
    x, y = convex.test_data
    settings = RetrainingSettings(tol=1e-10)
    chain = two(first, second)
    found = retrain_without(chain, [[0]], (x.float(), y), settings=settings, **QUIET)
    assert found.losses.dtype == F64
    assert found.converged.all()
    assert first.dtype == torch.float32
    _, after = by_newton(convex, [0], None, False)
    assert relative_error(found.losses[0], after) < 1e-5


def test_the_stages_are_left_as_they_were(convex):
    first, second = convex.stages()
    before = first.vector(), second.vector()
    retrain_without(two(first, second), [[0]], convex.test_data, **QUIET)
    assert torch.equal(first.vector(), before[0])
    assert torch.equal(second.vector(), before[1])


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removals", "settings", "message"),
    [
        ([[]], {}, "removal 0 is empty"),
        ([[0], [3, 3]], {}, "removal 1 names an example twice"),
        ([[31]], {}, r"removal 0 names an example outside 0\.\.30"),
        ([[2, -1]], {}, r"removal 0 names an example outside 0\.\.30.*negative ones mean"),
        ([[0], [True, False]], {}, "removal 1 is a mask of length 2, which does not fit 31"),
        ([[False] * 31], {}, "removal 0 is empty"),
        ([torch.ones(31, dtype=torch.bool)], {}, "removal 0 leaves no pretraining example"),
        ([list(range(31))], {}, "removal 0 leaves no pretraining example"),
        ([[0]], {"tol": 0.0}, "tol must be positive, not 0"),
        ([[0]], {"damping": -0.1}, "damping must be zero or positive, not -0.1"),
        ([[0]], {"first_hessian": torch.eye(2)}, r"first_hessian must be of shape \("),
        ([[0]], {"fraction": 0.0}, "fraction must lie above 0 and at most at 1, not 0"),
        ([[0]], {"fraction": 1.1}, "fraction must lie above 0"),
        ([[0]], {"models_at_once": 0}, "must be at least 1"),
        ([[0]], {"max_evaluations": 0}, "must be at least 1"),
        ([[0]], {"threads": 0}, "threads must be at least 1"),
        ([[0]], {"jobs": 0}, "jobs must not be 0"),
    ],
)
def test_arguments_of_retraining(convex, removals, settings, message):
    chain, how = two(*convex.stages()), {}
    if "fraction" in settings:
        how, settings = settings, {}
    with pytest.raises(ValueError, match=message):
        retrain_without(
            chain, removals, convex.test_data, settings=RetrainingSettings(**settings),
            **how, **QUIET,
        )  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, float("nan")])
def test_a_pull_must_be_positive(convex, alpha):
    with pytest.raises(ValueError, match=f"alpha must be positive, not {alpha}"):
        two(*convex.stages(ALPHAS[0]), alpha)


def test_a_hessian_must_be_finite_and_of_use(convex):
    first, second = convex.stages()
    hessian = Hessian(first).dense()
    with pytest.raises(ValueError, match="a cold start uses no first_hessian; leave it out"):
        RetrainingSettings(first_hessian=hessian, cold_start=(first, second))
    hessian[0, 0] = torch.nan
    with pytest.raises(ValueError, match="first_hessian is not finite"):
        RetrainingSettings(first_hessian=hessian)


def test_removals_must_be_sets(convex):
    chain = two(*convex.stages())
    for flat in ([0, 1], torch.tensor([0, 1]), np.array([0, 1])):
        with pytest.raises(TypeError, match=r"sets of indices.*\[\[0\], \[1\], \.\.\.\]"):
            retrain_without(chain, flat, convex.test_data, **QUIET)
    rows = retrain_without(chain, torch.tensor([[0], [1]]), convex.test_data, **QUIET)
    assert rows.losses.shape == (2, 6)
    mask = np.arange(31) == 3
    with pytest.raises(TypeError, match=r"for a single set or mask \[removal\]"):
        retrain_without(chain, mask, convex.test_data, **QUIET)
    for odd in ([0.0, 1.0], [0.5], ["0"], [1j], [None], [[0]]):
        with pytest.raises(TypeError, match="removal 1 must hold whole numbers"):
            retrain_without(chain, [[0], odd], convex.test_data, **QUIET)


def test_a_mask_is_the_set_of_its_indices(convex):
    mask = torch.zeros(31, dtype=torch.bool)
    mask[[3, 9, 11]] = True
    forms = [mask, mask.numpy(), mask.tolist(), {9, 3, 11}, (11, 3, 9), np.array([3, 9, 11])]
    chain, settings = two(*convex.stages()), RetrainingSettings(tol=1e-11)
    found = retrain_without(chain, forms, convex.test_data, settings=settings, **QUIET)
    for row in found.losses[1:]:
        assert torch.allclose(row, found.losses[0], rtol=0, atol=1e-12)


def test_retraining_refuses_other_stages_and_test_data(convex, mlp):
    first, second = mlp.stages()
    other = Stage(nn.Linear(4, 3, dtype=F64), second.head, second.loss, second.data)
    with pytest.raises(ValueError, match="must have the same parameters; the names differ"):
        retrain_without(two(first, other), [[0]], mlp.test_data, **QUIET)
    x, y = mlp.test_data
    with pytest.raises(ValueError, match="test data: the target of example 1 is 7, outside"):
        wrong = x, torch.tensor([0, 7, 0, 0, 0, 0])
        retrain_without(two(first, second), [[0]], wrong, **QUIET)
    assert y.shape == (6,)


class LastState(torch.nn.Module):
    """A recurrent embedding; torch has no batching rule for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(2, 3, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gru(inputs)[0][:, -1]


@pytest.mark.parametrize("alpha", [None, 0.07])
def test_recurrent_models_are_retrained_one_after_the_other(alpha: float | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def data(count: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, 3, 2, generator=generator, dtype=torch.float64)
        return inputs, (inputs[:, -1, 0] > 0).long()

    embedding, heads = LastState().double(), [torch.nn.Linear(3, 2).double() for _ in range(2)]
    pretrain = Stage(embedding, heads[0], cross_entropy, data(12), l2=0.1)
    train(pretrain, 1e-9)
    if alpha is None:
        finetune = Stage(embedding, heads[1], cross_entropy, data(10), l2=0.1)
        train(finetune, 1e-9, head_only=True)
    else:
        finetune = Stage(copy.deepcopy(embedding), heads[1], cross_entropy, data(10), l2=0.1)
        train(finetune, 1e-9, towards=pretrain.embedding_vector(), alpha=alpha)
    result = retrain_without(
        two(pretrain, finetune, alpha), [[0], [3]], data(4),
        settings=RetrainingSettings(tol=1e-8), **QUIET,
    )  # fmt: skip
    assert result.converged.all() and result.converged_before
    assert result.losses.shape == (2, 4) and (result.change != 0).all()


def test_a_stage_read_in_part_is_refused(mlp: Problem):
    """As sharded ones are: a sum over a share would pass for the sum over all."""
    first, second = mlp.stages()
    with pytest.raises(ValueError, match=r"whole stages, not sharded ones.*jobs="):
        chain = two(first.section(range(3)), second, stationarity_tol=float("inf"))
        retrain_without(chain, [[0]], mlp.test_data)
